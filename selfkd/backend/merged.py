"""A folder of full weights from an adapter and the weights beneath it, for programs that read no adapters.

Each tensor is worked out in fp32 from the two, and files of at most `SHARD` bytes are written as they fill: no model is held whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from selfkd.backend.adapters import Weights
from selfkd.backend.model_files import by_size
from selfkd.core.digest import ADAPTER
from selfkd.core.storage import files_in

SHARD = 1 << 31
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def merge(folder: Path, base: Path, out: Path) -> None:
    """Write into `out` the full weights that the adapter in `folder` makes of those in `base`; all else is the base's."""
    out.mkdir(parents=True)
    for path in files_in(base):
        if not any(path.match(pattern) for pattern in WEIGHTS) and path.name != ADAPTER:
            target = out / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    _write(Weights(folder, base), out)


def _write(tensors: Iterable[tuple[str, Any]], out: Path) -> None:
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    total = 0
    for number, batch in enumerate(by_size(tensors, SHARD)):
        name = f"model-{number:05d}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in batch.items()}, out / name, {"format": "pt"})
        places |= dict.fromkeys(batch, name)
        total += sum(tensor.nbytes for tensor in batch.values())
    if set(places.values()) == {"model-00000.safetensors"}:
        (out / "model-00000.safetensors").rename(out / "model.safetensors")
        return
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
