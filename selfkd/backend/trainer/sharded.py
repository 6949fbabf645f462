"""A model whose weights, gradients and optimiser are divided over the ranks of a group: FSDP2, on cards and on CPUs alike.

Each rank reads its own slice of every tensor, and no rank ever holds the model whole: while a block computes, its weights are gathered
on every rank and let go afterwards; a checkpoint is gathered one tensor at a time. Knows no loss and no TRL.
"""

# torch's FSDP has few types, transformers' callbacks none.
# mypy: allow-subclassing-any
# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from selfkd.backend import adapters
from selfkd.backend.model_files import SHARD_SIZE
from selfkd.backend.trainer import opened
from selfkd.backend.trainer.parts import first_row
from selfkd.core.wording import first_line
from selfkd.errors import GuardError, StorageError, UsageError

FP32 = MixedPrecisionPolicy()
# Weights are rounded before they are gathered: half of the traffic, and backward gathers them again, where autocast would keep a
# rounded copy of the whole model on every rank until then. What goes from block to block stays in fp32, as under autocast.
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
BLOCK = re.compile(r"(.*?\.\d+)\.")  # of a weight's name, up to the number of its block
INDEX = "model.safetensors.index.json"


# ---- dividing ----


def load(path: str, base: str | None = None, rounded: bool = False, **options: Any) -> Any:
    """Load this rank's part of a model: transformers reads of each tensor the slice that is wanted, whatever names its files use.

    An adapter, of which `base` is the model beneath, is merged into those slices. With `rounded` the weights of products lie there in bf16.
    """
    folder = str(adapters.base_folder(path, base))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    place = {"device_map": {"": torch.device(device, torch.cuda.current_device())}} if device == "cuda" else {}
    with _divided_before_reading(mesh, rounded) as divided:
        model = AutoModelForCausalLM.from_pretrained(folder, **options, **place)
    if len(list(model.parameters())) != divided[0]:  # it was untied once both were read, too late to divide it so
        what = "config.json ties the output head to the embedding, and the files hold a head of its own"
        raise UsageError(what, path, "Write `tie_word_embeddings: false` into the config.json that the chain began with.")
    if folder != path:
        _merge(model, adapters.Weights(path, base))
    return model


def _merge(model: Any, weights: adapters.Weights) -> None:
    """Write the rows of this rank that an adapter changes, rounded once, from fp32, to the format that they lie in."""
    for name in weights.changed:
        weight = model.get_parameter(name).detach()
        first, local = first_row(weight), weight.to_local()
        if len(local):
            local.copy_(weights.rows(name, first, first + len(local)))


@contextlib.contextmanager
def _divided_before_reading(mesh: Any, rounded: bool) -> Iterator[list[int]]:
    """Divide what transformers loads meanwhile, before it reads weights; its own plan exists for four kinds of models.

    The list holds afterwards how many weights there were.
    """
    counts: list[int] = []

    def divided(cls: Any, model: Any, *_: Any) -> Any:
        model.tie_weights()
        if rounded:
            opened.round_linear_weights(model)  # nothing is read yet: transformers reads into the format that it finds
        divide(model, mesh)
        counts.append(len(list(model.parameters())))
        return model

    PreTrainedModel.maybe_distribute_model = classmethod(divided)
    try:
        yield counts
    finally:
        del PreTrainedModel.maybe_distribute_model  # that of its parent class shows again


def divide(model: Any, mesh: Any) -> None:
    """Divide a model by its blocks; what lies around them is gathered once per pass.

    The output head stays with the root, in whose forward pass the losses read its weights, and so does an embedding tied to it.
    """
    parts = blocks(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is not None and head is not None and embedding.weight is not head.weight:
        parts = [*parts, embedding]
    try:
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
    except ValueError as error:  # such as a weight that is one number
        what = f"{type(model).__name__} cannot be divided over ranks: {error}"
        raise UsageError(what, "machine.shard", "Leave out `shard`.") from error


def divide_added(model: Any, added: Mapping[str, Sequence[Any]]) -> None:
    """Divide modules that were put into a divided model, {name of the place: modules}; to be called before its first forward pass.

    Those of a block are gathered together, beside what lies still there.
    """
    mesh = next(weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor))
    for _, names in groupby(added, key=_block):
        fully_shard([part for name in names for part in added[name]], mesh=mesh, reshard_after_forward=True)


def _block(name: str) -> str:
    """Return the name of the block in which something lies, else its own."""
    return match[1] if (match := BLOCK.match(name)) else name


def blocks(model: Any) -> list[Any]:
    """Return the transformer blocks of a model, inner ones first; UsageError where the model's code does not name them."""
    names = set(model._no_split_modules or ())
    found = [part for part in model.modules() if type(part).__name__ in names and part is not model]
    if not found:
        what = f"the blocks of {type(model).__name__}, by which a model is divided over ranks, cannot be found"
        why = (
            f"transformers names {', '.join(sorted(names))}, and there is none in it." if names else "transformers names none."
        )
        raise UsageError(what, "machine.shard", f"{why} Leave out `shard`.")
    return found[::-1]


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def compute_in(model: Any, bf16: bool) -> None:
    """Have the blocks of a model compute in bf16 or in fp32 from now on; nothing of it is gathered afterwards.

    FSDP takes a policy when it divides, and keeps what it gathers into: both are renewed here, for a probe is scored in fp32.
    """
    rest(model)
    around = (model, model.get_input_embeddings())
    for part in (part for part in model.modules() if isinstance(part, FSDPModule) and part not in around):
        for group in part._get_fsdp_state()._fsdp_param_groups:
            group.mp_policy = BF16 if bf16 else FP32
            group._init_mp_dtypes()
            for weight in group.fsdp_params:
                weight.all_gather_outputs = []
                weight.__dict__.pop("_unsharded_param", None)


def rest(model: Any) -> None:
    """Let go of what the last pass gathered: without a backward pass, the root keeps its weights."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def held(model: Any, optimiser: Any) -> float:
    """Return the share of the bytes of weights, gradients and optimiser that lies on this rank; GuardError where a weight lies on each.

    To be called while there are gradients. Anything that wrapped the model once more would train as well, and hold it whole.
    """
    weights = list(model.parameters())
    if whole := [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]:
        what = f"every rank holds all of {whole[0]} and of {len(whole) - 1} more weights, although shard: true divides them"
        fix = "Leave out `shard` in the machine file. A version of TRL or Accelerate that selfkd does not know may do this."
        raise GuardError(what, "train", fix)
    states = [value for state in optimiser.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *states]
    here = sum(_local(tensor).nbytes for tensor in tensors)
    return float(here / sum(tensor.nbytes for tensor in tensors))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Shares(TrainerCallback):
    """Measures at the first optimiser step what share of weights, gradients and optimiser this rank holds."""

    held = math.nan

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if math.isnan(self.held):
            self.held = held(model, optimizer)


def number(value: Any) -> float:
    """Return a number that ranks may have computed a part of each; all call it."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


# ---- saving ----


def save(model: Any, out: Path) -> None:
    """Write the files that `save_pretrained` would write of the weights, gathered one tensor at a time; all ranks call it, rank 0 writes.

    Rank 0 holds one file at most, and a block where the files name weights otherwise than the model does. Where it cannot write, it goes
    on gathering with the others and raises at the end.
    """
    rest(model)
    weights = _weights(model)
    files = _Files(model, weights, out) if torch.distributed.get_rank() == 0 else None
    for names in _together(model, list(weights)):
        gathered = {name: _kept(whole(weights[name]), files is not None) for name in names}
        if files is not None:
            files.take(gathered)
    if files is not None:
        files.close()


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Return {name: this rank's part} of all that is saved, in the order of the files; of tied weights the first."""
    state, ignored = model.state_dict(), set(model._keys_to_ignore_on_save or ())
    tied = {name for name, source in model.all_tied_weights_keys.items() if source in state}
    return {name: state[name] for name in sorted(state, key=dot_natural_key) if name not in tied | ignored}


def _together(model: Any, names: Sequence[str]) -> list[list[str]]:
    """Group the names of weights that have to be gathered together, for the files may cut and join them within a block."""
    if not getattr(model, "_weight_conversions", None):
        return [[name] for name in names]
    return [list(group) for _, group in groupby(names, key=_block)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor gathered from all ranks, which all call it; one that is not divided as it is."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def _kept(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    return tensor.cpu() if keep else None


class _Files:
    """The files of a checkpoint, each written as soon as its last tensor is there."""

    def __init__(self, model: Any, weights: Mapping[str, torch.Tensor], out: Path) -> None:
        self.model, self.out = model, out
        self.failed: Exception | None = None
        shapes = {name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in weights.items()}
        self.plan = split_torch_state_dict_into_shards(
            revert_weight_conversion(model, shapes), filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
        )
        self.open: dict[str, dict[str, torch.Tensor]] = {}  # file -> what is there of it
        out.mkdir(parents=True, exist_ok=True)

    def take(self, tensors: Mapping[str, torch.Tensor | None]) -> None:
        if self.failed is not None:
            return
        try:
            for name, tensor in revert_weight_conversion(self.model, dict(tensors)).items():
                file = self.plan.tensor_to_filename[name]
                self.open.setdefault(file, {})[name] = tensor.contiguous()
                if len(self.open[file]) == len(self.plan.filename_to_tensors[file]):
                    save_file(self.open.pop(file), self.out / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            self.failed, self.open = error, {}

    def close(self) -> None:
        if self.failed is not None:
            what = f"the checkpoint could not be written: {first_line(self.failed)}"
            raise StorageError(what, str(self.out), "Make room and repeat the command: it goes on here.") from self.failed
        if self.plan.is_sharded:
            index = {"metadata": self.plan.metadata, "weight_map": self.plan.tensor_to_filename}
            (self.out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
