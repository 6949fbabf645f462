"""The root of a chain: a hub id, a folder or a GGUF file becomes one plain Hugging Face folder of fp32 masters.

Never runs code that came with a model (no trust_remote_code, no pickle) and knows nothing of runs: it fills the folder it is given.
"""

from __future__ import annotations

import copy
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend import chat, conversations
from selfkd.backend.attention import plain_attention
from selfkd.backend.base import LongPrompt, Questions
from selfkd.backend.model_files import (
    PACKAGE,
    SHARD_SIZE,
    config_of,
    context_of,
    how_to_get,
    is_hub_id,
    packaged_gguf,
    said_of_text,
)
from selfkd.backend.probe import candidate_sequences, token_logprobs, write_probe
from selfkd.backend.tokens import encode_prompts
from selfkd.core import digest
from selfkd.core.shared_files import share
from selfkd.core.wording import first_line
from selfkd.errors import UsageError

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # what is fetched from the hub: no pickles, no code
DITHER_SLICE = 1 << 24  # elements dithered at a time: 64 MB of temporaries each, whatever the size of an embedding
ROOTS = "roots"  # in the cache: the files of weights that runs begin with, shared by link
SLICE = 10_000  # prompts whose texts and ids are in memory at once
SMALLEST_DITHERED = (
    2.0**-100
)  # below this nothing is dithered: zeros (padding rows, biases) stay zero, and denormals have other steps
# How weights of few bits are quantised that transformers turns back into numbers on any machine, and the class that is told to.
DEQUANTISED = {
    "fp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
QUESTIONS = (
    "What is the capital of France?",
    "Add 17 and 25, then say the answer.",
    "Name three animals that live in the sea.",
    "Write one line about the moon.",
    "Is 91 a prime number? Explain.",
    "Translate 'good morning' into Spanish.",
    "How do I boil an egg?",
    "List the first five even numbers.",
)


def load_model(source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
    """Bring `source` (`path`, optional `revision`) into `out`; UsageError where it cannot be used. Returns notes.

    `dither` is a seed: values that lie on the bf16 grid move to a place drawn evenly from those that round to the same bf16
    value, so an engine in bf16 sees the published model unchanged, and small updates no longer vanish in its cast.
    """
    with quietly():
        folder, origin = _find(str(source["path"]), source.get("revision"))
        model, tok = _open(folder)
    seen = conversations.look(tok, asked)
    if seen.refused:
        return {**origin, "refused": list(seen.refused)}
    notes = {**origin, "tensors": 0, "parameters": 0, "on_grid": 0.0, "dithered": 0.0, **_dither(model, dither)}
    with quietly():
        _save(model, tok, out)
    not_shared = share(sorted(out.glob("*.safetensors")), cache() / ROOTS)
    notes["root"] = f"not shared with other runs: {not_shared}" if not_shared else "shared with other runs of the same weights"
    chat.write(out, seen.chat)
    sequences = candidate_sequences(tok, [conversations.question(tok, text) for text in QUESTIONS])
    write_probe(out, sequences, token_logprobs(model, sequences), None, None, attention=plain_attention(model.config))
    if asked is None:
        return notes
    long = long_prompts(tok, asked, context_of(out, asked.context))
    return {**notes, "long": long, "chat": [remark.replace("The ", f"{origin['source']}: the ", 1) for remark in seen.remarks]}


def long_prompts(tok: Any, asked: Questions, context: int) -> list[LongPrompt]:
    """Return the questions that, with the answer they may get, are longer than `context`; each place in the order of the files."""
    found: list[LongPrompt] = []
    for file in asked.files:
        for part in pl.read_parquet(file).iter_slices(SLICE):
            lengths = [len(ids) for ids in encode_prompts(tok, part["messages"].to_list(), part["place"].to_list())]
            part = part.with_columns(tokens=pl.Series(lengths, dtype=pl.Int64), limit=context - pl.col("room"))
            long = part.filter(pl.col("tokens") > pl.col("limit")).drop("room", "messages")
            found += [LongPrompt(**row) for row in long.to_dicts()]  # type: ignore[typeddict-item]
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the progress bars of transformers off the screen (its GGUF reader has its own): what matters arrives as an exception."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _find(path: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Return a local folder of safetensors, and where it came from."""
    if path.startswith(PACKAGE):
        return _dequantised(_packaged(path.removeprefix(PACKAGE)), {"source": path})
    local = Path(path).expanduser()
    if local.is_file() or path.endswith(".gguf"):
        return _dequantised(local, {"source": path})
    if local.is_dir():
        return _checked(local), {"source": path, "revision": None}
    if not is_hub_id(path):
        raise UsageError(
            "there is no such model folder", path, "Give an existing folder, a .gguf file or a hub id like Qwen/Qwen2.5-1.5B."
        )
    return _fetch(path, revision)


def _packaged(name: str) -> Path:
    """Return the one GGUF file of an installed package."""
    files = packaged_gguf(name)
    if files is None or len(files) != 1:
        what = "the package is not installed" if files is None else f"the package holds {len(files)} GGUF files, not one"
        raise UsageError(what, f"{PACKAGE}{name}", how_to_get(name))
    return files[0]


def _fetch(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    folder, resolved = fetched(name, revision)
    return _checked(folder), {"source": name, "revision": resolved}


def fetched(name: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder of a hub's model on this machine, and its commit; what is not here is fetched. UsageError where it is not to be had."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client has a dozen kinds: no network, gated, no such repository or revision
        at = f"{name}@{revision}" if revision else name
        reason = f"{type(error).__name__}: {first_line(error)}"
        fix = f"No folder '{name}' exists here, so it was looked for on the hub ({reason}).\n"
        fix += "Check the name, the network and `hf auth login`, or give a local folder or .gguf file."
        raise UsageError("the model could not be fetched from the hub", at, fix) from error
    return folder, folder.name


def _checked(folder: Path) -> Path:
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(
            "the folder has no config.json, so it is not a Hugging Face model", str(folder), "Give the folder that has it."
        )
    try:
        content = json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"config.json is not JSON: {error}", str(folder), "Fetch the model again.") from error
    if not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        what = f"only pickled weights ({found[0]}), which can run code when opened" if found else "no weights"
        fix = "selfkd opens safetensors only: convert it once on a machine you trust, with `save_pretrained`."
        raise UsageError(f"the folder has {what}", str(folder), fix)
    _refuse_foreign_code(content, folder)
    _refuse_packed_weights(content, folder)
    return folder


def _refuse_foreign_code(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError for a model that needs code of its own. Code of a kind that transformers knows is simply not used."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        why = ", and it wants to run code of its own (auto_map)" if "auto_map" in config else ""
        fix = "selfkd never runs code that comes with a model. Use a model of a kind that transformers knows."
        raise UsageError(f"transformers does not know the model type {kind!r}{why}", str(folder), fix)


def _quantised_by(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how the weights of a model are quantised, as its config.json says; None for a model in plain numbers."""
    found: dict[str, Any] | None = said_of_text(config, "quantization_config") or said_of_text(config, "compression_config")
    return found


def _refuse_packed_weights(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError for weights in a packing that only kernels of a card take, or that is made while a model is loaded."""
    quantised = _quantised_by(config)
    if quantised is None or quantised.get("quant_method", "compressed-tensors") in DEQUANTISED:
        return
    fix = "Training needs numbers: give the model that these weights were made from, as its page names it, or a GGUF file of it, which is dequantised."
    raise UsageError(f"the weights are quantised by {quantised['quant_method']}, which is not undone here", str(folder), fix)


def _dequantised(file: Path, origin: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the fp32 folder of a GGUF file, made once and kept under the hash of the file."""
    if not file.is_file():
        raise UsageError("there is no such file", str(file), "Give an existing .gguf file.")
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            what = "the file is not a GGUF file (its first four bytes are not 'GGUF')"
            raise UsageError(
                what, str(file), "Fetch it again; a web page or a git-lfs pointer may have been saved under its name."
            )
    revision = digest.file(file)
    kept = cache() / "models" / revision
    if not kept.is_dir():
        _dequantise(file, kept)
    return _checked(kept), {**origin, "revision": revision}


def cache() -> Path:
    """Return where dequantised models are kept, and links to roots: SELFKD_CACHE, else ~/.cache/selfkd. Safe to delete at any time."""
    return Path(os.environ.get("SELFKD_CACHE") or "~/.cache/selfkd").expanduser()


def _dequantise(file: Path, kept: Path) -> None:
    """Write beside, then rename: two processes may do it at once, a killed one leaves only a folder nobody reads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": file.name, "local_files_only": True}
    try:
        tok = AutoTokenizer.from_pretrained(str(file.parent), **options)
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), **options, quantization_config=GgufConfig(dequantize=True), dtype="float32"
        )
    except Exception as error:  # whatever its parser meets in a damaged file: struct, Unicode, key and index errors
        fix = "The file is damaged, or of an architecture that transformers cannot dequantise: use the safetensors model."
        raise UsageError(f"the GGUF file cannot be read: {type(error).__name__}: {error}", str(file), fix) from error
    _agree_on_special_tokens(tok, model)
    draft = kept.with_name(f"tmp-{os.getpid()}-{secrets.token_hex(4)}")
    _save(model, tok, draft)
    try:
        draft.rename(kept)
    except OSError:  # somebody else was quicker; theirs is equal
        shutil.rmtree(draft)


def _agree_on_special_tokens(tok: Any, model: Any) -> None:
    """Give a tokenizer the configuration's end and padding tokens: those read from GGUF name the wrong end (SmolLM2: the start)."""
    config, own = model.config, model.generation_config
    named = config.eos_token_id if config.eos_token_id is not None or own is None else own.eos_token_id
    ends = named if isinstance(named, list) else [named]
    if ends[0] is not None and tok.eos_token_id not in ends:
        tok.eos_token = tok.convert_ids_to_tokens(ends[0])
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token if config.pad_token_id is None else tok.convert_ids_to_tokens(config.pad_token_id)
    tok.clean_up_tokenization_spaces = False  # ignored for these tokenizers, with a warning each time


def _open(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tok = AutoTokenizer.from_pretrained(str(folder), **options)
        config = AutoConfig.from_pretrained(str(folder), **options)
        chosen = {"dtype": "float32", "attn_implementation": plain_attention(config), **_undoing(folder)}
        model, found = AutoModelForCausalLM.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, **chosen, **options
        )
    except Exception as error:  # safetensors, tokenizers and transformers each have kinds of their own
        reason = f"{type(error).__name__}: {str(error).strip()}"
        raise UsageError(
            f"the model cannot be opened: {reason}", str(folder), "Check that its download is complete."
        ) from error
    absent = sorted([*found["missing_keys"], *(str(entry) for entry in found["mismatched_keys"])])
    if absent:  # transformers would fill them with random numbers and only warn
        what = f"{len(absent)} tensors are missing or of another shape: {', '.join(absent[:5])}"
        raise UsageError(what, str(folder), "Check that its download is complete and that it is a causal language model.")
    if tok.eos_token_id is None:
        _agree_on_special_tokens(tok, model)
    _refuse_odd_tokenizer(tok, model, folder)
    return (_without_its_packing(model) if "quantization_config" in chosen else model).eval(), tok


def _undoing(folder: Path) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that turn quantised weights into numbers; none for a model that has numbers."""
    import transformers

    quantised = _quantised_by(config_of(folder))
    if quantised is None:
        return {}
    kind = getattr(transformers, DEQUANTISED[quantised.get("quant_method", "compressed-tensors")])
    return {"quantization_config": kind(dequantize=True)}


def _without_its_packing(model: Any) -> Any:
    """Return a dequantised model as one that never was quantised: else its scales stay among the weights, and saving packs it again."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):
        part.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, attn_implementation=plain_attention(config))
    numbers = {name: tensor.float() for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(numbers, assign=True)
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        plain.get_submodule(owner)._buffers[last] = buffer
    plain.generation_config = model.generation_config
    plain.tie_weights()
    return plain


def _refuse_odd_tokenizer(tok: Any, model: Any, folder: Path) -> None:
    """Raise UsageError for a tokenizer that writes what the model has no row for, or that has no token to end an answer with."""
    rows = model.get_input_embeddings().weight.shape[0]
    token, most = max(tok.get_vocab().items(), key=lambda entry: entry[1])
    if most >= rows:
        what = f"the tokenizer has {most + 1} tokens, the last of them {token!r}, and the model's embedding has {rows} rows"
        fix = "Take the tokenizer that belongs to these weights, or enlarge them once: `model.resize_token_embeddings(len(tokenizer))`, `save_pretrained`."
        raise UsageError(what, str(folder), fix)
    if tok.eos_token_id is None:
        fix = "Without one an answer never ends. Set `eos_token` in tokenizer_config.json, or `eos_token_id` in config.json."
        raise UsageError("neither the tokenizer nor the model's configuration names an end token", str(folder), fix)


def _save(model: Any, tok: Any, out: Path) -> None:
    """Write fp32 shards, tokenizer and chat template. Of the generation config only token ids stay: no sampling default survives."""
    from transformers import GenerationConfig

    own, config = model.generation_config, model.config
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(own, name, None)
        ids[name] = value if value is not None else getattr(config, name, None)
    model.generation_config = GenerationConfig(**ids)
    for name in ("auto_map", "quantization_config"):
        config.__dict__.pop(name, None)
    config.dtype = "float32"
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    tok.save_pretrained(out)


def _dither(model: Any, seed: int | None) -> dict[str, Any]:
    """Dither every parameter, vectors too: a norm weight of 1 moves by steps of 0.004 to 0.008 in bf16, no less dead than a matrix.

    Tied tensors are one parameter here, and stay one. The seed of each comes from its name.
    """
    import torch

    tensors = parameters = on_grid = dithered = 0
    for name, tensor in model.named_parameters():
        tensors, parameters = tensors + 1, parameters + tensor.numel()
        generator = torch.Generator().manual_seed(digest.seed("dither", seed, name)) if seed is not None else None
        for part in tensor.data.view(-1).split(DITHER_SLICE):
            found, moved = dither(part, generator)
            on_grid, dithered = on_grid + found, dithered + moved
    shares = {"on_grid": on_grid / parameters, "dithered": dithered / parameters}
    return {"tensors": tensors, "parameters": parameters, **shares}


def dither(values: Any, generator: Any | None) -> tuple[int, int]:
    """Move fp32 `values` that lie on the bf16 grid, in place: (how many lay there, how many moved). None moves nothing.

    The cells of bf16 reach half a step either way, a quarter towards zero from a power of two; the draw stays two fp32 steps
    inside, so casting to bf16 gives back exactly what was there.
    """
    import torch

    bits = values.view(torch.int32)
    large = values.abs() >= SMALLEST_DITHERED
    grid = (bits & 0xFFFF) == 0
    found = int((grid & (large | (values == 0))).sum())
    grid &= large
    if generator is None:
        return found, 0
    draw = torch.rand(values.shape, generator=generator)  # drawn for all, so that one value off the grid shifts no other
    outwards = (bits & 0x7F800000).view(torch.float32) * (2.0**-8 * (1 - 2.0**-14))
    inwards = torch.where((bits & 0x007F0000) == 0, outwards / 2, outwards)
    moved = torch.copysign(values.abs() - inwards + draw * (inwards + outwards), values)
    same = moved.bfloat16() == values.bfloat16()
    assert bool(same[grid].all()), "a dithered weight rounds to another bf16 value"
    values.copy_(torch.where(grid, moved, values))
    return found, int(grid.sum())
