"""What every verb shares: a step's config *is* the step. No torch, ray, vllm or trl, and no path of a run, below here.

A verb says in its own file what it needs, what it adds, what it costs, which stage of a round it belongs to and which models it
names. Lint, plan, retention and the reports ask the step; none of them knows a verb by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Addition, Pool
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast
from selfkd.steps.outlook import Outlook
from selfkd.steps.question import Question

Stage = Literal["generate", "score", "train", "measure", "other"]
STAGES: tuple[Stage, ...] = ("generate", "score", "train", "measure")  # the columns of a report's seconds; the rest is "other"
Problem = tuple[str, str]


class Step(BaseModel):
    """One line of a recipe. `short` is the field that a bare value fills: `- score: reward/math.py:correct`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, strict=True, allow_inf_nan=False, str_min_length=1
    )
    verb: ClassVar[str]
    short: ClassVar[str | None] = None
    stage: ClassVar[Stage] = "other"
    outside: ClassVar[bool] = False  # True: tables are stored with the step but stay out of the pool (measure)
    later: ClassVar[frozenset[str]] = frozenset()  # fields that format 2 did not have at first
    copies: ClassVar[bool] = False  # True: its samples were made by other rounds (replay)
    per_round: ClassVar[frozenset[str]] = frozenset()  # texts that may be lists, one per round, as any number may

    name: str = Field(
        "", description="Unique name of the step; enters seeds, commits and overrides. Default: the verb, then verb-2, …"
    )

    def run(self, pool: Pool, context: Context) -> Addition:
        """Return what this step adds to `pool`: a pure function of the pool, its own fields, and what `context` answers."""
        raise NotImplementedError(f"verb '{self.verb}' lacks a run method")

    def words(self) -> dict[str, Any]:
        """Return its fields, every default spelled out; of later fields only those that were given, so that older runs go on."""
        unused = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", by_alias=True, exclude=unused)

    def identity(self) -> dict[str, Any]:
        """Return the fields that make this step this step."""
        return {"verb": self.verb, **self.words()}

    def generation(self) -> dict[str, Any]:
        """Return the part of its identity on which what a model generates here depends; answers are used again while it is the same."""
        return self.identity()

    # ---- what it names ----

    def functions(self) -> list[str]:
        """Return references `file.py:function` whose code belongs to the identity."""
        return []

    def losses(self) -> list[str]:
        """Return those of its functions that a trainer runs as a loss; the others are rewards."""
        return []

    def applied(self) -> list[str]:
        """Return those of its functions that are given whole tables."""
        return []

    def scores(self) -> list[str]:
        """Return the names of the scores that it gives."""
        return []

    def templates(self) -> list[str]:
        """Return references of templates whose text belongs to the identity."""
        return []

    def scorers(self) -> list[str]:
        """Return the models of others that it scores by, as a recipe names them; they belong to the identity."""
        return []

    def data(self) -> str:
        """Return the name under which the run keeps data that was read for this step when it was created; '' where there is none."""
        return ""

    def models(self) -> dict[str, ModelRef]:
        """Return {field: the model it names}."""
        return {}

    def may_lack(self) -> frozenset[str]:
        """Return those fields of `models` whose model may not be made yet: it runs without, and has less to say."""
        return frozenset()

    def question(self) -> Question | None:
        """Return how it asks a model about prompts, or about samples of them; None where it asks nobody."""
        return None

    def trained_role(self) -> str | None:
        """Return the role of which this step makes a new model, if it makes one."""
        return None

    def split_asked(self) -> str:
        """Return the split whose prompts it works on."""
        return "train"

    def scored_split(self) -> str | None:
        """Return the split whose answers its functions score; None where its functions are no rewards."""
        return None

    # ---- what it does, before it runs ----

    def problems(self) -> Iterator[Problem]:
        """Yield (field, what is wrong with it) of fields that are well typed; the field may be dotted: trl.learning_rate."""
        return iter(())

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        """Yield (field, what is missing) where the steps before it have not made what it needs; '' for the step as a whole."""
        return iter(())

    def doubts(self, seen: Outlook) -> Iterator[Problem]:
        """Yield (field, what is probably not meant) of what can run all the same; lint shows it as a note."""
        return iter(())

    def adds(self, seen: Outlook) -> None:
        """Note in `seen` what this step makes usable for the steps behind it."""

    def stand_in(self, seed: int) -> str:
        """Return an answer in the form that this step reads, for a walk without a model; '' where any text will do."""
        return ""

    def cost(self, forecast: Forecast) -> Cost:
        """Return an upper bound of what this step costs, and note in `forecast` what it leaves."""
        return Cost(self.name)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


TextList = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]  # a list, as a recipe writes it
Texts = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_tuple)]  # one that must not be empty


def several(field: str | Sequence[str] | None) -> list[str]:
    """Return the texts of a field that holds none, one or several."""
    return [] if field is None else [field] if isinstance(field, str) else list(field)
