"""What a recipe says of the distance from a teacher: the mapping `divergence` of the step train."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from selfkd.backend.base import DivergenceSpec

LIVE = "live"  # in the place of a teacher's name: the model that learns, as it is at each step


def kind_alone(given: Any) -> Any:
    """A bare word is the kind: `divergence: reverse`."""
    return {"kind": given} if isinstance(given, str) else given


class Divergence(BaseModel):
    """How far the student's next-token distribution is from its teacher's at each token, over the whole vocabulary (Agarwal et al. 2023, arXiv 2306.13649)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, strict=True, allow_inf_nan=False, str_min_length=1
    )

    kind: Literal["forward", "reverse", "jsd"] = Field(
        "forward",
        description="forward: KL(teacher, student), which covers what the teacher may say, and bears completions that are not the newest model's; "
        "reverse: KL(student, teacher), which leaves out what it would not; jsd: between the two, by `beta`.",
    )
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="beta * KL(teacher, m) + (1 - beta) * KL(student, m), with m = beta * teacher + (1 - beta) * student (jsd). "
        "Divided by beta, near 0 it is forward KL; divided by 1 - beta, near 1 it is reverse KL.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Both logits are divided by it; the loss is not multiplied with its square."
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Only the teacher's so many likeliest tokens, and all others as one bucket; 0: the whole vocabulary.",
    )
    clip: float = Field(0.0, ge=0, description="The most that one token counts, above which it teaches nothing; 0: no limit.")
    clip_entry: float = Field(
        0.0,
        ge=0,
        description="The most that one entry of the vocabulary adds at one token (the clip of OPSD's code); 0: no limit.",
    )
    skip: int = Field(0, ge=0, description="So many tokens at the beginning of each completion do not count.")
    first: int = Field(0, ge=0, description="Read only so many tokens of each completion, which costs less; 0: all.")

    @model_validator(mode="after")
    def _fits(self) -> Divergence:
        if self.beta != type(self).model_fields["beta"].default and self.kind != "jsd":
            raise ValueError(f"'beta' is for kind: jsd, and this is {self.kind}")
        if self.first and self.skip >= self.first:
            raise ValueError(f"no token would count: of the first {self.first} the first {self.skip} are skipped")
        return self

    def spec(self) -> DivergenceSpec:
        return DivergenceSpec(**{name: getattr(self, name) for name in type(self).model_fields})
