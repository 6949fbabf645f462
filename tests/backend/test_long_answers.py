"""Answers of tens of thousands of tokens: logits are never whole, attention takes no square of them, and a slow tail is no hang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from architectures import architecture
from tiny import as_model
from updates import update, write_rows

pytestmark = pytest.mark.real

VOCABULARY = 49_152
QUICK, LONG = 500, 32_768  # tokens that are learned of one row


def wide_model(folder: Path) -> Any:
    """A Llama of one layer with a vocabulary as large as that of a small real model, and room for long rows."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return as_model(architecture("llama", folder, vocab_size=VOCABULARY, max_position_embeddings=2 * LONG, **sizes))


def trained(folder: Path, loss: str, tokens: int, options: dict[str, Any]) -> Any:
    """One step on one row of so many learned tokens, in a pair on both sides together."""
    side = tokens if loss == "sft" else tokens // 2
    rows = write_rows(folder, 1, chosen="a" * (side - 1), rejected="b" * (side - 1))
    trl = {"learning_rate": 1e-3, "per_device_train_batch_size": 1, **options}
    return update(wide_model(folder / "start"), rows, folder / "out", loss, max_length=2 * LONG, trl=trl)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_logits_of_a_long_row_are_never_whole_forward_or_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """A row counts as long from fewer tokens on than outside of this test, so that it is quick."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from selfkd.backend.trainer import cpu_head

    monkeypatch.setattr(cpu_head, "MOST_ELEMENTS", QUICK * VOCABULARY // 2)
    largest: dict[int, str] = {0: "nothing"}

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            made = function(*arguments, **(named or {}))
            for one in tree_leaves(made):
                if hasattr(one, "numel") and one.numel() > max(largest):
                    largest[one.numel()] = str(function)
            return made

    with Watching():
        found = trained(tmp_path, loss, QUICK, {})
    assert found.metrics["steps"] == 1 and found.metrics["padding_free"]
    assert VOCABULARY * 64 < max(largest) < QUICK * VOCABULARY, largest


def test_activations_that_are_to_leave_a_card_are_refused_on_a_cpu_before_a_model_is_loaded(tmp_path: Path) -> None:
    from selfkd.errors import UsageError

    with pytest.raises(
        UsageError, match=r"activation_offloading[\s\S]*here the CPU computes[\s\S]*gradient_checkpointing: true"
    ):
        trained(tmp_path, "sft", 10, {"activation_offloading": True})
    assert not (tmp_path / "out").exists()


PROGRAM = """
import json, resource, sys
from pathlib import Path
from test_long_answers import trained
options = json.loads(sys.argv[3])
found = trained(Path(sys.argv[1]), sys.argv[2], int(sys.argv[4]), options)
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **found.metrics}))
"""


def in_a_process(folder: Path, loss: str, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """What the update came to, with the most memory that its process took."""
    folder.mkdir(exist_ok=True)
    words = [str(folder), loss, json.dumps(options), str(tokens)]
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    program = f"import sys; sys.path[:0] = {paths!r}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.nightly
@pytest.mark.parametrize(("loss", "options"), [("sft", {}), ("sft", {"gradient_checkpointing": True}), ("dpo", {})])
def test_32k_tokens_are_learned_in_less_memory_than_their_logits_take(
    tmp_path: Path, loss: str, options: dict[str, Any]
) -> None:
    found = in_a_process(tmp_path, loss, LONG, options)
    assert found["steps"] == 1 and found["tokens"] > LONG - 2
    assert found["peak"] < 4 * LONG * VOCABULARY, f"{found['peak'] / 1e9:.1f} GB"
