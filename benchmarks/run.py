"""`make bench`: every benchmark once, on an otherwise idle machine, into docs/benchmarks.md between its two marks. About 50 minutes on two cores.

Nothing here is a test. Two runs of the quickstart are made first, as shipped and with short rounds (or a finished one as shipped is named:
`python benchmarks/run.py runs/quickstart`), and everything else is measured on the model of the shipped one.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.bf16 import flags_here
from selfkd.chain.run import Run
from selfkd.core import facts
from selfkd.core.hardware import usable_cores

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
ABOVE = "<!-- From here `make bench` writes. -->"
BELOW = "<!-- To here `make bench` writes; above and below, people do. -->"
SHORT = ("prompts.take=32", "rounds=2")  # a quarter of the shipped rounds, which take two minutes each


def program(name: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, str(HERE / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    print(f"{name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def quickstart(name: str, *overrides: str) -> Run:
    folder = Path("runs") / name
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as machine:
        machine.write(f"threads: {usable_cores()}\n")  # whatever else is at work: every run with as many
        machine.flush()
        command = [sys.executable, "-m", "selfkd", "run", "quickstart", "--name", name, "--on", machine.name, *overrides]
        subprocess.run(command, check=True)
    return Run.at(folder)


def seconds_of(run: Run) -> float:
    """From the start of the one attempt to its end, by its own events."""
    [log] = run.folder.glob("logs/*/events.jsonl")
    times = [json.loads(line)["t"] for line in log.read_text().splitlines()]
    return float(times[-1] - times[0])


def by_hand(run: Run) -> dict[str, Any]:
    """The prompts of the run as the hand-written loop reads them, then that loop."""
    model = str((run.folder / run.sealed()[0].models["policy"].path).resolve())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dev.json").write_text(json.dumps(_rows(run, "dev")))
        for index in range(1, len(run.sealed())):
            (folder / f"train-{index}.json").write_text(json.dumps(_rows(run, "train", index)))
        same = (str(run.numerics["threads"]), run.numerics["dtype"])
        found: dict[str, Any] = program("loop_by_hand.py", str(folder), model, *same)
    return found


def _rows(run: Run, split: str, index: int | None = None) -> list[dict[str, Any]]:
    """Prompts of a split; of the train split those that round `index` asked, as it asked them."""
    from selfkd.prompts import templates

    template = templates.load("templates/sum_examples.j2", run.recipe.folders)
    prompts = run.split(split).scan("prompts").collect()
    if index is not None:
        files = [run.folder / path for path in run.made(index)["sample"].tables["samples"].files]
        asked = pl.concat([pl.read_parquet(path, columns=["prompt"]) for path in files])["prompt"].unique()
        prompts = prompts.filter(pl.col("id").is_in(asked.implode()))
    rows = []
    for row in prompts.iter_rows(named=True):
        seen = templates.visible_prompt(row["messages"], row["answer"], {})
        shown = (
            templates.with_last_message(row["messages"], template.render(prompt=seen)) if split == "train" else row["messages"]
        )
        rows.append({"answer": row["answer"], "seen": row["messages"], "teacher_messages": shown})
    return rows


def round_lengths(runs: list[Run]) -> list[dict[str, Any]]:
    """The run and the same by hand, for rounds of several lengths."""
    found = []
    for run in runs:
        hand, whole = by_hand(run), seconds_of(run)
        accuracy = [f"{run.made(index)['measure'].metrics['dev/answer_line']:.1%}" for index in range(len(run.sealed()))]
        found.append(
            {
                "prompts of a round": run.recipe.prompts.take,
                "rounds": len(run.sealed()) - 1,
                "selfkd, seconds": f"{whole:.0f}",
                "by hand, seconds": f"{hand['seconds']:.0f}",
                "by hand / selfkd": f"{hand['seconds'] / whole:.2f}",
                "dev, selfkd": " → ".join(accuracy),
                "dev, by hand": " → ".join(f"{value:.1%}" for value in hand["accuracy"]),
                "processes by hand, seconds": f"generate {hand['parts']['generate']} ({hand['way']}), train {hand['parts']['train']}",
            }
        )
    return found


def generation_rows(found: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """One row per number format and comparison: both speeds and their ratio; then the engines side by side."""
    compared = {
        ("local", "plain"): "local backend / plain LLM.generate with our sampler (target 0.97)",
        ("local", "vllm"): "local backend / plain LLM.generate, seeded, with vLLM's sampler",
        ("local", "unseeded"): "local backend / plain LLM.generate, unseeded, with vLLM's sampler (target 1.0)",
        ("ray", "plain"): "Ray backend / plain LLM.generate with our sampler (target 0.97)",
    }
    engines = found.pop("engines")
    rows = []
    for format, speed in found.items():
        for (ours, theirs), words in compared.items():
            if ours in speed:
                spread = f" ({speed['least']} to {speed['most']})" if (ours, theirs) == ("local", "plain") else ""
                ratio = speed[f"{ours}/{theirs}"]
                rows.append((f"Generation, {format}: {words}", f"{speed[ours]} / {speed[theirs]} tok/s; ratio {ratio}{spread}"))
    told = ", ".join(f"{count}: {rate}" for count, rate in engines.items())
    return [*rows, ("Generation through Ray, engines of one thread each", f"{told} tok/s")]


def lint_seconds(recipe: str) -> float:
    def once() -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "selfkd", "lint", recipe], capture_output=True, check=True)
        return time.monotonic() - began

    return round(statistics.median(once() for _ in range(7)), 2)


def main() -> None:
    run = Run.at(Path(sys.argv[1])) if len(sys.argv) > 1 else quickstart("bench")
    lengths = round_lengths([quickstart("bench-short", *SHORT), run])
    idle = program("idle.py", str(run.folder))
    swaps = [entry["swap and proof"] for entry in idle]
    rows = [
        ("Weight swap with proof, SmolLM2-135M (target 2 s)", f"{statistics.median(swaps):.2f} s, median of {len(swaps)}"),
        *(
            (f"Engine idle {what}", f"{statistics.median(entry[what] for entry in idle):.1f} s")
            for what in ("to first optimiser step", "to first token")
        ),
        ("A round beyond generate, train, score, measure (target 5 %)", ", ".join(entry["beyond"] for entry in idle)),
        *generation_rows(program("generation.py", str(run.folder))),
        *(training_row(told) for told in program("training.py")),
        million_row(program("million.py")),
        ("`selfkd lint star`, cold, median of 7 (target 1 s)", f"{lint_seconds('star')} s"),
        ("`selfkd lint quickstart`, cold, median of 7", f"{lint_seconds('quickstart')} s"),
    ]
    write(run, rows, idle, lengths)


def training_row(told: dict[str, Any]) -> tuple[str, str]:
    what = f"Training step without optimiser against its matrix products, {told['precision']}, {told['kernels']} (target 0.8)"
    return what, f"{told['bound']} / ({told['step']} - {told['optimiser']}) s = {told['ratio']}"


def million_row(million: dict[str, float]) -> tuple[str, str]:
    steps = ("score", "select", "build", "seal and the rest")
    total, parts = sum(million[name] for name in steps), " + ".join(f"{name} {million[name]}" for name in steps)
    what = "One million samples: score, select, build, seal (target 60 s, 4 GiB)"
    return what, f"{total:.0f} s ({parts}), {million['peak_gib']} GiB"


def table(entries: list[dict[str, Any]]) -> list[str]:
    return [
        "| " + " | ".join(entries[0]) + " |",
        "|" + "---|" * len(entries[0]),
        *("| " + " | ".join(str(value) for value in entry.values()) + " |" for entry in entries),
        "",
    ]


def write(run: Run, rows: list[tuple[str, str]], idle: list[dict[str, Any]], lengths: list[dict[str, Any]]) -> None:
    """Put the tables into the page, between its two marks; what people wrote above and below them stays."""
    packages = ", ".join(f"{name} {version}" for name, version in run.numerics["packages"].items())
    flags = [flag for flag in flags_here() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
    cpu = f"{facts.of_process(())['cpu']} ({', '.join(flags)})"
    lines = [
        ABOVE,
        "",
        f"Made by `make bench` on {platform.system()} {platform.machine()}, {cpu}, {run.numerics['threads']} threads, {run.numerics['dtype']}, {time.strftime('%Y-%m-%d')}. {packages}.",
        "One session on a shared machine: read the ratios, not the seconds. Generation: one engine answers in turns; medians of five turns, of two with",
        "vLLM's sampler.",
        "",
        *table([{"what": what, "measured": figure} for what, figure in rows]),
        "Rounds of the quickstart run, seconds:",
        "",
        *table(idle),
        "The quickstart, with start-up and the base, and the same by hand: for each round a fresh vLLM process (eager or compiled with a warm cache,",
        "whichever is faster) and a fresh TRL process (packed rows). By round length:",
        "",
        *table(lengths),
    ]
    opening, _, rest = PAGE.read_text().partition(ABOVE)
    PAGE.write_text(opening + "\n".join([*lines, BELOW]) + rest.partition(BELOW)[2])


if __name__ == "__main__":
    main()
