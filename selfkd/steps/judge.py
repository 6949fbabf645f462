"""judge: ask a model what answers are worth. A judgment is a sample with parents; what it says is a score of the answer it is about.

Whoever judges sees what its template shows, and only what it writes is read. What cannot be read is no judgment: the score is null, and
says why. Canaries, answers that nobody should like, are judged beside the real ones and become nothing else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import polars as pl
from pydantic import BeforeValidator, Field

from selfkd.backend.base import REQUESTS, TOO_LONG, Sampling
from selfkd.backend.engine.sampling_options import check_length, check_vllm
from selfkd.core import digest, views
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Addition, Part, Pool, shape
from selfkd.errors import RewardError
from selfkd.steps import canaries, judged
from selfkd.steps.ask import Ask, Criterion, Judged, as_criterion, by_prompt, ring, texts_of
from selfkd.steps.context import Context, Render, Row
from selfkd.steps.forecast import Cost, Forecast, answers, pairs_of, times
from selfkd.steps.judged import Judgment, Orders, score_row
from selfkd.steps.outlook import Outlook
from selfkd.steps.parsers import PARSERS, Kind, Name, Parsed, Parser
from selfkd.steps.question import LONGER, Question
from selfkd.steps.score import may_fail, name_problem
from selfkd.steps.step import Problem, Stage, Step, TextList

SCORE_NAMES: dict[Kind, str] = {"mark": "mark", "verdict": "wins", "criterion": "met"}
# Fields that change no judgment of an answer; what is asked about canaries names itself.
READING = ("score", "canaries", "parse", "key", "lowest", "highest", "max_unparsed", "max_failed")
KEY = re.compile(r"[A-Za-z_][\w-]*")
CUT = "cut at max_tokens"
MOST_REASONS = 3  # why judgments could not be read, that one warning names
FEWER = "Their answers have fewer judgments, or none. Read some: selfkd show RUN --where \"stream = 'judgments'\""
WAYS_OUT = """Change the template or the parser, or raise max_tokens, and repeat the command with --amend: what a new parser can read is not asked again.
Or let more stay unread: raise max_failed of this step in the recipe, with --amend."""


class JudgeStep(Step):
    """Ask `model` for a mark of each live answer; with `criteria`, for a yes or no to each; with `pairwise`, which of two is better, in both orders.

    Judgments are samples of a stream that steps see only where they name it. Marks are scores of the answers: the mean over draws, the
    weighted mean over criteria that were answered, or the share of comparisons won.
    """

    verb: ClassVar[str] = "judge"
    short: ClassVar[str | None] = "template"
    per_round: ClassVar[frozenset[str]] = frozenset({"where", "model"})
    stage: ClassVar[Stage] = "generate"
    later: ClassVar[frozenset[str]] = frozenset({"told"})

    template: str = Field(
        description="What the judge sees in place of the last user message: a .j2 file or inline Jinja. It must show `of.text`, and `criterion` or `other.text` where there are such."
    )
    told: Literal["own"] = Field(
        "own",
        description="Write told: own where the template shows the prompt's gold answer: a judge that knows it is another judge.",
    )
    model: str = Field("policy", description="Who judges: role@when, such as policy, policy@base, policy@start.")
    of: str | None = Field(None, description="Judge answers of this stream; default: all live answers.")
    where: str | None = Field(None, description="Judge only answers for which this expression holds.")
    n: int = Field(1, ge=1, description="Judgments of each answer, criterion or order; the score is their mean.")
    lowest: float = Field(0.0, description="The lowest mark.")
    highest: float | None = Field(None, description="The highest mark; needed where marks are asked for.")
    criteria: dict[str, Annotated[Criterion, BeforeValidator(as_criterion)]] | None = Field(
        None,
        min_length=1,
        description="Questions that are answered by yes or no, {name: question} or {name: {ask: question, weight: 2}}: each is asked alone, as `criterion`; one without an answer counts neither way.",
    )
    pairwise: Orders | None = Field(
        None,
        description="Compare the answers of a prompt two by two, `of` shown before `other`, in both orders. agree: a verdict counts where both orders give it; average: each order counts; balance: a place that wins often counts less (Meta-Rewarding).",
    )
    pairs: int | None = Field(
        None, ge=1, description="Most comparisons per prompt, spread evenly over its answers; default: all with all (pairwise)."
    )
    parse: Name | None = Field(
        None,
        description="How a judgment is read. number: the last one in range (of 4/5 the 4); letter: [[A]], [[B]] or [[C]], a tie; word: yes or no, at the start or at the end; tag: <score>7</score>; json: a field of the last object. Default: number for marks, letter for pairs, word for criteria.",
    )
    key: str = Field("score", description="Name of the tag or JSON field.")
    system: str | None = Field(None, description="A system message for the judge.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy; vLLM takes at most 2.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: the smallest set of tokens with this much probability.")
    top_k: int = Field(0, ge=0, description="Keep only this many most likely tokens; 0 keeps all.")
    max_tokens: int = Field(256, ge=1, description="Longest judgment, in tokens; a cut one is not read.")
    stop: TextList = Field((), description="Strings that end a judgment; they are not part of it.")
    vllm: dict[str, Any] = Field({}, description="Other fields of vLLM's SamplingParams, passed through.")
    canaries: int = Field(
        3,
        ge=0,
        description="On so many prompts, answers that nobody should like are judged too: an empty one, a mere opener, one that tells the judge its verdict. One that gets as much as the median of real answers, or wins, is warned of by name; they become no score and no row.",
    )
    max_unparsed: float = Field(0.2, ge=0, le=1, description="Share of judgments that may be unreadable before a warning.")
    max_failed: float = Field(
        1.0, ge=0, le=1, description="Share of judgments that may be unreadable before the round stops; 1 never stops it."
    )
    score: str | None = Field(None, description="Name of the score; default: mark, met (criteria) or wins (pairwise).")
    as_: str = Field("judgments", alias="as", description="Name of the stream that the judgments form.")

    # ---- what its words mean ----

    @property
    def kind(self) -> Kind:
        return "verdict" if self.pairwise else "criterion" if self.criteria else "mark"

    @property
    def parser(self) -> Parser:
        name = self.parse or PARSERS[self.kind][0]
        highest = 1.0 if self.highest is None else self.highest
        return Parser(name, self.kind, self.key, self.lowest, highest)

    def generation(self) -> dict[str, Any]:
        """Return its identity without what only reads the answers: a mended parser reads those that are there."""
        return {name: value for name, value in self.identity().items() if name not in READING}

    def scores(self) -> list[str]:
        return [self.score or SCORE_NAMES[self.kind]]

    def templates(self) -> list[str]:
        return [self.template]

    def models(self) -> dict[str, ModelRef]:
        return {"model": ModelRef.parse(self.model)}

    def metrics(self) -> list[str]:
        """Return the names of what it says of itself every round."""
        of_kind = {"verdict": ["follows_order", "first_wins"], "mark": ["at_highest"], "criterion": []}[self.kind]
        probes = [f"canary_{kind}" for kind in canaries.KINDS] if self.canaries else []
        return [f"{self.name}/{name}" for name in ("unread", "length", *of_kind, *probes)]

    def question(self) -> Question | None:
        return self._wording()

    def _wording(self) -> Question:
        more = tuple(name for name in self._shows() if name != "of")
        return Question("train", self.template, self.system, self.max_tokens, about_samples=True, more=more)

    def _shows(self) -> dict[str, str]:
        """Return what the template must show, {name: what that is}."""
        if self.kind == "verdict":
            return {"of": "the answer that comes first", "other": "the answer that comes second"}
        return {"of": "the answer", **({"criterion": "the criterion"} if self.kind == "criterion" else {})}

    # ---- what it does, before it runs ----

    def problems(self) -> Iterator[Problem]:
        for name, value in self.vllm.items():
            yield from ((f"vllm.{name}", problem) for problem in check_vllm(name, value))
        yield from (("vllm.min_tokens", problem) for problem in check_length(self.vllm, self.max_tokens))
        if self.pairwise and self.criteria:
            yield "criteria", "criteria are of one answer, and pairwise compares two: write two judge steps"
        if self.pairs and not self.pairwise:
            yield "pairs", "there are pairs only where answers are compared: write pairwise: agree"
        yield from self._reading_problems()

    def _reading_problems(self) -> Iterator[Problem]:
        allowed = PARSERS[self.kind]
        what = {"mark": "a mark", "verdict": "a verdict on two answers", "criterion": "a yes or no"}[self.kind]
        if self.parse and self.parse not in allowed:
            yield "parse", f"'{self.parse}' does not read {what}: {', '.join(allowed)} do"
        if not KEY.fullmatch(self.key):
            yield "key", f"'{self.key}' is no name of a tag or field: write letters, digits, '_' and '-', a letter first"
        if self.kind != "mark" and (self.highest is not None or self.lowest != 0.0):
            yield "highest" if self.highest is not None else "lowest", f"only a mark has a range, and this asks for {what}"
        elif self.kind == "mark" and self.highest is None:
            yield "", "a mark needs its range: write highest, the best mark there is (and lowest, if that is not 0)"
        elif self.kind == "mark" and self.highest is not None and self.highest <= self.lowest:
            yield "highest", f"no mark is above {self.lowest:g} and at most {self.highest:g}: raise highest"

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        if problem := seen.stream_problem(self.of, needs_samples=True):
            yield "of", problem
        if self.as_ in seen.streams:
            yield "as", f"the stream '{self.as_}' holds answers, and judgments are kept apart from them: name it otherwise (as)"
        [name], origin = self.scores(), self._origin()
        if problem := name_problem(name):
            yield "score", f"{problem} (score)"
        for said in seen.taken({name: origin}):
            yield "score", f"{said}: give this one another name (score)"
        if problem := seen.room_problem(self.max_tokens):
            yield "max_tokens", problem

    def _origin(self) -> str:
        asked = " ".join(self.template.split())[:60]
        return f"judge {self.models()['model']} by '{asked}'" + (f", {self.pairwise}" if self.pairwise else "")

    def doubts(self, seen: Outlook) -> Iterator[Problem]:
        if self.pairwise and seen.most_answers(self.of) == 1:
            yield "pairwise", "each prompt has one answer here, so nothing is compared: raise n of the sample step"
        if self.n > 1 and self.temperature == 0:
            yield "n", f"at temperature 0 all {self.n} judgments of an answer are the same one"

    def adds(self, seen: Outlook) -> None:
        seen.add_scores({self.scores()[0]: self._origin()})
        seen.add_aside([self.as_])
        seen.compared += self.scores() if self.pairwise else []
        seen.metrics |= dict.fromkeys(self.metrics(), self.name)

    def cost(self, forecast: Forecast) -> Cost:
        each = self.n * len(self.criteria or "1")
        about = forecast.samples(self.of)
        if self.pairwise:
            about = times(pairs_of(forecast.prompts, about, self.pairs), 2)
        asked = times(about, each)
        probed = self.canaries * len(canaries.KINDS) * (2 if self.pairwise else len(self.criteria or "1"))
        whole = None if asked is None else asked + (probed if asked else 0)
        forecast.aside[self.as_] = asked
        return answers(self.name, whole, self.max_tokens)

    def stand_in(self, seed: int) -> str:
        parser = self.parser
        if self.kind == "mark":
            return parser.written(parser.lowest + round((parser.highest - parser.lowest) * (seed % 5) / 4, 3))
        return parser.written(float(seed % 2))

    # ---- what it does ----

    def run(self, pool: Pool, context: Context) -> Addition:
        found = self._answers(pool, context)
        render = context.template("template", self.template, (*found.columns, *views.SHOWN), self._shows())
        prompts, groups, known = self._prompts(found, pool), by_prompt(found), self._known(pool)
        asks = [ask for name, rows in groups.items() for ask in self._asks(prompts[name], rows, known, context)]
        probes = [ask for name in self._probed(asks, context) for ask in self._probes(prompts[name], groups[name][0], context)]
        real = self._judged(asks, self.as_, render, context)
        probed = self._judged(probes, self._probe_stream, render, context) if probes else Judged((), (), (), {})
        warnings = list(self._unread(real.judgments, context))
        scores = self._scores(real.judgments)
        told, liked = self._believed(real.judgments, probed, judged.reduced(scores), found, context)
        return self._addition(real, probed, scores, told, [*warnings, *liked], context)

    def _addition(
        self, real: Judged, probed: Judged, scores: list[Row], told: Row, warnings: list[str], context: Context
    ) -> Addition:
        for warning in warnings:
            context.say(warning)
        own = [score_row(one.id, self.scores()[0], one.value, one.why) for one in real.judgments]
        tables: dict[str, list[Part]] = {
            "samples": [*real.files, *probed.files],
            "scores": [shape("scores", [*scores, *own])],
            "drops": [shape("drops", self._drops(real, probed))],
        }
        metrics = {f"{self.name}/{name}": value for name, value in told.items()}
        return Addition(tables, metrics=metrics, notes={"warnings": warnings} if warnings else {})

    @property
    def _probe_stream(self) -> str:
        """Return the stream of judgments on canaries, which no step can name."""
        return f"{self.as_}-canaries"

    def _answers(self, pool: Pool, context: Context) -> pl.DataFrame:
        """Return the answers to judge, with their texts: all of them where they are compared, else those without the score."""
        found = views.sample_view(pool, self.of, self.where)
        if self.where:
            found = found.filter(context.expression("where", self.where, found, "condition"))
        if not self.pairwise:
            done = pool.scores.filter(pl.col("name") == self.scores()[0]).select(id="sample")
            found = found.join(done, on="id", how="anti", maintain_order="left")
        return views.with_shown(found, pool, context.sample_fields(self.template))

    def _prompts(self, found: pl.DataFrame, pool: Pool) -> dict[str, Row]:
        asked = views.live_prompts(pool).join(found.select(id="prompt").unique(), on="id", how="semi")
        return {row["id"]: row for row in views.with_heavy(asked, pool, ["messages", "meta"], "prompts").iter_rows(named=True)}

    def _known(self, pool: Pool) -> set[tuple[str, str]]:
        """Return the comparisons that were made already."""
        if not self.pairwise:
            return set()
        rows = pool.scores.filter((pl.col("name") == self.scores()[0]) & pl.col("versus").is_not_null())
        return set(rows.select("sample", "versus").iter_rows())

    # ---- what is asked ----

    def _asks(self, prompt: Row, rows: Sequence[Row], known: set[tuple[str, str]], context: Context) -> Iterator[Ask]:
        if not self.pairwise:
            for row in rows:
                yield from self._of_one(prompt, row, self.n, context)
        for one, other in ring(rows, self.pairs) if self.pairwise else ():
            if (one["id"], other["id"]) not in known:
                for draw in range(self.n):
                    yield self._ask(prompt, (one, other), draw, context)
                    yield self._ask(prompt, (other, one), draw, context)

    def _of_one(self, prompt: Row, row: Row, draws: int, context: Context, canary: str = "") -> Iterator[Ask]:
        names = list(self.criteria) if self.criteria else [""]
        for draw in range(draws):
            for at, name in enumerate(names):
                yield self._ask(prompt, (row,), draw * len(names) + at, context, name, canary)

    def _ask(
        self, prompt: Row, shown: tuple[Row, ...], number: int, context: Context, criterion: str = "", canary: str = ""
    ) -> Ask:
        key = (context.index, self.name, prompt["id"], [row["id"] for row in shown], number, canary)
        return Ask(digest.of("judge", *key)[:16], prompt, shown, number, criterion, canary)

    def _probed(self, asks: Sequence[Ask], context: Context) -> list[str]:
        """Return the prompts that get canaries: drawn by hash among those whose answers are judged."""
        names = {ask.prompt["id"] for ask in asks}
        return sorted(names, key=lambda name: (digest.uniform(context.seed("canary"), name), name))[: self.canaries]

    def _probes(self, prompt: Row, row: Row, context: Context) -> Iterator[Ask]:
        """Yield requests about canaries, each in the place of `row`, or compared with it."""
        parser = self.parser
        for kind in canaries.KINDS:
            if not self.pairwise:
                text = canaries.text_of(kind, parser.written(parser.highest), self.highest)
                yield from self._of_one(prompt, canaries.instead(row, text), 1, context, kind)
                continue
            for place, wins in enumerate((1.0, 0.0)):
                false = canaries.instead(row, canaries.text_of(kind, parser.written(wins), None))
                yield self._ask(prompt, (row, false) if place else (false, row), 0, context, canary=kind)

    def _judged(self, asks: Sequence[Ask], stream: str, render: Render, context: Context) -> Judged:
        sampling = Sampling(self.temperature, self.top_p, self.top_k, self.max_tokens, self.stop, self.vllm)
        model, requests = context.model(self.models()["model"]), self._requests(asks, render, context)
        files = context.generate(model, requests, sampling, stream, about_samples=True)
        answered = texts_of(files)
        read = [ask.read(self._parsed(*answered[ask.id])) for ask in asks if ask.id in answered]
        return Judged(files, asks, read, {name: finished for name, (_, finished) in answered.items()})

    def _requests(self, asks: Sequence[Ask], render: Render, context: Context) -> pl.DataFrame:
        """The sorted request list: seeded by names only (round, step, prompt, what is shown, number)."""
        rows = [self._request(ask, render, context) for ask in asks]
        return pl.DataFrame(rows, schema={**REQUESTS, "aside": pl.Boolean}).sort("prompt", "parents", "number", "id")

    def _request(self, ask: Ask, render: Render, context: Context) -> dict[str, Any]:
        more: dict[str, Any] = {"other": ask.shown[1]} if len(ask.shown) > 1 else {}
        if self.criteria:
            more = {"criterion": self.criteria[ask.criterion].ask}
        return {
            "id": ask.id,
            "prompt": ask.prompt["id"],
            "number": ask.number,
            "parents": ask.parents,
            "seed": context.seed("judge", ask.id),
            "tiebreak": digest.uniform(context.seed("tie"), ask.id),
            "teacher_messages": self._wording().messages(ask.prompt, render, ask.shown[0], **more),
            "aside": True,
        }

    # ---- what comes back ----

    def _parsed(self, text: str, finished: str) -> Parsed:
        if finished == TOO_LONG:
            return None, LONGER
        return self.parser.read(text) if finished == "stop" else (None, CUT)

    def _scores(self, judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
        """Return the score rows of the answers that were judged."""
        name = self.scores()[0]
        if self.pairwise:
            return judged.of_verdicts(judgments, name, self.pairwise)
        return [
            score_row(one.shown[0], name, one.value, _why(one), one.number, self._weight(one.criterion)) for one in judgments
        ]

    def _weight(self, criterion: str) -> float:
        return self.criteria[criterion].weight if self.criteria else 1.0

    def _unread(self, judgments: Sequence[Judgment], context: Context) -> Iterator[str]:
        """Yield a warning where too many judgments could not be read; raise RewardError where the recipe wants to stop there."""
        whys = Counter(one.why for one in judgments if one.value is None)
        share = whys.total() / max(1, len(judgments))
        said = f"{whys.total()} of {len(judgments)} judgments ({share:.1%}) could not be read"
        most = ", ".join(f"{why} ({count})" for why, count in whys.most_common(MOST_REASONS))
        if whys.total() > may_fail(self.max_failed, len(judgments)):
            raise RewardError(f"{said}, limit {self.max_failed:.0%}: {most}", context.where, WAYS_OUT)
        if whys.total() > may_fail(self.max_unparsed, len(judgments)):
            yield f"{context.where}: {said}, more than {self.max_unparsed:.0%}: {most}. {FEWER}"

    def _believed(
        self, judgments: Sequence[Judgment], probes: Judged, values: Mapping[str, float], found: pl.DataFrame, context: Context
    ) -> tuple[Row, list[str]]:
        """Return how far this judge can be believed, and warnings: what it could not say, what its verdicts go along with, canaries."""
        chars, prompts = (dict(found.select("id", column).iter_rows()) for column in ("chars", "prompt"))
        told: Row = {
            "unread": judged.share(one.value is None for one in judgments),
            "length": judged.with_length(values, chars, prompts),
        }
        if self.kind == "verdict":
            told |= judged.of_order(judgments)
        elif self.kind == "mark":
            told["at_highest"] = judged.share(one.value == self.highest for one in judgments if one.value is not None)
        of_canaries, liked = self._canaries(probes, values, found, context) if self.canaries else ({}, [])
        return told | of_canaries, liked

    def _canaries(
        self, probes: Judged, values: Mapping[str, float], found: pl.DataFrame, context: Context
    ) -> tuple[dict[str, Any], list[str]]:
        """Return what each kind of canary got, and a warning for each that got as much as the median of real answers, or won."""
        probed = sorted({one.prompt for one in probes.judgments})
        beside = found.filter(pl.col("prompt").is_in(probed))["id"]
        bar = 0.5 if self.pairwise else judged.median(values[name] for name in beside if name in values)
        weights = {name: one.weight for name, one in (self.criteria or {}).items()}
        of_kind = {kind: [one for one in probes.judgments if probes.kinds[one.id] == kind] for kind in canaries.KINDS}
        told = {kind: canaries.got(some, weights, self.pairwise == "agree") for kind, some in of_kind.items()}
        warned = (canaries.liked(kind, value, bar, bool(self.pairwise)) for kind, value in told.items())
        return {f"canary_{kind}": value for kind, value in told.items()}, [f"{context.where}: {one}" for one in warned if one]

    def _drops(self, real: Judged, probes: Judged) -> list[dict[str, str]]:
        """Return a drop for each judgment that is of no use: those never asked, and all of canaries."""
        gone = {one.id: LONGER for one in real.judgments if real.finished[one.id] == TOO_LONG}
        rows = [(name, self.as_, reason) for name, reason in gone.items()]
        rows += [(one.id, self._probe_stream, canaries.reason(probes.kinds[one.id], one)) for one in probes.judgments]
        return [{"id": name, "stream": stream, "step": self.name, "reason": reason} for name, stream, reason in sorted(rows)]


def _why(one: Judgment) -> str:
    return ": ".join(part for part in (one.criterion, one.why) if part)
