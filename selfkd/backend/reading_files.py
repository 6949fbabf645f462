"""What the files of a model that reads tell before it is opened: whether its head is among its tensors, and which words are one token.

Reads headers of safetensors files and tokenizer.json alone, without torch; what is not here is not judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from selfkd.backend.reading import Reading, classes_of, config_in, head_of
from selfkd.core import averaging

Count = Callable[[str], int]  # how many tokens a word is


def files_problem(reading: Reading, folder: Path, count: Count | None = None) -> tuple[str, str]:
    """Return (field, why) the model in a folder cannot read so, as far as its files are there; ('', '') where nothing is wrong.

    `count` counts tokens as the reader will; without it they are counted by tokenizer.json.
    """
    if problem := _headless(folder):
        return "", problem
    count = count or _counter(folder) if reading.good and reading.bad else None
    for field in ("good", "bad") if count else ():
        word = getattr(reading, field)
        if (tokens := count(word)) != 1:  # type: ignore[misc]
            fix = "write the token as the tokenizer has it, with the blank in front of it if it has one"
            return field, f"{word!r} is {tokens} tokens of this model, and one is read: {fix}"
    return "", ""


def _counter(folder: Path) -> Count | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer  # for recipes alone that name such words

    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda word: len(found.encode(word, add_special_tokens=False).ids)


def _headless(folder: Path) -> str:
    """Return why a head is not among the tensors of a folder: none of them has a row for each class, or a second one for each word.

    By their shapes, for every architecture calls it otherwise.
    """
    config, shapes = config_in(folder), _shapes(folder)
    head = head_of(config)
    if not shapes or not head:
        return ""
    if head == "words":
        words = config.get("vocab_size")
        tied = config.get("tie_word_embeddings", True) is not False
        missing = (
            not tied and isinstance(words, int) and sum(len(shape) == 2 and shape[0] == words for shape in shapes.values()) < 2
        )
        return "its files hold no matrix that gives words (lm_head): what it says would be random" if missing else ""
    rows = len(classes_of(config))
    there = any(
        len(shape) == 2 and shape[0] == rows for name, shape in shapes.items() if "embed" not in name.split(".")[-2:][0]
    )
    said = f"none of its tensors has {rows} {'row' if rows == 1 else 'rows'}, so its head is not among them"
    return "" if there else f"{said}: it was not trained for this, and what it says would be random"


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors; none where not all of the files are here, or one cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        index = folder / averaging.INDEX
        files = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else set()
        if all((folder / name).is_file() for name in files):
            return {name: tensor.kind[1] for name, tensor in averaging.tensors(folder).items()}
    return {}
