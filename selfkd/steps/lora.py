"""What a recipe says of an adapter (LoRA): the mapping `lora` of the step train."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from selfkd.backend.base import LoraSpec
from selfkd.steps.step import Texts


class Lora(BaseModel):
    """Train an adapter, two thin matrices beside each layer (Hu et al. 2021, arXiv 2106.09685), and leave all weights as they are."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, strict=True, allow_inf_nan=False, str_min_length=1
    )

    r: int = Field(16, ge=1, description="Rank: how thin.")
    alpha: float | None = Field(None, gt=0, description="The change is alpha / r times the product of the two; default: 2r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of what enters the adapter that is left out at each step.")
    targets: Texts | None = Field(
        None,
        description="Names of layers that get one, such as [q_proj, v_proj]; default: every linear layer of the blocks (experts of a mixture are none).",
    )
    rslora: bool = Field(False, description="Divide by the root of r instead of r (arXiv 2312.03732), for large ranks.")
    serve: Literal["auto", "merged", "adapter"] = Field(
        "auto",
        description="How engines hold it: merged into the weights, or beside them (vLLM alone); auto: merged, but where rounding would lose over 2 % of it.",
    )

    quantise: Literal["nf4"] | None = Field(
        None,
        description="nf4: the weights beneath it, and those of a reference model, lie in 4 bits while it learns (QLoRA, arXiv 2305.14314). Engines serve it over the full weights, and how far the two lie apart is measured.",
    )

    @model_serializer(mode="wrap")
    def _words(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later where it is not used, so that older runs go on."""
        found: dict[str, Any] = plain(self)
        return {name: value for name, value in found.items() if name != "quantise" or value is not None}

    def spec(self, goes_on: bool) -> LoraSpec:
        alpha = 2.0 * self.r if self.alpha is None else float(self.alpha)
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("r", "dropout", "rslora", "serve")}
        return LoraSpec(alpha=alpha, targets=self.targets or (), goes_on=goes_on, quantise=self.quantise or "", **fields)
