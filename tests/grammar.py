"""Random recipes: drawn from the grammar of verbs and fields, most of them sound, some wild; and random values for any field.

What a drawn recipe means is not known here. The tests say what must hold of each: refused with a place, or walked to one digest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NUMBER = "reward/number.py:last_number"
REWARDS = {
    "last_number": NUMBER,
    "contains": "reward/exact.py:contains",
    "majority": "reward/vote.py:majority",
    "even": "marks.py:even",
    "sure": "marks.py:sure",
}
WILD_REWARDS = ("marks.py:number", "reward/exact.py:match", "marks.py:missing", "marks.py", "nowhere.py:f", "marks.py:asks")
MARKS = """
def even(completion: str) -> float:
    return float(len(completion) % 2 == 0)

def sure(completion: str, answer: str):
    return None if "3" in completion else float(answer in completion)

def number(completion: str) -> float:
    return 0.5

def asks(completion: str, wrong: str) -> float:
    return 1.0
"""
STREAMS = ("sample", "second", "gold", "replayed")
TEMPLATES = (
    "{{ prompt }} Think.",
    "{{ prompt.text }} ({{ prompt.level }})",
    "--- user\n1 + 1\n--- assistant\n2\n--- user\n{{ prompt }}",
    "{% if prompt.answer %}{{ prompt.text }} It is {{ prompt.answer }}.{% endif %}",
)
WILD_TEMPLATES = (
    "{{ prompt.levle }}",
    "{{ of.text }}",
    "{{ group }}",
    "{{ prompt.text + 1 }}",
    "Think hard.",
    "{{",
    "missing.j2",
)
WILD_EXPRESSIONS = (
    "text",
    "tokens",
    "stream = 1",
    "last_number",
    "answer = 1",
    "tokens = 1 chars",
    "tokens /",
    "nothing > 1",
    "1",
    "n > 1",
    "''",
)


class Draws:
    """What the lines drawn so far have made, and drawing what fits to it: now and then something wild instead."""

    def __init__(self, draw: st.DrawFn, wildness: int) -> None:
        self.draw, self.wildness = draw, wildness
        self.streams: list[str] = []
        self.scores: list[str] = []
        self.rows: list[str] = []

    def one(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def wild(self) -> bool:
        return bool(self.draw(st.integers(0, 99)) < self.wildness)

    def chance(self, percent: int) -> bool:
        return bool(self.draw(st.integers(0, 99)) < percent)

    def some(self, **fields: Any) -> dict[str, Any]:
        """Some of the fields; each is a function that draws its value."""
        return {name.rstrip("_"): value() for name, value in fields.items() if self.chance(30)}

    # ---- words ----

    def stream(self) -> str:
        return self.one(*STREAMS) if self.wild() or not self.streams else self.one(*self.streams)

    def number(self, table: str) -> str:
        """A column of numbers."""
        scores = (
            [f"{score}_{stat}" for score in self.scores for stat in ("max", "mean", "n")] if table == "prompts" else self.scores
        )
        return self.one(*scores, *(("n",) if table == "prompts" else ("tokens", "chars", "tiebreak", "number")))

    def condition(self, table: str = "samples") -> str:
        if self.wild():
            return self.one(*WILD_EXPRESSIONS)
        first, second = self.number(table), self.number(table)
        usual = [
            f"{first} > 0",
            f"{first} = 1",
            f"{first} <> {second}",
            f"{first} >= 1 OR {second} < 1",
            f"{first} IS NOT NULL",
            f"{first} < 40",
        ]
        if table == "samples":
            usual += [
                "finish_reason = 'stop'",
                "text <> ''",
                f"{first} = MAX({first}) OVER (PARTITION BY prompt)",
                "stream = 'sample'",
            ]
        return self.one(*usual)

    def value(self) -> str:
        return (
            self.one(*WILD_EXPRESSIONS)
            if self.wild()
            else self.one(self.number("samples"), f"{self.number('samples')} * 2", "LENGTH(text)")
        )

    def template(self) -> str:
        return self.one(*WILD_TEMPLATES) if self.wild() else self.one(*TEMPLATES)

    def reward(self) -> Any:
        if self.wild():
            return self.one(*WILD_REWARDS, [], [NUMBER, NUMBER])
        return self.one(*REWARDS.values()) if self.chance(70) else [NUMBER, REWARDS["even"]]

    def named(self, reward: Any) -> list[str]:
        return [one.rpartition(":")[2] for one in ([reward] if isinstance(reward, str) else reward)]

    def model(self) -> str:
        usual = ("policy", "policy@base", "policy@start", "policy@warm")
        return self.one("policy@best", "policy@round-1", "other", "policy@never") if self.wild() else self.one(*usual)

    def when(self) -> str:
        return self.one("best", "round-1", "round-7", "never") if self.wild() else self.one("now", "base", "start", "warm")

    # ---- steps ----

    def sample(self) -> dict[str, Any]:
        words = self.some(
            n=lambda: self.one(1, 2, 3, [1, 2]),
            temperature=lambda: self.one(0.0, 0.7, 1),
            max_tokens=lambda: self.one(16, 64),
            template=self.template,
            system=lambda: "Be brief.",
            model=self.model,
            stop=lambda: self.one(["\n"], ["A", "e"]),
        )
        if self.streams and self.chance(25):
            words |= {
                "of": self.stream(),
                "template": self.one("{{ prompt }} Was it {{ of.text }}?", "{{ of.text }} {{ of.tokens }}"),
            }
        if self.chance(30):
            words["where"] = self.condition("samples" if "of" in words else "prompts")
        words |= {"as": self.one(*STREAMS)} if self.chance(25) else {}
        self.streams.append(words.get("as", "sample"))
        return {"sample": words}

    def score(self) -> dict[str, Any]:
        if self.chance(15):
            self.scores.append("logprob_of")
            return {"score": {"logprob": self.model()}}
        words = {"reward": self.reward(), **self.some(of=self.stream)}
        if self.chance(15) and isinstance(words["reward"], str):
            words["as"] = self.one("mark", "number") if self.wild() else "mark"
        self.scores += [words["as"]] if "as" in words else self.named(words["reward"])
        return {"score": words}

    def judge(self) -> dict[str, Any]:
        """Marks, criteria or pairs; the fake's answers hold numbers, so that some marks are read and no letter or word is."""
        more = self.some(
            n=lambda: 2,
            of=self.stream,
            where=self.condition,
            model=self.model,
            canaries=lambda: self.one(0, 1),
            max_tokens=lambda: self.one(8, 64),
            as_=lambda: self.one("judgments", "other", *STREAMS[:1]) if self.wild() else "judgments",
        )
        kind = self.one("mark", "mark", "wins", "met")
        self.scores.append(kind)
        self.streams += ["judgments"] if self.chance(20) else []
        if kind == "mark":
            highest = self.one(5, 100, 10**6, 0) if self.wild() else self.one(100, 10**6)
            return {"judge": {"template": self.one("{{ prompt }} {{ of.text }}", "{{ of.text }}"), "highest": highest, **more}}
        if kind == "wins":
            orders = self.one("agree", "average", "balance")
            return {
                "judge": {
                    "template": "{{ of.text }} or {{ other.text }}",
                    "pairwise": orders,
                    **more,
                    **self.some(pairs=lambda: 2),
                }
            }
        return {
            "judge": {"template": "{{ criterion }} {{ of.text }}", "criteria": {"brief": "Brief?", "right": "Right?"}, **more}
        }

    def select(self) -> dict[str, Any]:
        if self.chance(15):
            return {
                "select": {"of": "prompts", **self.some(where=lambda: self.condition("prompts"), limit=lambda: self.one(1, 3))}
            }
        fields: dict[str, Any] = dict(
            where=self.condition, of=self.stream, dedup=lambda: self.one("text", "chars"), by=self.value
        )
        return {"select": self.some(**fields, per_prompt=lambda: self.one(1, 2), limit=lambda: self.one(3, 9))}

    def gold(self) -> dict[str, Any]:
        self.streams.append("gold")
        return {
            "gold": self.some(
                text=lambda: self.one(
                    "Answer: {{ prompt.answer }}", "{{ prompt.wrong }}" if self.wild() else "It is {{ prompt.answer }}"
                )
            )
        }

    def replay(self) -> dict[str, Any]:
        return {"replay": self.some(rounds=lambda: self.one(1, 2), kept=lambda: self.one(True, False), as_=lambda: "replayed")}

    def build(self) -> dict[str, Any]:
        self.rows = ["sft"]
        if self.chance(50):
            return {
                "build": {
                    "kind": "sft",
                    **self.some(of=self.stream, where=self.condition, weight=self.value, view=self.template),
                }
            }
        self.rows = ["pair"]
        pair = self.one(
            "chosen_tokens <> rejected_tokens",
            "chosen_text <> rejected_text",
            "chosen_tiebreak > rejected_tiebreak",
            "chosen_id" if self.wild() else "1 = 1",
        )
        more = self.some(
            by=self.value, per_prompt=lambda: self.one(1, 3), match=lambda: self.one("cycle", "product"), where=lambda: pair
        )
        return {"build": {"kind": "pair", "chosen": self.side(), "rejected": self.side(), **more}}

    def side(self) -> str:
        return self.stream() if self.chance(40) else self.condition()

    def train(self) -> dict[str, Any]:
        kinds = {"sft": "sft", "pair": "dpo"}
        loss = self.one("sft", "dpo") if self.wild() else kinds[self.rows[-1]] if self.rows else "sft"
        more = self.some(from_=self.when) | (self.some(reference=self.when, beta=lambda: 0.5) if loss == "dpo" else {})
        return {"train": {"loss": loss, **more}}

    def measure(self, first: bool = False) -> dict[str, Any]:
        more = self.some(n=lambda: 2, template=lambda: self.one(*TEMPLATES), limit=lambda: 2, max_tokens=lambda: 32)
        return {"measure": {"reward": NUMBER if first else self.reward(), **more}}

    def any_step(self) -> dict[str, Any]:
        step: dict[str, Any] = self.one(
            self.sample, self.score, self.judge, self.select, self.gold, self.replay, self.build, self.train, self.measure
        )()
        return step

    def line(self) -> list[dict[str, Any]]:
        """Asked, scored, selected, built, trained, measured; one or the other left out, and now and then any step between."""
        found = [self.replay()] if self.chance(15) else []
        found += [self.gold()] if self.chance(20) else []
        for share, step in (
            (100, self.sample),
            (80, self.score),
            (20, self.judge),
            (60, self.select),
            (50, self.build),
            (80, self.train),
        ):
            found += [self.any_step()] if self.chance(8) else []
            found += [step()] if self.chance(share) else []
        return [*found, self.measure(first=not self.wild())]


def declared(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step that says that it is meant where its template shows the gold answer."""
    ((verb, words),) = step.items()
    shown = verb != "gold" and "prompt.answer" in str(words)
    return {verb: {**words, "told": "own"}} if shown else step


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Return a recipe as YAML would hold it."""
    draws = Draws(draw, wildness=draw(st.sampled_from([0, 0, 0, 4, 20])))
    steps = [declared(step) for step in draws.line()]
    more = draws.some(
        seed=lambda: draws.one(1, 2),
        chunk=lambda: draws.one(1, 3, 9),
        before=lambda: [{"gold": {}}, {"train": {"loss": "sft"}}],
        after=lambda: [draws.any_step()] if draws.wild() else [{"sample": {"as": "last"}}],
        best=lambda: {"metric": draws.one("test/last_number", "dev/x") if draws.wild() else "dev/last_number"},
        keep_if=lambda: (
            draws.one("dev_chars", "dev_x > 1")
            if draws.wild()
            else draws.one("dev_last_number >= prev_dev_last_number", "dev_tokens > 3")
        ),
        stop=lambda: {"patience": 1, "metric": "dev/last_number"} if draws.chance(60) else {"tokens": draws.one(100, 900)},
        keep=lambda: draws.some(
            last=lambda: draws.one(0, 1, 2), best=lambda: draws.one(True, False), base=lambda: draws.one(True, False)
        ),
        exact=lambda: draws.one(True, False),
    )
    prompts: dict[str, Any] = {"train": "train.jsonl", "dev": "dev.jsonl"}
    prompts |= draws.some(take=lambda: draws.one(1, 3), test=lambda: "dev.jsonl" if draws.wild() else "test.jsonl")
    return {"model": "fake", "rounds": draws.one(1, 2, 3), "prompts": prompts, "steps": steps, **more}


# ---- any value in any field ----

TEXTS = (
    "",
    " ",
    "no",
    "1e-5",
    "010",
    "3",
    "a.py:f",
    "{{ x }}",
    "{0}",
    "dev/chars",
    "../..",
    "\ud83d",
    "\0",
    "x" * 300,
    "policy@round-1",
)
ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 3),
        st.sampled_from([10**30, -1.5, 0.0, 1e-5, float("inf"), float("nan")]),
        st.sampled_from(TEXTS),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["a", "metric", "file", "path", "1"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def write_files(folder: Path) -> None:
    """What the recipes name: prompts of three splits and a file of rewards."""
    for name, first, count in (("train", 10, 4), ("dev", 60, 3), ("test", 90, 2)):
        rows = (
            f'{{"question": "What is {n} + {n}?", "answer": "{2 * n}", "level": {n}}}\n' for n in range(first, first + count)
        )
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "marks.py").write_text(MARKS)
