"""`make bench`: every benchmark once, on an otherwise idle machine, into docs/benchmarks.md. Takes about 25 minutes on two cores.

Nothing here is a test. A quickstart run is made first (or a finished one is named: `python benchmarks/run.py runs/quickstart`), and
everything else is measured on its model.
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

from selfkd.chain.run import Run

HERE = Path(__file__).parent


def program(name: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, str(HERE / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def quickstart() -> Path:
    folder = Path("runs/bench")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "selfkd", "run", "quickstart", "--name", "bench"], check=True)
    return folder


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
        for split in ("train", "dev"):
            (folder / f"{split}.json").write_text(json.dumps(_rows(run, split)))
        same = (str(run.numerics["threads"]), run.numerics["dtype"])
        found: dict[str, Any] = program("loop_by_hand.py", str(folder), model, *same)
    return found


def _rows(run: Run, split: str) -> list[dict[str, Any]]:
    from selfkd.prompts import templates

    template = templates.load("templates/sum_examples.j2", run.recipe.folders)
    rows = []
    for row in run.split(split).scan("prompts").collect().iter_rows(named=True):
        seen = templates.visible_prompt(row["messages"], row["answer"], {})
        asked = (
            templates.with_last_message(row["messages"], template.render(prompt=seen)) if split == "train" else row["messages"]
        )
        rows.append({"answer": row["answer"], "seen": row["messages"], "teacher_messages": asked})
    return rows


def generation_rows(speed: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """One row per number format and comparison: both speeds and their ratio."""
    compared = {
        ("local", "plain"): "local backend / plain LLM.generate with our sampler (target 0.97)",
        ("local", "vllm"): "local backend / plain LLM.generate, seeded, with vLLM's sampler",
        ("local", "unseeded"): "local backend / plain LLM.generate, unseeded, with vLLM's sampler (target 1.0)",
        ("ray", "plain"): "Ray backend / plain LLM.generate with our sampler (target 0.97)",
    }
    return [
        (f"Generation, {dtype}: {words}", f"{found[ours]} / {found[theirs]} tok/s; ratio {found[f'{ours}/{theirs}']}")
        for dtype, found in speed.items()
        for (ours, theirs), words in compared.items()
    ]


def lint_seconds(recipe: str) -> float:
    def once() -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "selfkd", "lint", recipe], capture_output=True, check=True)
        return time.monotonic() - began

    return round(statistics.median(once() for _ in range(7)), 2)


def main() -> None:
    run = Run.at(Path(sys.argv[1]) if len(sys.argv) > 1 else quickstart())
    whole, folder = seconds_of(run), str(run.folder)
    idle = program("idle.py", folder)
    rows: list[tuple[str, str]] = [("Three quickstart rounds, with start-up and the base", f"{whole:.0f} s")]
    hand = by_hand(run)
    rows.append(
        (
            "The same by hand: a fresh vLLM and a fresh TRL process per round",
            f"{hand['seconds']:.0f} s; ratio {hand['seconds'] / whole:.2f}",
        )
    )
    swaps = [entry["swap and proof"] for entry in idle]
    rows.append(
        ("Weight swap with proof, SmolLM2-135M (target 2 s)", f"{statistics.median(swaps):.2f} s, median of {len(swaps)}")
    )
    for what in ("to first optimiser step", "to first token"):
        rows.append((f"Engine idle {what}", f"{statistics.median(entry[what] for entry in idle):.1f} s"))
    rows.append(("A round beyond generate, train, score, measure (target 5 %)", ", ".join(entry["beyond"] for entry in idle)))
    rows += generation_rows(program("generation.py", folder))
    million = program("million.py")
    steps = " + ".join(f"{name} {million[name]}" for name in ("score", "select", "build", "seal and the rest"))
    total = sum(million[name] for name in ("score", "select", "build", "seal and the rest"))
    rows.append(
        (
            "One million samples: score, select, build, seal (target 60 s, 4 GiB)",
            f"{total:.0f} s ({steps}), {million['peak_gib']} GiB",
        )
    )
    for told in program("training.py"):
        what = (
            f"Training step without optimiser against its matrix products, {told['precision']}, {told['kernels']} (target 0.8)"
        )
        rows.append((what, f"{told['bound']} / ({told['step']} - {told['optimiser']}) s = {told['ratio']}"))
    rows.append(("`selfkd lint star`, cold, median of 7 (target 1 s)", f"{lint_seconds('star')} s"))
    rows.append(("`selfkd lint quickstart`, cold, median of 7", f"{lint_seconds('quickstart')} s"))
    write(run, rows, idle, hand)


def write(run: Run, rows: list[tuple[str, str]], idle: Any, hand: Any) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in run.numerics["packages"].items())
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench` on {platform.system()} {platform.machine()}, {run.numerics['threads']} threads, {time.strftime('%Y-%m-%d')}. {packages}.",
        "One session on a shared machine: read the ratios, not the seconds. Generation: one engine answers in turns, medians of three; the ratios of the",
        "local backend are of processor time.",
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in rows),
        "",
        "Rounds of the quickstart run, seconds:",
        "",
        "| " + " | ".join(idle[0]) + " |",
        "|" + "---|" * len(idle[0]),
        *("| " + " | ".join(str(value) for value in entry.values()) + " |" for entry in idle),
        "",
        f"By hand: {json.dumps(hand['parts'])} s, accuracy {hand['accuracy']}.",
    ]
    (HERE.parent / "docs" / "benchmarks.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
