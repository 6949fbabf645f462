"""The sizes of a model that decide what memory it takes, from its config.json or the header of its file: no weight is read.

Knows no torch. What cannot be found is said in words (`Unknown`), never guessed.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfkd.backend import gguf_header
from selfkd.backend.model_files import PACKAGE, config_of, find_model, text_sections
from selfkd.backend.nf4 import TRANSPOSED, unfit
from selfkd.core.hardware import installed_version
from selfkd.core.wording import first_line

# What each size is called by the kinds of model that name it otherwise than Llama does.
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_size": ("head_dim", "attention_head_size"),
    "vocabulary": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_inner": ("moe_intermediate_size",),
    "experts_used": ("num_experts_per_tok", "num_experts_per_token", "moe_topk"),
}
TIED_UNLESS_SAID = ("gemma", "gpt2", "gpt_neo", "opt", "bloom", "falcon", "cohere", "mpt")  # how such model types begin
TWO_MATRICES = ("gpt", "phi", "opt", "bloom", "falcon", "starcoder", "mpt")  # without a gate, unless their activation is one
GATED = ("phi3", "phi4")
HUB_SECONDS = 5  # of asking a hub for a config.json of a few hundred bytes
HUB_ID = r"[\w.-]+(/[\w.-]+)?"


@dataclass(frozen=True)
class Sizes:
    """`inner` is the width of the layers between attentions, of a mixture that of the experts that one token goes through.

    `fits_four_bits`: nearly all of it lies in layers that can lie in 4 bits beneath an adapter.
    """

    parameters: int
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    fits_four_bits: bool = True

    @property
    def attended(self) -> int:
        """Return the width of the queries."""
        return self.heads * self.head_size

    @property
    def kept(self) -> int:
        """Return the width of the keys, which is that of the values."""
        return self.kv_heads * self.head_size

    @property
    def embedding(self) -> int:
        """Return the numbers of the embedding, which is as large as the output head."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class Unknown:
    """Why the sizes of a model are not known here."""

    why: str


Ask = Callable[[str, str | None], Mapping[str, Any]]  # (hub id, revision) -> its config; any Exception says why there is none


def ask_hub(name: str, revision: str | None) -> Mapping[str, Any]:
    """Return the config of a model on a hub: from the hub's cache on this machine, else a few hundred bytes are fetched."""
    if kept := kept_config(name, revision):
        return config_of(kept.parent)
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise OSError("HF_HUB_OFFLINE is set")
    home = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    with urllib.request.urlopen(f"{home}/{name}/resolve/{revision or 'main'}/config.json", timeout=HUB_SECONDS) as answer:
        config: dict[str, Any] = json.loads(answer.read())
    return config


def kept_config(name: str, revision: str | None) -> Path | None:
    """Return the config.json that the hub's own client keeps, where it is installed and has one."""
    if not installed_version("huggingface_hub"):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def sizes_of(source: Mapping[str, Any], ask: Ask | None = None) -> Sizes | Unknown:
    """Return the sizes of a recipe's model (`path`, optional `revision`): folder, GGUF file, package or hub id."""
    path = str(source["path"])
    found = find_model(path)
    if found is None:
        return _of_hub(path, source.get("revision"), ask or ask_hub)
    try:
        if found.is_file():
            return of_header(gguf_header.read(found))
        return of_config(config_of(found), counted(found))
    except (OSError, ValueError) as error:
        return Unknown(f"{found} says nothing of its sizes: {first_line(error)}")


def _of_hub(name: str, revision: str | None, ask: Ask) -> Sizes | Unknown:
    if name.startswith(PACKAGE) or not re.fullmatch(HUB_ID, name):
        return Unknown("the model is not here")
    try:
        return of_config(ask(name, revision))
    except Exception as error:  # no network, gated, no such repository or revision: each has kinds of its own
        return Unknown(f"the config.json of {name} is not here ({first_line(error)}); fetch it: hf download {name} config.json")


# ---- config.json ----


def of_config(config: Mapping[str, Any], parameters: int | None = None) -> Sizes | Unknown:
    """Return the sizes that a config.json gives; `parameters` where they were counted, else they are worked out."""
    text = {**config, **next((config[name] for name in text_sections(config)), {})}
    said: dict[str, Any] = {
        size: next((text[name] for name in names if text.get(name) is not None), None) for size, names in NAMES.items()
    }
    if missing := [size for size in ("layers", "hidden", "heads", "vocabulary") if not isinstance(said[size], int)]:
        return Unknown(f"its config.json does not say {', '.join(missing)}")
    layers, hidden, heads, vocabulary = (int(said[size] or 0) for size in ("layers", "hidden", "heads", "vocabulary"))
    kv_heads, head_size = said["kv_heads"] or (1 if text.get("multi_query") else heads), said["head_size"] or hidden // heads
    found = Sizes(
        0, layers, hidden, _inner(said), heads, kv_heads, head_size, vocabulary, _is_tied(config, text), not unfit(config)
    )
    return replace(found, parameters=parameters or _worked_out(found, said, _matrices(text)))


def _inner(said: Mapping[str, Any]) -> int:
    """Return the width between attentions that one token goes through."""
    if said["experts"] and said["experts_used"]:
        return int((said["expert_inner"] or said["inner"]) * said["experts_used"])
    return int(said["inner"] or 4 * said["hidden"])


def _worked_out(sizes: Sizes, said: Mapping[str, Any], matrices: int) -> int:
    """Return how many parameters such a model has: its matrices and norms; biases are a thousandth of them and are left out."""
    inner = (
        (said["expert_inner"] or said["inner"]) * said["experts"] if said["experts"] and said["experts_used"] else sizes.inner
    )
    attention = 2 * sizes.hidden * (sizes.attended + sizes.kept)
    layer = attention + matrices * sizes.hidden * inner + sizes.hidden * (2 + (said["experts"] or 0))
    return sizes.layers * layer + sizes.hidden + sizes.embedding * (1 if sizes.tied else 2)


def _matrices(text: Mapping[str, Any]) -> int:
    """Return how many matrices lie between two attentions: three where one of them is a gate."""
    kind = str(text.get("model_type", ""))
    return 2 if kind.startswith(TWO_MATRICES) and not kind.startswith(GATED) else 3


def _is_tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    said = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return bool(said) if said is not None else str(text.get("model_type", "")).startswith(TIED_UNLESS_SAID)


# ---- counting ----


def counted(folder: Path) -> int | None:
    """Return the parameters that the headers of a folder's safetensors list; None where there are none."""
    return sum(_listed(shard) for shard in folder.glob("*.safetensors")) or None


def _listed(shard: Path) -> int:
    """Return the parameters in one safetensors file: the product of each shape in its header."""
    with shard.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        tensors: dict[str, Any] = json.loads(handle.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__")


def parameters(path: str) -> int | None:
    """Return how many parameters a model has whose files are here, whatever else is known of it."""
    found = find_model(path)
    with suppress(OSError, ValueError, struct.error):
        if found is not None and found.is_dir():
            return counted(found)
        if found is not None:
            return sum(map(math.prod, gguf_header.read(found).tensors.values())) or None
    return None


def of_header(header: gguf_header.Header) -> Sizes | Unknown:
    """Return the sizes that a GGUF file gives; its tensors are counted."""
    kind, tensors = header.words.get("general.architecture"), header.tensors

    def word(name: str, default: Any = None) -> Any:
        return header.words.get(f"{kind}.{name}", default)

    heads, hidden, embedding = word("attention.head_count"), word("embedding_length"), tensors.get("token_embd.weight")
    if not (isinstance(heads, int) and isinstance(hidden, int) and embedding and isinstance(word("block_count"), int)):
        return Unknown("its header does not say how large it is")
    used = word("expert_used_count", 0)
    inner = word("expert_feed_forward_length") or word("feed_forward_length") or 4 * hidden
    return Sizes(
        sum(map(math.prod, tensors.values())),
        layers=word("block_count"),
        hidden=hidden,
        inner=inner * (used or 1),
        heads=heads,
        kv_heads=word("attention.head_count_kv", heads),
        head_size=word("attention.key_length", hidden // heads),
        vocabulary=embedding[-1],
        tied="output.weight" not in tensors,
        fits_four_bits=not used and kind not in TRANSPOSED,
    )
