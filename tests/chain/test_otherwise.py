"""A run that another command would go on with: its small form, or a loss that was edited while its update was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from chains import RECIPE, Killed, end, go, write_prompts

from selfkd.backend.fake import Fake
from selfkd.chain.run import Run
from selfkd.errors import ChainError
from selfkd.recipe.load import load

LOSS = '''
def mine(logps, mask, ref_logps=None):
    """The likelihood of each row.

    >>> 1
    1
    """
    return -(logps * mask).sum(-1)
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    Path("sums.yaml").write_text(f"{RECIPE}small:\n  sample.n: 2\n  train.trl: {{learning_rate: 1.0e-4}}\n")
    Path("mine.py").write_text(LOSS)


def records_of(run: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in run.rglob("*.json")
        if path.relative_to(run).parts[0] not in ("logs", "leases", "tmp")
    }


@pytest.mark.parametrize("small", [True, False])
def test_a_run_in_its_small_form_and_one_that_is_not_do_not_go_on_in_each_others_folder(small):
    go(load("sums.yaml", small=small), Path("run"))
    before, ended = records_of(Path("run")), end(Run.at(Path("run")))
    for amend in (False, True):
        with pytest.raises(ChainError, match=r"learning_rate|nothing is left that"):
            go(load("sums.yaml", small=not small), Path("run"), amend=amend)
    assert records_of(Path("run")) == before
    assert end(go(load("sums.yaml", small=small), Path("run"))) == ended


def test_a_loss_that_is_edited_between_kill_and_resume_is_refused_and_the_frozen_one_goes_on():
    text = RECIPE.replace("train: {loss: sft}", "train: {loss: mine.py:mine}")
    Path("own.yaml").write_text(text)
    whole = end(go(load("own.yaml"), Path("whole")))
    updates: list[str] = []

    def killed_in_the_second(name: str) -> None:
        updates.extend([name] if name == "train" else [])
        if name == "train" and len(updates) == 2:
            raise Killed

    with pytest.raises(Killed):
        go(load("own.yaml"), Path("run"), Fake({}, hook=killed_in_the_second))
    Path("mine.py").write_text(LOSS.replace("-(logps", "-2 * (logps"))
    with pytest.raises(ChainError, match=r"mine\.py:mine changed"):
        go(load("own.yaml"), Path("run"))
    Path("mine.py").write_text(f"# a comment changes nothing\n{LOSS}")
    assert end(go(load("own.yaml"), Path("run"))) == whole
