"""What of vLLM depends on the architecture of a model: what it lacks, in words, and what it does to the classes of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfkd.backend.model_files import config_of
from selfkd.core.pool import Model
from selfkd.core.wording import first_line
from selfkd.errors import SelfkdError, UsageError

WAY_OUT = "`generator: transformers` in the machine file generates with whatever transformers knows, several times slower."
# What vLLM raises where it lacks something, and would again. Any other RuntimeError may be a trouble of the machine, or of a process.
LACKS = (ValueError, NotImplementedError, TypeError, AttributeError, LookupError, AssertionError, ImportError)

BEGINNING = "__init__"


def architecture(folder: Path) -> str:
    """Return the architecture that a model folder names, such as Qwen3ForCausalLM."""
    config = config_of(folder)
    named = config.get("architectures") or [config.get("model_type") or "this model"]
    return str(named[0])


@contextmanager
def in_words(model: Model, doing: str, options: Mapping[str, Any], alone: bool = False) -> Iterator[None]:
    """Raise UsageError, which names the architecture and the way out, for what vLLM raises while it is `doing` something with a model.

    `options` are those that a machine file passes through. `alone`: no other process takes part, so that a RuntimeError is one of the
    model's too. What vLLM says of memory is no matter of the architecture: that is raised as it is.
    """
    kinds = (*LACKS, RuntimeError) if alone else LACKS
    try:
        yield
    except SelfkdError:
        raise
    except kinds as error:
        if "memory" in str(error).lower():
            raise
        passed = f"\nOr it is one of the options under `engine` there: {', '.join(options)}." if options else ""
        what = f"vLLM cannot {doing} {architecture(Path(model.path))}: {_reason(error)}"
        raise UsageError(what, model.path, WAY_OUT + passed) from error


def _reason(error: Exception) -> str:
    """Return what an error says. Pydantic's first line says only how many errors follow; the second names a class, the third tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return lines[-1 if len(lines) == 2 else 1].removeprefix("Value error, ").split(" [type=")[0]
    return f"{first_line(error)} ({type(error).__name__})"


@contextmanager
def classes_kept(folder: Path) -> Iterator[None]:
    """Let transformers make models of this architecture afterwards too, in this process.

    vLLM runs some of them (OLMo 2) by transformers' own class, which it changes for its compiler: without a vLLM around it, that class then
    makes no model any more, and a trainer beside the engine needs one.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    classes = {AutoModel._model_mapping.get(type(part), None) for part in (config, config.get_text_config(decoder=True))}
    before = {one: vars(one).get(BEGINNING) for one in classes if isinstance(one, type)}
    try:
        yield
    finally:
        for one, begin in before.items():
            if vars(one).get(BEGINNING) is not begin:
                setattr(one, BEGINNING, begin)
                one.do_not_compile = True  # type: ignore[attr-defined]  # vLLM's own model knows for itself
