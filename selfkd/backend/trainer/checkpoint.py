"""The folder an update leaves: fp32 shards, and everything else as the parent has it.

Knows nothing of how the weights came to be; refuses a child that is not finite, or equal to its parent.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from selfkd.backend.adapters import Weights
from selfkd.backend.model_files import SHARD_SIZE
from selfkd.core.digest import ADAPTER, DESCRIPTIONS
from selfkd.errors import GuardError

OWN = ("config.json", "adapter_config.json", ADAPTER)  # of a child; all else that its digest covers is its parent's
MOVED = ("update_norm", "update_ratio")  # how far it did
LOWER_THE_STEP = "Lower trl.learning_rate or trl.max_grad_norm; nothing was written."


def write(model: Any, parent: Path, out: Path) -> None:
    """Write the weights as the model holds them; all else is the parent's."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    describe(parent, out)


def describe(parent: Path, out: Path) -> None:
    """Write beside the weights what the parent says of itself. The padding token that TRL configured is not kept."""
    (out / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((parent / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", "utf-8")
    for path in (path for pattern in DESCRIPTIONS if pattern not in OWN for path in parent.glob(pattern) if path.is_file()):
        target = out / path.relative_to(parent)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def moved(parent: Weights, child: Path) -> dict[str, float]:
    """Measure how far the written weights lie from the parent's, tensor by tensor; not at all, or not finite: GuardError."""
    import torch
    from safetensors import safe_open

    update = weight = 0.0
    for path in sorted(child.glob("*.safetensors")):
        with safe_open(path, "pt") as new:
            for name in new.keys():  # noqa: SIM118 - safe_open is not a mapping
                after, before = new.get_tensor(name), parent[name].to(torch.float32)
                norm = torch.linalg.vector_norm(after).item()
                if not math.isfinite(norm):
                    raise GuardError(f"after the last step the weights {name} are not finite", "train", LOWER_THE_STEP)
                update += torch.linalg.vector_norm(after - before).item() ** 2
                weight += norm**2
    if update == 0:
        fix = "Is trl.learning_rate zero, or too small for any weight to move?"
        raise GuardError("training changed no weight", "train", fix)
    return {"update_norm": math.sqrt(update), "update_ratio": math.sqrt(update / weight)}
