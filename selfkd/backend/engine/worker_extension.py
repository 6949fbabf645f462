"""What vLLM mixes into its worker, which holds the weights: loading a folder in place, the sampler of a run, and facts.

Knows one worker, not the engine around it. Everything here is called by name, through `collective_rpc`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfkd.backend.adapters import Weights
from selfkd.backend.engine import inverse_cdf, kernels
from selfkd.backend.facts import of_engine
from selfkd.backend.model_files import config_of, said_of_text

EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEAD = "lm_head.weight"
# Modules around weights, of experts and of adapters: vLLM tells of what it filled there without this part of the name.
WRAPPERS = (".routed_experts", ".base_layer")


class WorkerExtension:
    """Methods of vLLM's worker beside its own. None may be named like one of those."""

    model_runner: Any
    reload_weights: Any

    def selfkd_reload(self, folder: str, base: str | None = None) -> list[str]:
        """Load a folder, tied or not, an adapter merged into its `base`; return the engine's parameters that it did not fill, about which vLLM itself only warns."""
        model = self.model_runner.get_model()
        wanted, filled = {name for name, _ in model.named_parameters()}, set()
        load = model.load_weights

        def loading(weights: Iterator[tuple[str, Any]]) -> Any:
            filled.update(load(weights))
            return filled

        model.load_weights = loading
        if self.model_runner.device.type == "cpu":
            _lay_out_experts_again(model)
        try:
            head = any(name.endswith(HEAD) for name in wanted)  # some architectures never hold one, others only where untied
            self.reload_weights(weights_iterator=checkpoint_tensors(Path(folder), head, base))
        finally:
            del model.load_weights
        return sorted(name for name in wanted - filled if _unwrapped(name) not in filled)

    def selfkd_sample_by(self, name: str) -> None:
        """Draw by our own sampler from now on, on a CPU: a card draws its numbers from seed and position already."""
        if name != inverse_cdf.NAME:
            raise ValueError(f"no sampler is named {name!r}; there is {inverse_cdf.NAME!r}")
        sampler = self.model_runner.sampler
        sampler.topk_topp_sampler.forward = inverse_cdf.InverseCdf(sampler.topk_topp_sampler.logprobs_mode)
        sampler.greedy_sample = inverse_cdf.likeliest

    def selfkd_facts(self) -> dict[str, Any]:
        """Return what this worker computes with; the names of vLLM's parts differ between its versions, and may be missing."""
        runner = self.model_runner
        groups = [group for groups in getattr(runner, "attn_groups", None) or () for group in groups]
        return {
            **of_engine(),
            "vllm_kernels": kernels.loaded(),
            "runner": f"{type(runner).__module__}.{type(runner).__qualname__}",
            "attention": sorted({group.backend.get_name() for group in groups}),
            "sampler": _sampler(getattr(runner, "sampler", None)),
        }


def _lay_out_experts_again(model: Any) -> None:
    """Have vLLM make the kernels of a mixture of experts anew: for a CPU it lays their weights out there only, not in a reload (0.31)."""
    for part in model.modules():
        method: Any = getattr(part, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _sampler(sampler: Any) -> str:
    """Return the name of our sampler, or those of vLLM's class and of the way it draws."""
    chosen = getattr(getattr(sampler, "topk_topp_sampler", None), "forward", None)
    if isinstance(chosen, inverse_cdf.InverseCdf):
        return chosen.name
    return f"{type(sampler).__qualname__}.{getattr(chosen, '__name__', 'forward')}"


def checkpoint_tensors(folder: Path, head: bool = True, base: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) of a folder, an adapter merged into its `base` in fp32, one tensor at a time; where its head is tied to the embeddings, that head spelled out, or left out without `head`.

    vLLM on CPU packs the head apart; a reload of a tied model by its own loader leaves the old head in place (0.31, 0.32).
    """
    tied = said_of_text(config_of(folder), "tie_word_embeddings") is not False
    for name, tensor in Weights(folder, base):
        if tied and name == HEAD:
            continue
        yield name, tensor
        if tied and head and name.endswith(EMBEDDING_NAMES):
            yield HEAD, tensor
