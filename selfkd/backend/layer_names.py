"""The linear layers of a model, by the names in the headers of its files: no weight is read, and no torch is needed.

What a header cannot say, such as which of its matrices transformers keeps as a layer of its own, is found when the model is opened.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfkd.backend import adapters
from selfkd.backend.model_files import PACKAGE, config_of, find_model
from selfkd.backend.model_sizes import kept_config
from selfkd.core.wording import did_you_mean

IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
EXPERT = re.compile(r"\.experts\.")  # a file has each apart; transformers makes one tensor of them


def folder_of(source: Mapping[str, Any]) -> Path | None:
    """Return the folder that a recipe's model (`path`, optional `revision`) lies in on this machine; None for a GGUF file, and where it is not here."""
    path = str(source["path"])
    if found := find_model(path):
        return found if found.is_dir() else None
    kept = None if path.startswith(PACKAGE) else _kept(path, source.get("revision"))
    return kept.parent if kept else None


def _kept(name: str, revision: str | None) -> Path | None:
    with suppress(ValueError):  # no name of a hub's
        return kept_config(name, revision)
    return None


def words_of(folder: Path) -> dict[str, Any]:
    """Return what its config.json says; nothing where there is none that can be read."""
    with suppress(OSError, ValueError):
        return config_of(folder)
    return {}


def linear_layers(folder: Path) -> list[str]:
    """Return the names of the matrices in the blocks of a model; none where its safetensors are not here."""
    shapes: dict[str, Sequence[int]] = {}
    with suppress(OSError, ValueError, struct.error):
        for path in sorted(folder.glob("*.safetensors")):
            shapes |= _shapes(path)
        named = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
        return [name for name in named if IN_A_BLOCK.search(name) and not EXPERT.search(name)]
    return []


def _shapes(path: Path) -> dict[str, Sequence[int]]:
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


def unknown(words: Sequence[str], layers: Sequence[str], whole: bool) -> str:
    """Return which of an adapter's `targets` end the name of no layer, with those that do; '' where all are known.

    `whole`: the names are the model's own; else files of another maker may put something else in front, and only the ends count.
    """
    known = adapters.last_words(layers)
    for word in words:
        end = word.rpartition(".")[2]
        if end not in known or (whole and not any(f".{name}".endswith(f".{word}") for name in layers)):
            return f"no linear layer of the model is called '{word}'.{did_you_mean(word, known)} There are: {', '.join(known)}"
    return ""
