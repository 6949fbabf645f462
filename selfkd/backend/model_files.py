"""Where the files of a model lie on this machine, found without torch and without opening them.

Knows nothing of hubs: what is not here is not found.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from selfkd.backend import adapters
from selfkd.core import digest
from selfkd.core.files import builtin_folder

PACKAGE = "package:"  # in front of the name of an installed package that carries one GGUF file
TEXT_SECTIONS = ("text_config", "decoder", "generator")  # where transformers looks for it
LIMITS = (
    "max_position_embeddings",
    "n_positions",
)  # how configurations name the most tokens; the second is GPT-2's and its kin's
SHARD_SIZE = "2GB"  # of the safetensors files that selfkd writes


def packaged_gguf(package: str) -> list[Path] | None:
    """Return the GGUF files of an installed package, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(package) if re.fullmatch(r"\w+", package) else None  # a dotted name would import its parent
    if spec is None:
        return None
    folders = spec.submodule_search_locations or []
    return [file for folder in folders for file in sorted(Path(folder).glob("**/*.gguf"))]


def packages_with_gguf() -> list[str]:
    """Return the installed packages that hold a GGUF file, told from the lists of files that their installers left."""
    records = (one.read_text("RECORD") or "" for one in metadata.distributions())
    return sorted({name for record in records for name in re.findall(r"^(\w+)/[^\n]*\.gguf,", record, re.MULTILINE)})


def shipped_packages() -> list[str]:
    """Return the packages whose models the shipped recipes use."""
    recipes = (path.read_text("utf-8") for path in (builtin_folder() / "recipes").glob("*.yaml"))
    return sorted({name for text in recipes for name in re.findall(rf"^model: *{PACKAGE}(\w+)", text, re.MULTILINE)})


def how_to_get(package: str) -> str:
    """Return what installs a package that shipped recipes use; of any other, nobody knows whose a package of that name would be."""
    if package in shipped_packages():
        return f"pip install --no-deps {package.replace('_', '-')}"
    return f"Check the name: shipped recipes use {', '.join(shipped_packages())}."


def is_hub_id(path: str) -> bool:
    """Whether a name may be that of a model on a hub, such as Qwen/Qwen2.5-1.5B."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None and not path.startswith(".") and not path.endswith(".gguf")


def find_model(path: str) -> Path | None:
    """Return the folder or the GGUF file that `model:` names, as far as it is on this machine; else None."""
    if path.startswith(PACKAGE):
        return next(iter(packaged_gguf(path.removeprefix(PACKAGE)) or []), None)
    local = Path(path).expanduser()
    return local if local.exists() else None


def config_of(folder: Path) -> dict[str, Any]:
    """Return what the config.json of a model folder says."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def text_sections(config: Mapping[str, Any]) -> list[str]:
    """Return the keys under which a model that is more than its text describes that part of it; none for most models."""
    return [name for name in TEXT_SECTIONS if isinstance(config.get(name), dict)]


def said_of_text(config: Mapping[str, Any], word: str) -> Any:
    """Return what a config says of a model, or of that part of it which writes; None where it says nothing."""
    parts = [config, *(config[name] for name in text_sections(config))]
    return next((part[word] for part in parts if part.get(word) is not None), None)


def context_of(folder: Path, wanted: int) -> int:
    """Return how many tokens a prompt and its answer may have together: as many as are wanted, or the model's limit if that is less."""
    config = config_of(folder)
    limits: list[int] = [limit for word in LIMITS if (limit := said_of_text(config, word))]
    return min([wanted, *limits])


@lru_cache(maxsize=256)
def engine_kind(folder: Path, weights: str, dtype: str) -> str:
    """Return which engines can hold a model: those that came up with this architecture, these sizes, this tokenizer and this `dtype`, and with
    as much room for an adapter beside the weights.

    `weights` is the digest of the folder's contents, which is why the files are read once. A folder without config.json is no
    model of an engine's; all of them are one kind.
    """
    room = adapters.room_for(folder)
    described = ("config.json", *digest.TOKENIZER_FILES) if (folder / "config.json").is_file() else ()
    return digest.of("engine", digest.descriptions(folder, described), dtype, *([room] if room.rank else []))


def by_size(tensors: Iterable[tuple[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """Yield named tensors in groups of at most `most` bytes, one file each; a tensor that is larger has its own."""
    batch: dict[str, Any] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > most:
            yield batch
            batch, size = {}, 0
        batch[name], size = tensor, size + tensor.nbytes
    if batch:
        yield batch
