"""What a sample step asks for, as vLLM's SamplingParams: plain YAML values converted, and what vLLM refuses as a user's error.

Imports vLLM only when called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

from selfkd.backend.base import Sampling
from selfkd.backend.engine.sampling_options import OWNED
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError

PLACE = "sample.vllm"


def request_params(sampling: Sampling, ends: Sequence[int], seeds: Sequence[int]) -> list[Any]:
    """Return the parameters of one request per seed; UsageError names the word of `sampling.extra` that vLLM does not take.

    Log-probabilities of the sampled tokens cost 7 % of generation (SmolLM2-135M, CPU): `extra: {logprobs: 0}` asks for them.
    """
    from pydantic import TypeAdapter
    from vllm import SamplingParams

    _known(sampling.extra, SamplingParams)
    words = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": list(ends),
        **sampling.extra,
    }
    read = TypeAdapter(SamplingParams).validate_python
    with refusals(sampling.extra):
        return [read({**words, "seed": seed}) for seed in seeds]


@contextmanager
def refusals(extra: Mapping[str, Any]) -> Iterator[None]:
    """Turn what vLLM says against the words `extra` into a UsageError; where a recipe gave none, the error is not its own."""
    from pydantic import ValidationError
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (VLLMClientError, ValueError) as error:
        if not extra:
            raise
        said, word = str(error), getattr(error, "parameter", None)
        if isinstance(error, ValidationError):
            found = error.errors()[-1]  # of a union's alternatives the last: the words, not a finished object
            said, word = f"{found['msg']}, not {found['input']!r}", next((part for part in found["loc"] if part in extra), None)
        word = word or next((one for one in extra if one in said), None)
        place = f"{PLACE}.{word}" if word in extra else f"{PLACE} ({', '.join(extra)})"
        raise UsageError(f"vLLM refuses it: {said}", place, "See SamplingParams in vLLM's documentation.") from error


def _known(extra: Mapping[str, Any], params: Any) -> None:
    """Raise UsageError for words that selfkd owns or vLLM does not have, inside nested ones too."""
    hints = {name: hint for name, hint in get_type_hints(params).items() if not name.startswith("_")}
    for word, value in extra.items():
        if word in OWNED:
            raise UsageError("selfkd sets this itself", f"{PLACE}.{word}", OWNED[word])
        _must_be_one_of(word, hints, PLACE)
        nested = [kind for kind in get_args(hints[word]) if dataclasses.is_dataclass(kind)]
        for inner in value if nested and isinstance(value, Mapping) else ():
            _must_be_one_of(inner, [field.name for field in dataclasses.fields(nested[0])], f"{PLACE}.{word}")


def _must_be_one_of(word: str, known: Any, place: str) -> None:
    if word not in known or word.startswith("_"):
        listed = ", ".join(sorted(name for name in known if not name.startswith("_") and name not in OWNED))
        raise UsageError(f"vLLM has no '{word}' here.{did_you_mean(word, known)}", f"{place}.{word}", f"Known: {listed}")
