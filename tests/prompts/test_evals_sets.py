"""Data sets of the package `evals`, read from a distribution that lies there as pip leaves one: files and a RECORD, never imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from splits import read, user_texts

from selfkd.errors import UsageError
from selfkd.prompts.read import source_problems

LICENCE = "MIT License\n\nNOTE: This license applies to all but:\n#### Other\n- **Location**: evals/registry/data/apart\n"
SYSTEM = {"role": "system", "content": "Type the letter."}


def asked(text: str, ideal: object, **more: object) -> dict[str, object]:
    return {"input": [SYSTEM, {"role": "user", "content": text, "name": "somebody"}], "ideal": ideal, **more}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[object]]], Path]:
    """A function that lays down a distribution with these sets; importing it would raise."""

    def lay(sets: dict[str, list[object]], licence: str = LICENCE) -> Path:
        site = tmp_path / "site"
        files = {f"evals/registry/data/{name}": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in sets.items()}
        files |= {"evals/__init__.py": "raise RuntimeError('imported')\n"}
        info = {
            "METADATA": "Metadata-Version: 2.1\nName: evals\nVersion: 9.1\n",
            **({"LICENSE.md": licence} if licence else {}),
        }
        files |= {f"evals-9.1.dist-info/{name}": text for name, text in info.items()}
        files["evals-9.1.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
        for name, text in files.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(text)
        monkeypatch.setattr(sys, "path", [str(site), *(place for place in sys.path if "site-packages" not in place)])
        return site

    return lay


def test_rows_of_a_set_are_prompts_with_their_answers_and_say_package_version_set_and_licence(tmp_path, installed):
    installed({"quartz/samples.jsonl": [asked("Up or down?", "A", level=2), asked("More or less?", ["B"])]})
    frame = read({"evals": {"set": "quartz"}}, tmp_path)
    assert user_texts(frame) == ["Up or down?", "More or less?"] and frame["answer"].to_list() == ["A", "B"]
    assert frame["messages"].to_list()[0][0] == SYSTEM
    assert frame["source"].unique().to_list() == ["evals 9.1 quartz, MIT"]
    assert json.loads(frame["meta"][0]) == {"level": 2}
    assert "evals" not in sys.modules


def test_a_slice_of_a_set_is_written_as_that_of_a_hub(tmp_path, installed):
    installed({"quartz/samples.jsonl": [asked(f"Question {number}?", "A") for number in range(5)]})
    found = {
        words: user_texts(read({"evals": {"set": words}}, tmp_path)) for words in ("quartz[:2]", "quartz[3:]", "quartz[1:2]")
    }
    assert found == {
        "quartz[:2]": ["Question 0?", "Question 1?"],
        "quartz[3:]": ["Question 3?", "Question 4?"],
        "quartz[1:2]": ["Question 1?"],
    }


def test_a_file_may_be_named_and_a_text_may_be_the_input(tmp_path, installed):
    installed({"deep/few/one.jsonl": [{"input": "Say it.", "ideal": "it"}]})
    assert user_texts(read({"evals": {"set": "deep/few/one.jsonl"}}, tmp_path)) == ["Say it."]


@pytest.mark.parametrize(
    ("name", "licence", "said"),
    [
        ("apart", LICENCE, "licence of its own (LICENSE.md)"),
        ("apart-too", LICENCE, "MIT"),
        ("quartz", "Some other terms.", "licence in LICENSE.md"),
        ("quartz", "", "no licence told"),
    ],
)
def test_the_licence_is_that_of_the_package_unless_its_file_speaks_of_the_set(tmp_path, installed, name, licence, said):
    installed({f"{name}/samples.jsonl": [asked("Why?", "A")]}, licence)
    [source] = read({"evals": {"set": name}}, tmp_path)["source"]
    assert source == f"evals 9.1 {name}, {said}"


def test_what_cannot_be_read_is_named_with_its_place(tmp_path, installed):
    site = installed(
        {
            "quartz/samples.jsonl": [asked("Why?", ["A", "B"])],
            "talk/samples.jsonl": [{"sample": []}],
            "talk/more.jsonl": [{"sample": []}],
        }
    )
    with pytest.raises(UsageError, match=r"'evals' 9\.1 has no set 'quarts'\. Did you mean 'quartz'"):
        read({"evals": {"set": "quarts"}}, tmp_path)
    with pytest.raises(UsageError, match=r"talk/samples\.jsonl:1  no column 'input'"):
        read({"evals": {"set": "talk"}}, tmp_path)
    with pytest.raises(UsageError, match=r"quartz/samples\.jsonl:1  the answer must be text or a number"):
        read({"evals": {"set": "quartz"}}, tmp_path)
    for words in ({}, {"set": 3}, {"set": "quartz", "limit": 3}):
        with pytest.raises(UsageError, match=r"prompts\.train  evals needs a set, and nothing else"):
            read({"evals": words}, tmp_path)
    with pytest.raises(UsageError, match=r"\(evals: quartz\[3\]\)  no name of a data set"):
        read({"evals": {"set": "quartz[3]"}}, tmp_path)
    assert source_problems({"evals": "quartz"}, "train") == [
        "prompts.train: 'evals' should be a mapping (name: value), not 'quartz'"
    ]
    (site / "evals-9.1.dist-info/METADATA").unlink()
    sys.path.remove(str(site))
    with pytest.raises(UsageError) as caught:
        read({"evals": {"set": "quartz"}}, tmp_path)
    assert "pip install --no-deps evals" in str(caught.value) and "prompts.train (evals: quartz)" in str(caught.value)


def test_a_map_function_sees_the_row_as_it_is_written(tmp_path, installed):
    installed({"talk/samples.jsonl": [{"sample": "Hello"}]})
    (tmp_path / "own.py").write_text("def row(raw):\n    return {'prompt': raw['sample']}\n")
    assert user_texts(read({"evals": {"set": "talk"}, "map": "own.py:row"}, tmp_path)) == ["Hello"]
