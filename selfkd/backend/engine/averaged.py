"""An average of checkpoints as a model folder that engines can prove: its weights, what the first of them says of itself, and a probe.

The probe is like that of a root: an average has several parents, so it says what the child scores and nothing of an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfkd.backend.engine.root_model import quietly
from selfkd.backend.probe import read_probe, token_logprobs, write_probe
from selfkd.backend.trainer.checkpoint import describe
from selfkd.core import averaging
from selfkd.core.pool import Model


def average(models: Sequence[tuple[Model, float]], out: Path) -> None:
    """Write the weighted average of full weights into `out`."""
    from transformers import AutoModelForCausalLM

    from selfkd.backend.trainer.opened import as_masters

    first = Path(models[0][0].path)
    averaging.average([(Path(model.path), share) for model, share in models], out)
    describe(first, out)
    words = as_masters(str(out))
    with quietly():
        model = AutoModelForCausalLM.from_pretrained(str(out), **words)
    sequences = read_probe(first).ids
    write_probe(out, sequences, token_logprobs(model.eval(), sequences), None, None, attention=words["attn_implementation"])
