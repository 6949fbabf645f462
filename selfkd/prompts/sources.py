"""The kinds of prompt sources, one row each in `SOURCES` at the end: who reads it, what it is, and which fields it has.

A reader takes the words of the recipe and yields raw rows, each with the place it came from; `read.py` makes prompts of them.
`datasets` and `reasoning_gym` are imported only where a recipe asks for them.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from selfkd.core import digest, install
from selfkd.core.files import locate
from selfkd.core.wording import did_you_mean, first_line
from selfkd.errors import UsageError
from selfkd.prompts.evals_sets import as_asked, rows_of_set
from selfkd.prompts.rows import FILE_READERS, rows_of_file
from selfkd.prompts.user_code import load_function, run_user_code

REACH_SECONDS = 5.0  # the hub client alone retries for 23 s where there is no network
GYM_SIZE = 500  # problems of a split


class Raw(NamedTuple):
    """A row as found; `source` is what the recipe calls its origin, `where` is its place in an error."""

    value: Any
    source: str
    where: str


Words = Mapping[str, Any]  # a source as the recipe writes it: {"file": "my.jsonl", "limit": 10}


@dataclass(frozen=True)
class Source:
    """A kind of source. `read` takes its words, the folders to look for files in, and the name of the split."""

    read: Callable[[Words, Sequence[Path], str], Iterator[Raw]]
    meaning: str  # the sentence of the recipe reference
    fields: tuple[str, ...] = ()  # those that only this kind has


def place_of(kind: str, words: Words, split_name: str) -> str:
    """Return how an error names a whole source: `prompts.train (file: my.jsonl)`."""
    named = words.get(kind)
    if isinstance(named, Mapping):
        named = named.get("task") or named.get("set")
    return f"prompts.{split_name} ({kind})" if isinstance(named, list) else f"prompts.{split_name} ({kind}: {named})"


# ------------------------------------------------------------------------------------------- the recipe's own, and code


def read_rows(words: Words, folders: Sequence[Path], split_name: str) -> Iterator[Raw]:
    """Yield the rows that the recipe itself holds."""
    return (Raw(value, "recipe", f"prompts.{split_name} row {number}") for number, value in enumerate(words["rows"], 1))


def read_function(words: Words, folders: Sequence[Path], split_name: str) -> Iterator[Raw]:
    """Yield the rows that a user's function returns."""
    label, function = words["function"], load_function(words["function"], folders)
    produced = run_user_code(label, lambda: list(function(**words.get("params", {}))))
    return (Raw(value, label, f"{label} row {number}") for number, value in enumerate(produced, 1))


# ---------------------------------------------------------------------------------------------------------------- files


def read_file(words: Words, folders: Sequence[Path], split_name: str) -> Iterator[Raw]:
    """Yield the rows of a file, in order; how it is read depends on its suffix."""
    label = words["file"]
    return (Raw(value, label, place) for value, place in rows_of_file(locate(label, folders)))


# ------------------------------------------------------------------------------------------------------------------ hub


def read_hub(words: Words, folders: Sequence[Path], split_name: str) -> Iterator[Raw]:
    """Yield the rows of a data set on the hub, from the local cache where it is there; the split's own name is the default."""
    name, split = words["hub"], words.get("split", split_name)
    where = place_of("hub", words, split_name)
    online = hub_answers()
    datasets = import_optional("datasets", "cpu", offline=not online)
    try:
        found = datasets.load_dataset(name, words.get("subset"), split=split, revision=words.get("revision"))
    except (ConnectionError, OSError) as error:
        raise UsageError(f"the hub cannot be reached: {first_line(error)}", where, OFFLINE if not online else ONLINE) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(first_line(error), where, ONLINE if online else OFFLINE) from None
    label = " ".join(str(part) for part in (name, words.get("subset"), split, words.get("revision")) if part)
    short = [column for column, feature in found.features.items() if getattr(feature, "dtype", "") == "float32"]
    rows = ({**row, **{column: as_written(row[column]) for column in short}} for row in found)
    return (Raw(row, label, f"{where} row {number}") for number, row in enumerate(rows, 1))


def as_written(value: Any) -> Any:
    """Return a float of 32 bits as the shortest number that it can be: 0.1, which as 64 bits would be 0.10000000149011612."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    shortened = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next((one for one in shortened if struct.unpack("f", struct.pack("f", one))[0] == value), value)


OFFLINE = """There is no network here, and the local cache does not have this data set.
Fetch it where there is one and copy the folder: HF_HOME=/path selfkd lint RECIPE, then set HF_HOME here.
Or use a local file: {file: my.jsonl, prompt: question, answer: answer}"""

ONLINE = """Check the name, `subset`, `split` and `revision`; a private or gated data set needs HF_TOKEN in the environment.
Or use a local file: {file: my.jsonl, prompt: question, answer: answer}"""


def hub_answers() -> bool:
    """Whether the hub answers within a few seconds; taken for granted behind a proxy, where we cannot know."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), REACH_SECONDS).close()
    except OSError:
        return False
    return True


def import_optional(name: str, extra: str, offline: bool = False) -> Any:
    """Import an optional package. `offline` reaches the hub client only where it was not imported before."""
    before = os.environ.get("HF_HUB_OFFLINE")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"this recipe needs the package '{name}': {error}", fix=install.extra(extra)) from None
    finally:
        if offline:
            os.environ.pop("HF_HUB_OFFLINE")
            os.environ.update({"HF_HUB_OFFLINE": before} if before is not None else {})


# ------------------------------------------------------------------------------------------------------------------ gym


def read_gym(words: Words, folders: Sequence[Path], split_name: str) -> Iterator[Raw]:
    """Yield problems of a reasoning-gym task; 500 of them and a seed of the split's own are the defaults.

    Meta gets the question and all that the task's scorer needs (reward/gym.py).
    """
    options = words["reasoning_gym"]
    if not isinstance(options, Mapping) or not isinstance(options.get("task"), str):
        raise UsageError("reasoning_gym needs a task", f"prompts.{split_name}", "reasoning_gym: {task: chain_sum, size: 500}")
    chosen = {"size": GYM_SIZE, "seed": gym_seed(split_name), **options}
    task, where = chosen.pop("task"), place_of("reasoning_gym", words, split_name)
    factory = import_optional("reasoning_gym.factory", "rewards")
    import_optional("reasoning_gym", "rewards")
    if task not in factory.DATASETS:
        raise UsageError(f"no task '{task}'.{did_you_mean(task, factory.DATASETS)}", where)
    known = [field.name for field in dataclasses.fields(factory.DATASETS[task][1])]
    unknown = [f"no option '{name}'.{did_you_mean(name, known)}" for name in chosen if name not in known]
    if unknown:
        raise UsageError(" ".join(unknown), where, f"Options of this task: {', '.join(known)}")
    try:
        entries = factory.create_dataset(task, **chosen)
        rows = [gym_row(entry) for entry in entries]
    except (AssertionError, ValueError, TypeError) as error:
        raise UsageError(f"reasoning-gym refuses these options: {first_line(error)}", where) from None
    return (Raw(row, f"reasoning_gym {task}", f"{where} row {number}") for number, row in enumerate(rows, 1))


def gym_seed(split_name: str) -> int:
    """Return a seed that differs between splits, so that train, dev and test do too; small tasks repeat themselves anyway."""
    return digest.seed("reasoning_gym", split_name) % (1 << 31)


def gym_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": entry["question"], "answer": entry["answer"], "question": entry["question"], "meta": entry["metadata"]}


# ---------------------------------------------------------------------------------------------------------------- evals


def read_evals(words: Words, folders: Sequence[Path], split_name: str) -> Iterator[Raw]:
    """Yield the rows of a data set that OpenAI's package `evals` brings, which need not be importable."""
    options, where = words["evals"], place_of("evals", words, split_name)
    if set(options) != {"set"} or not isinstance(options["set"], str):
        raise UsageError("evals needs a set, and nothing else", f"prompts.{split_name}", "evals: {set: quartz}")
    found = rows_of_set(options["set"], where)
    return (Raw(row if "map" in words else as_asked(row, place), found.label, place) for row, place in found.rows)


# ---------------------------------------------------------------------------------------------------------------- tables

_SUFFIXES = " or ".join([", ".join([*FILE_READERS][:-1]), [*FILE_READERS][-1]])

SOURCES: dict[str, Source] = {
    "hub": Source(
        read_hub,
        "A data set of the Hugging Face hub: its id. `split` may be sliced: `train[:7000]`.",
        ("subset", "split", "revision"),
    ),
    "file": Source(
        read_file,
        f'A {_SUFFIXES} file. A .json file is one array of rows, or an object of nothing but one: `{{"data": [...]}}`.'
        " A source that is plain text is such a file.",
    ),
    "function": Source(read_function, "`file.py:function` that returns the rows; `params` are its arguments.", ("params",)),
    "reasoning_gym": Source(
        read_gym,
        "A seeded task of reasoning-gym: `{task: chain_sum, size: 500, seed: 1}` and the task's own options.",
    ),
    "evals": Source(
        read_evals,
        "A data set of OpenAI's package `evals`, where it is installed (`pip install --no-deps evals`): `{set: quartz}`, 3,860 two-way"
        " questions on science (QuaRTz, Tafjord et al. 2019). `quartz[:3000]` is a slice of one. Its rows are read from the package's files,"
        " which it offers under MIT but for the sets that its licence file excepts; a run's prompts say which it is.",
    ),
    "rows": Source(read_rows, "The rows themselves, as texts or mappings. A source that is a list is that."),
}

COMMON_FIELDS = {
    "prompt": "Which column holds the prompt, a text or a conversation. Default: the first of `messages`, `prompt`, `question` that"
    " a row has; else the only one it has of `conversations`, `conversation`, `instruction` (Alpaca's, with `input` below it), `problem`."
    " A row is refused where another of these asks something else, or where `system_prompt`, `system`, `history`, `tools`, `input` or `context`"
    " would be lost.",
    "answer": "Which column holds the gold answer; a dot leads inside: `answers.text.0`. Default: `answer`; else the assistant's message"
    " that ends the conversation (by name: `answer: messages`), Alpaca's `output`, or `solution` beside `problem`; else there is none.",
    "messages": "Which column holds a conversation: `role` and `content`, or ShareGPT's `from` and `value`; as JSON text too. The assistant's message at its"
    " end is the gold answer, and the rest the prompt.",
    "map": "`file.py:function` from a raw row to `{prompt, answer, …}`; None leaves the row out.",
    "gold": "false: leave out the gold answer and every further column, so that no step can be shown them.",
    "limit": "Only so many prompts, after shuffling.",
    "shuffle": "A seed: take the prompts in an order hashed from it.",
    "template": "What the last user message becomes, for student and teacher alike; sees `prompt` and the columns.",
    "system": "A system message for every prompt.",
}
