"""Which attention a model is computed with: its own, wherever it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import architecture
from tiny import WORDS, as_model, say

from selfkd.backend import attention, probe, tokens
from selfkd.backend.base import TrainSpec
from selfkd.backend.engine import root_model
from selfkd.core.pool import shape
from selfkd.errors import UsageError


@pytest.mark.parametrize(
    ("kind", "more", "plain"),
    [
        ("llama", {}, "sdpa"),
        ("gemma2", {}, "eager"),  # caps at 50 by default
        ("gemma2", {"attn_logit_softcapping": None}, "sdpa"),
        ("gemma3_text", {}, "sdpa"),
        ("gpt_oss", {}, "eager"),  # has no sdpa
    ],
)
def test_torchs_attention_is_used_where_it_computes_all_of_the_formula(kind: str, more: dict[str, Any], plain: str) -> None:
    from transformers import AutoConfig

    assert attention.plain_attention(AutoConfig.for_model(kind, **more)) == plain


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that caps its attention."""
    folder = tmp_path_factory.mktemp("capped")
    root_model.load_model({"path": str(architecture("gemma2", folder / "source"))}, folder / "root", None)
    return folder / "root"


def scores(folder: Path, by: str) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=by).eval()
    tok = tokens.tokenizer(str(folder))
    return np.concatenate(probe.token_logprobs(model, [tokens.encode_prompt(tok, say(word * 4)) for word in WORDS]))


def test_transformers_leaves_the_cap_out_under_sdpa_and_a_root_is_scored_with_it(capped: Path) -> None:
    assert np.sqrt(np.mean((scores(capped, "eager") - scores(capped, "sdpa")) ** 2)) > 0.05
    found = probe.read_probe(capped)
    assert found.attention == "eager"
    model = root_model._open(capped)[0]
    assert np.allclose(np.concatenate(probe.token_logprobs(model, found.ids)), found.child, atol=1e-5)


def test_a_model_is_trained_with_its_cap_and_its_rounds_say_how_they_add_up(capped: Path, tmp_path: Path) -> None:
    """The loss before the first step is that of the formula."""
    import torch
    from transformers import AutoModelForCausalLM

    from selfkd.backend.facts import of_trainer
    from selfkd.backend.trainer.update import train_rank

    rows = [{"id": word, "messages": say(word), "chosen": word * 3, "chosen_ended": True, "weight": 1.0} for word in WORDS]
    shape("rows", rows).write_parquet(tmp_path / "rows.parquet")
    spec = TrainSpec("sft", 1, precision="fp32", trl={"learning_rate": 1e-3})
    trained = train_rank(as_model(capped), None, [tmp_path / "rows.parquet"], spec, tmp_path / "out", {"threads": 1})
    model = AutoModelForCausalLM.from_pretrained(capped, dtype=torch.float32, attn_implementation="eager").eval()
    tok, total, count = tokens.tokenizer(str(capped)), 0.0, 0
    for word in WORDS:
        prompt, answer = tokens.encode_prompt(tok, say(word)), tokens.encode_completion(tok, word * 3)
        with torch.no_grad():
            table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(table[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer))
        count += len(answer)
    assert trained.metrics["loss_first"] == pytest.approx(total / count, abs=1e-4)
    assert of_trainer()["arithmetic"] == "flat-2" and probe.read_probe(tmp_path / "out").attention == "eager"


def test_a_machine_that_names_an_attention_without_the_cap_is_refused(capped: Path, tmp_path: Path) -> None:
    from selfkd.backend.trainer.update import train_rank

    shape("rows", [{"id": "a", "messages": say("a"), "chosen": "b"}]).write_parquet(tmp_path / "rows.parquet")
    machine = {"threads": 1, "trainer": {"attn_implementation": "sdpa"}}
    with pytest.raises(UsageError, match="sdpa leaves out a part") as error:
        train_rank(as_model(capped), None, [tmp_path / "rows.parquet"], TrainSpec("sft", 1), tmp_path / "out", machine)
    assert error.value.where == "machine.trainer.attn_implementation" and "eager" in error.value.fix


def test_a_probe_that_names_no_attention_is_of_before_and_one_of_torchs_needs_no_word(capped: Path, tmp_path: Path) -> None:
    probe.write_probe(tmp_path, [[1, 2, 3]], [[-1.0, -2.0]], None, None, attention="sdpa")
    assert "attention" not in (tmp_path / "probe.json").read_text() and probe.read_probe(tmp_path).attention is None
