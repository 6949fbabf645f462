"""An adapter while it is trained: put into a model whose own weights lie still, scored, and written as one adapter of the root.

Knows no loss, no TRL and no engine; what an adapter's folder says is in backend/adapters.py.
"""

# PEFT has no types.
# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from selfkd.backend import adapters
from selfkd.backend.adapters import Adapter, Served, Weights
from selfkd.backend.base import LoraSpec, TrainSpec
from selfkd.backend.trainer import four_bits, sharded
from selfkd.backend.trainer.checkpoint import LOWER_THE_STEP, describe
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.core.wording import did_you_mean
from selfkd.errors import GuardError, UsageError

NAME = "default"  # of the one adapter in a model, for PEFT
SURVIVES = 0.98  # of an update, in the engine's format: where less does, vLLM serves the adapter beside the weights
# Models of these kinds were served so beside their weights, with the log-probabilities of the formula (tests/backend/test_adapters.py).
NATIVE = frozenset({"gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"})
SAME_WORDS = ("r", "alpha", "dropout", "modules", "rslora")  # of an adapter with which training goes on
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # {module: A and B}


@dataclass(frozen=True)
class Plan:
    """How an adapter is trained: the model beneath it, which lies still, and the adapter that it goes on with or lies on, if any."""

    spec: LoraSpec
    start: Model
    beneath: Model
    earlier: Adapter | None

    @property
    def goes_on(self) -> bool:
        return self.earlier is not None and self.spec.goes_on


def planned(spec: LoraSpec, start: Model) -> Plan:
    """Return how an adapter is trained from a start of either kind."""
    earlier = adapters.read(Path(start.path))
    beneath = adapters.full_weights(start) if earlier and spec.goes_on else start
    return Plan(spec, start, beneath, earlier)


def held_as(spec: LoraSpec, one: Model) -> Plan:
    """Return how a model is held beside a policy of `spec`: an adapter over its base as it is, where the policy goes on with its own."""
    earlier = adapters.read(Path(one.path))
    if earlier is None:
        return planned(spec, one)
    words = {name: earlier.words[name] for name in ("r", "alpha", "rslora")}
    return planned(replace(spec, **words, dropout=earlier.words["dropout"], targets=tuple(earlier.modules)), one)


def refuse_unserved(spec: TrainSpec, start: Model, numerics: Mapping[str, Any]) -> None:
    """Raise UsageError where an adapter is to be served beside the weights, and no engine of this run can, before anything learns."""
    if not spec.lora or spec.lora.serve != "adapter":
        return
    rank = _rank_after(spec.lora, adapters.read(Path(start.path)))
    if why := unserved(Path(start.path), numerics, rank):
        fix = "Write `serve: merged`, or leave it out."
        if rank > max(spec.lora.r, adapters.RANKS[-1]):
            fix += " Or `continue: true`, which goes on with the adapter that is there and keeps its rank."
        raise UsageError(f"serve: adapter is not possible here: {why}", "train.lora.serve", fix)


def _rank_after(spec: LoraSpec, earlier: Adapter | None) -> int:
    """Return the rank of what an update commits: laid over another one, the ranks of both."""
    return spec.r if earlier is None or spec.goes_on else earlier.rank + spec.r


# ---- in a model ----


def attach(model: Any, plan: Plan, seed: int) -> None:
    """Put an adapter into a model: new, where it changes nothing yet, or the one that training goes on with. All else lies still."""
    targets = _targets(model, plan.spec.targets)
    _refuse_other_names(targets, plan.start)
    if plan.earlier is not None and plan.goes_on:
        _refuse_other_words(plan.earlier, _words(plan.spec, targets))
        _refuse_other_layers(plan.earlier, targets)
    for weight in model.parameters():
        weight.requires_grad_(False)
    peft.inject_adapter_in_model(_config(model, plan.spec, targets), model, NAME)
    for name, layer in _layers(model).items():
        device = layer.get_base_layer().weight.device
        a, b = plan.earlier.factors(name) if plan.earlier and plan.goes_on else _fresh(layer, digest.seed("lora", seed, name))
        for part, values in ((layer.lora_A[NAME], a), (layer.lora_B[NAME], b)):
            part.weight = torch.nn.Parameter(values.float().to(device))  # PEFT gives it the format of the weights beneath
    if sharded.is_sharded(model):
        sharded.divide_added(model, {name: (one.lora_A[NAME], one.lora_B[NAME]) for name, one in _layers(model).items()})


def _targets(model: Any, wanted: Sequence[str]) -> list[str]:
    """Return the names of the modules to change; UsageError where a wanted one is no linear layer of the blocks."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    found = [name for name, part in model.named_modules() if isinstance(part, kinds) and part is not head]
    known = adapters.last_words(found)
    for word in wanted:
        if not any(_ends(name, word) for name in found):
            what = (
                f"no linear layer of {type(model).__name__.removeprefix('FSDP')} is called '{word}'.{did_you_mean(word, known)}"
            )
            more = " Experts of a mixture lie in one tensor, and are none." if _experts(model) else ""
            raise UsageError(what, "train.lora.targets", f"There are: {', '.join(known)}.{more}")
    return [name for name in found if not wanted or any(_ends(name, word) for word in wanted)]


def _ends(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _experts(model: Any) -> bool:
    return any("experts" in name and weight.ndim == 3 for name, weight in model.named_parameters())


def _refuse_other_names(targets: Sequence[str], start: Model) -> None:
    """Raise UsageError where the files name a changed weight otherwise than the model does: engines merge by the names of the files."""
    places = Weights(start.path, start.base).places
    if missing := [name for name in targets if f"{name}.weight" not in places]:
        what = f"the weights of {missing[0]} and {len(missing) - 1} more layers have other names in the model's files"
        raise UsageError(
            what, "train.lora.targets", f"Name layers whose names are theirs, or train without `lora`. ({start.path})"
        )


def _words(spec: LoraSpec, targets: Sequence[str]) -> dict[str, Any]:
    modules = adapters.last_words(targets)
    words = {"r": spec.r, "alpha": spec.alpha, "dropout": spec.dropout, "modules": modules, "rslora": spec.rslora}
    return {**words, "quantise": spec.quantise} if spec.quantise else words


def _refuse_other_words(earlier: Adapter, words: Mapping[str, Any]) -> None:
    if said := adapters.difference(words, earlier.words, SAME_WORDS):
        what = f"continue goes on with an adapter of the same words, and here differ, asked for and there: {said}"
        fix = "Give it the words that it was made with, or leave out `continue`: then a new adapter is laid over it."
        raise UsageError(what, "train.continue", fix)


def _refuse_other_layers(earlier: Adapter, targets: Sequence[str]) -> None:
    """Raise UsageError where layers have the same names in the words and are not the same: what they learned would be lost."""
    if apart := sorted(set(targets) ^ set(earlier.modules)):
        what = f"continue goes on with an adapter at the same layers, and only one of the two has {apart[0]} and {len(apart) - 1} more"
        raise UsageError(what, "train.continue", "Give `targets` as they were, or leave out `continue`.")


def _config(model: Any, spec: LoraSpec, targets: Sequence[str]) -> Any:
    transposed = {isinstance(model.get_submodule(name), Conv1D) for name in targets}
    if len(transposed) > 1:
        what = "some of its linear layers lie as (in, out), others as (out, in), and an adapter has one word for all"
        raise UsageError(what, "train.lora.targets", "Name layers of one kind.")
    return peft.LoraConfig(
        r=spec.r,
        lora_alpha=_whole(spec.alpha),
        lora_dropout=spec.dropout,
        target_modules=list(targets),
        use_rslora=spec.rslora,
        fan_in_fan_out=transposed == {True},
        task_type="CAUSAL_LM",
    )


def _whole(alpha: float) -> float:
    """Return a whole number as one, which is how other programs write it."""
    return int(alpha) if alpha == int(alpha) else alpha


def _fresh(layer: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A as PEFT draws it, from a seed of its own on any device, and a B of zeros."""
    a, b = (torch.empty(part[NAME].weight.shape) for part in (layer.lora_A, layer.lora_B))
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, b.zero_()


def _layers(model: Any) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


@contextlib.contextmanager
def off(model: Any) -> Iterator[None]:
    """Compute with the model beneath the adapter alone."""
    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for weight in learned:  # PEFT takes this from what is switched off
            weight.requires_grad_(True)


def held(model: Any, optimiser: Any) -> dict[str, int]:
    """Return the bytes of the weights that lie still, of those that learn, of gradients and of the optimiser's state."""
    weights = list(model.parameters())
    states = [value for state in optimiser.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        "frozen": sum(weight.nbytes for weight in weights if not weight.requires_grad) + four_bits.scales(model),
        "trained": sum(weight.nbytes for weight in weights if weight.requires_grad),
        "gradients": sum(weight.grad.nbytes for weight in weights if weight.grad is not None),
        "optimiser": sum(state.nbytes for state in states),
    }


# ---- in a folder ----


def learned(model: Any) -> Factors:
    """Return what was learned, whole and in the machine's memory; ranks that hold it divided all call it."""
    layers = {name: (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight) for name, layer in _layers(model).items()}
    return {name: (sharded.whole(a).cpu(), sharded.whole(b).cpu()) for name, (a, b) in layers.items()}


def save(model: Any, own: Factors, plan: Plan, out: Path, numerics: Mapping[str, Any]) -> dict[str, Any]:
    """Write what was learned as one adapter of the root, and how it is served; return what was measured. GuardError where it is nothing."""
    config, targets = next(iter(_layers(model).values())), list(own)
    peft_words = model.peft_config[NAME].to_dict()
    words = _words(plan.spec, targets)
    scale = float(config.scaling[NAME])
    if plan.earlier is not None and not plan.goes_on:
        rank = plan.earlier.rank + plan.spec.r
        own, words = _over(plan.earlier, own, scale, rank), {**words, "r": rank, "rslora": False}
        words |= {"alpha": float(words["r"]), "modules": adapters.last_words(own)}
        peft_words |= {"r": words["r"], "lora_alpha": words["r"], "use_rslora": False}
    _write(out, own, {**peft_words, "target_modules": _short(own, model)})
    describe(Path(plan.start.path), out)
    base = plan.earlier.base if plan.earlier else plan.start.digest
    folder = adapters.full_weights(plan.start).path
    _say(out, base, "merged", words)
    measured = _measured(plan.start, Weights(out, folder), getattr(torch, numerics.get("dtype", "float32")))
    served = _served(plan.spec, measured["survived"], out, numerics)
    _say(out, base, served, words)
    return {**measured, "serve": served, "rank": words["r"]}


def _over(earlier: Adapter, own: Factors, scale: float, rank: int) -> Factors:
    """Return two adapters as one of `rank` that does what both do, their ranks side by side and their scales in B; where one has nothing: zeros."""
    found = {}
    for name in sorted({*earlier.modules, *own}):
        parts = []
        if name in earlier.modules:
            a, b = earlier.factors(name)
            parts.append((a, earlier.scale * b))
        if name in own:
            a, b = own[name]
            parts.append((a, scale * b))
        found[name] = (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1))
    return {name: (_padded(a, rank, 0), _padded(b, rank, 1)) for name, (a, b) in found.items()}


def _padded(values: torch.Tensor, rank: int, side: int) -> torch.Tensor:
    shape = list(values.shape)
    shape[side] = rank - shape[side]
    return torch.cat([values, values.new_zeros(shape)], side)


def _short(own: Factors, model: Any) -> list[str]:
    """Return the last words of the changed modules' names where they name these and no other, else the whole names."""
    last = adapters.last_words(own)
    named = {name for name, part in model.named_modules() if isinstance(part, LoraLayer | torch.nn.Linear | Conv1D)}
    beside = {name for name in named if name.rpartition(".")[2] in last and not _inside(name, own)}
    return last if beside <= own.keys() else sorted(own)


def _inside(name: str, own: Factors) -> bool:
    """Whether a module is a part of a changed one."""
    return any(name.startswith(f"{one}.") for one in own)


def _write(out: Path, own: Factors, peft_words: Mapping[str, Any]) -> None:
    """Write tensors and words as PEFT does, without a path of this machine."""
    out.mkdir(parents=True, exist_ok=True)
    named = {
        f"{adapters.PREFIX}{name}.lora_{letter}.weight": one for name, pair in own.items() for letter, one in zip("AB", pair)
    }
    save_file({name: tensor.float().contiguous() for name, tensor in named.items()}, out / adapters.TENSORS, {"format": "pt"})
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in peft_words.items()}
    plain |= {"base_model_name_or_path": None, "inference_mode": True, "revision": None}
    (out / adapters.WORDS).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n", "utf-8")


def _say(out: Path, base: str, served: Served, words: Mapping[str, Any]) -> None:
    said = {"base": base, "serve": served, "words": dict(words)}
    (out / digest.ADAPTER).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", "utf-8")


def _measured(start: Model, child: Weights, dtype: torch.dtype) -> dict[str, float]:
    """Return how far the weights moved, and the share of the adapter's change that is left where it is merged in `dtype`.

    That share is the projection of round(W + change) - round(W) on the change. One tensor is held at a time.
    """
    parent = Weights(start.path, start.base)
    update = weight = kept = whole = 0.0
    for name in child.places:
        before = child.of_base(name).float()
        change = child.change(name)
        after = before + change
        norm = torch.linalg.vector_norm(after).item()
        if not math.isfinite(norm):
            raise GuardError(f"after the last step the weights {name} are not finite", "train", LOWER_THE_STEP)
        weight += norm**2
        if name in child.changed:
            update += torch.linalg.vector_norm(change - parent.change(name)).item() ** 2
            left = after.to(dtype).float() - before.to(dtype).float()
            kept, whole = kept + (left * change).sum().item(), whole + change.square().sum().item()
    if update == 0:
        raise GuardError(
            "training changed no weight", "train", "Is trl.learning_rate zero, or too small for any weight to move?"
        )
    return {
        "update_norm": math.sqrt(update),
        "update_ratio": math.sqrt(update / weight),
        "survived": kept / whole if whole else 1.0,
    }


def _served(spec: LoraSpec, survived: float, out: Path, numerics: Mapping[str, Any]) -> Served:
    """Return how engines serve the adapter: as asked, else beside the weights where merging loses more and vLLM can."""
    if spec.serve != "auto":
        return "adapter" if spec.serve == "adapter" else "merged"
    found = adapters.read(out)
    return "adapter" if survived < SURVIVES and found and not unserved(out, numerics, found.rank) else "merged"


def unserved(folder: Path, numerics: Mapping[str, Any], rank: int) -> str:
    """Return why an engine cannot serve an adapter of this rank beside the weights of a model such as that in a folder, or ''."""
    if numerics.get("generator", "vllm") != "vllm":
        return "only vLLM serves an adapter beside the weights"
    kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    if kind not in NATIVE:
        return f"vLLM was not seen to serve adapters of {kind} rightly"
    return "" if rank <= adapters.RANKS[-1] else f"vLLM has room for ranks up to {adapters.RANKS[-1]}, and this one has {rank}"
