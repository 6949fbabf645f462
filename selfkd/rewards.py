"""Rewards as their users see them: finding a function, checking its parameters, trying it. Calling it: `selfkd.calling`.

A reward is a plain function in a file, named `file.py:function`; nothing to import, nothing to register. Nothing of a user's
is run here in the driver's own process except by `score_batch`: parameters are read from the source, and doctests, gold
checks and scoring happen in worker processes.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import selfkd
from selfkd import digest
from selfkd.calling import CONTRACT, PLURAL, Result, Row, keys_of, load
from selfkd.calling import failed as failed
from selfkd.errors import UsageError
from selfkd.types import Function
from selfkd.workers import ask
from selfkd.workers import spread as spread

FORMS = ("{}", "Answer: {}", "#### {}", "\\boxed{{{}}}", "<answer>{}</answer>")  # ways in which gold answers are stated


# -------------------------------------------------------------------------------------------------------------- finding


def builtin_folder() -> Path:
    """The folder that holds the shipped `recipes/` and `reward/`: a checkout's root, or a wheel's own share."""
    package = Path(selfkd.__file__).resolve().parent
    for folder in (package.parent, package / "share"):
        if (folder / "recipes").is_dir() and (folder / "reward").is_dir():
            return folder
    return package / "share"


def locate(name: str, folders: Iterable[Path], *inside: str) -> Path:
    """A file next to the recipe (`folders`), then in the working directory, then built in; `inside` are tried as prefixes."""
    places = dict.fromkeys(folder.absolute() for folder in (*folders, Path.cwd(), builtin_folder()))
    tried = [folder / prefix / name for folder in places for prefix in ("", *inside)]
    for path in tried:
        if path.is_file():
            return path
    near = {f"{path.parent}" for path in tried if path.parent.is_dir()}
    names = [other.name for folder in sorted(near) for other in Path(folder).iterdir() if other.suffix == Path(name).suffix]
    looked = "Looked in: " + ", ".join(dict.fromkeys(str(path.parent) for path in tried))
    raise UsageError(f"no file '{name}'.{did_you_mean(Path(name).name, names)}", name, looked)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def find(reference: str, folders: Sequence[Path]) -> Function:
    """`reward/math.py:correct` as a Function; nothing in the file is run."""
    file, colon, name = reference.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"'{reference}' does not name a function", reference, "Write it as file.py:function")
    path = locate(file, folders)
    known = names_in(parsed(path))
    if name not in known:
        there = sorted({one for one in known if not one.isupper() and not one.startswith("_")})
        listed = f"Functions there: {', '.join(there)}" if there else "There is no function in that file."
        raise UsageError(f"no function '{name}' in {path}.{did_you_mean(name, known)}", reference, listed)
    return Function(name, path, digest.code(path))


def parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text("utf-8"), str(path))
    except SyntaxError as error:
        raise UsageError(f"not Python: {error.msg}", f"{path}:{error.lineno}") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"not Python: {error}", str(path)) from None


def names_in(tree: ast.Module) -> list[str]:
    """What the file offers at its top level: its functions, and what it imports by name or assigns."""
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found += [alias.asname or alias.name for alias in node.names if node.module != "__future__"]
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return found


# ------------------------------------------------------------------------------------------------------------- checking


def check(function: Function, columns: Collection[str] | None) -> list[str]:
    """Problems with the function's parameters, one sentence each; `columns` are the meta columns, None where not known.

    Read from the source, nothing is run; a name that the file imports or assigns has no parameters to read.
    """
    node = definition(function)
    if node is None:
        return []
    named = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    where = f"{function.path}:{node.lineno}  {function.name}"
    found = [f"{where}: '{one.arg}' can only be given by position; names are the contract" for one in node.args.posonlyargs]
    for name in required(node):
        if name not in CONTRACT and name not in function.params and columns is not None and name not in columns:
            hint = did_you_mean(name, (*CONTRACT, *columns))
            also = f" (meta columns: {', '.join(sorted(columns))})" if columns else ""
            found.append(f"{where} asks for '{name}', which is neither {', '.join(CONTRACT)} nor a meta column{also}.{hint}")
    for name in function.params:
        if name not in named and node.args.kwarg is None:
            found.append(f"{where} has no parameter '{name}'.{did_you_mean(name, named)}")
    if any(name in PLURAL for name in named):
        for name in ("completion", "sample"):
            if name in named and name not in function.params:
                found.append(f"{where} asks for '{name}' of one sample and for lists over a group; take '{name}s'")
    return found


def definition(function: Function) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    for node in reversed(parsed(function.path).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function.name:
            return node
    return None


def wants(function: Function) -> frozenset[str] | None:
    """The keys of a row that the function can see, from its parameters; None (all) where it takes `**kwargs` or is not found."""
    node = definition(function)
    if node is None or node.args.kwarg:
        return None
    names = (argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
    return keys_of(names, function.params)


def required(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    args = node.args
    plain = [argument.arg for argument in args.args]
    keyword = [argument.arg for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    return plain[: len(plain) - min(len(args.defaults), len(plain))] + keyword


# ------------------------------------------------------------------------------------------- for lint, try and the steps


def score_batch(function: Function, rows: Sequence[Row]) -> list[Result]:
    """(value, why) of each row, in this process: no deadline, no memory cap, and the function's prints are seen.

    A row has the keys group, prompt, completion, answer, meta (a dict or its JSON text), sample and token_ids.
    """
    results: list[Result] = [(None, "")] * len(rows)
    for place, value, why in load(function.path, function.name, function.params).results(rows):
        results[place] = (value, why)
    return results


def cut(rows: Iterable[dict[str, Any]], size: int = 1024) -> Iterator[list[dict[str, Any]]]:
    """Batches of about `size` rows that never part the samples of one prompt; rows of a group must be neighbours."""
    batch: list[dict[str, Any]] = []
    for row in rows:
        if len(batch) >= size and row["group"] != batch[-1]["group"]:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def doctests(function: Function, timeout: float = 60.0) -> list[str]:
    """Failures of the doctests of the function's file, run in a worker."""
    found: list[str] = ask(function, "doctests", timeout)
    return found


def notes(function: Function, timeout: float = 60.0) -> Any:
    """What the function's file has to say of this host (its `notes()`), for a step's notes; None where it defines none."""
    node = definition(replace(function, name="notes"))
    return ask(function, "notes", timeout) if node and not required(node) else None


def gold_check(function: Function, prompts: Iterable[Row], timeout: float = 10.0) -> tuple[int, int, str]:
    """(passed, total, first failure) with each gold answer scored as if it were the completion; passing is above one half.

    An answer may be stated in any usual form (FORMS), since a format check is right to refuse a bare number. Prompts without an
    answer do not count, and a function that never looks at the answer has nothing to pass: (0, 0, "").
    `prompts` have the keys id, prompt, answer and meta.
    """
    node = definition(function)
    named = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)] if node else ["answer"]
    if not {"answer", "answers"} & set(named):
        return 0, 0, ""
    left = [row for row in prompts if row.get("answer") is not None]
    total, first = len(left), ""
    for form in FORMS:
        batches = cut((stated(row, form) for row in left), 256)
        results = [result for batch in spread(function, batches, 1, timeout) for result in batch]
        failures = [(row, result) for row, result in zip(left, results, strict=True) if not (result[0] or 0) > 0.5]
        first = first or next(
            (f"prompt {row['id']}, answer {row['answer']!r}: {told(*result)}" for row, result in failures), ""
        )
        left = [row for row, _ in failures]
    return total - len(left), total, first if left else ""


def told(value: float | None, why: str) -> str:
    return why if value is None else f"scored {value:g} {why}".rstrip()


def stated(row: Row, form: str) -> dict[str, Any]:
    completion = form.format(row["answer"])
    return {**row, "group": row["id"], "completion": completion, "sample": {}, "token_ids": []}
