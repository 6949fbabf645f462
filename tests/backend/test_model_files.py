"""Finding a model on this machine: a folder, a file, or the one GGUF file of an installed package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfkd.backend.model_files import config_of, context_of, find_model, packaged_gguf, said_of_text


def test_a_folder_or_file_is_found_as_typed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/model") == tmp_path / "model"
    assert find_model(str(tmp_path / "other")) is None and find_model("Qwen/Qwen2.5-1.5B") is None


def test_the_gguf_file_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carrier" / "files").mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError")
    file = tmp_path / "carrier" / "files" / "model.Q4_K_M.gguf"
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_gguf("carrier") == [] and find_model("package:carrier") is None
    file.touch()
    assert packaged_gguf("carrier") == [file] and find_model("package:carrier") == file


def test_a_package_that_is_not_installed_has_no_model() -> None:
    assert packaged_gguf("no_such_package") is None and find_model("package:no_such_package") is None


@pytest.mark.parametrize(
    ("config", "limit", "tied"),
    [
        ({"max_position_embeddings": 300, "tie_word_embeddings": False}, 300, False),
        ({"text_config": {"max_position_embeddings": 300, "tie_word_embeddings": True}}, 300, True),
        (
            {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
            512,
            False,
        ),  # the head is the outer model's
        ({"n_positions": 300, "tie_word_embeddings": True}, 300, True),  # GPT-2
        ({"decoder": None, "vision_config": {"max_position_embeddings": 9}}, 512, None),
    ],
)
def test_what_a_config_says_of_the_part_that_writes(
    tmp_path: Path, config: dict[str, Any], limit: int, tied: bool | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_of(tmp_path, 512) == limit
    assert said_of_text(config_of(tmp_path), "tie_word_embeddings") is tied
