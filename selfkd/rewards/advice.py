"""What to do about the reason for which a reward could not be loaded or could not score: the ways out of this package's own rules."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

# A variable with such a word in its name is not handed on: API_KEY, HF_TOKEN and PGPASSWORD, but not TOKENIZERS_PARALLELISM.
# Short words count where one begins: DB_PASS, but not COMPASS; PWD by itself is the folder of a shell.
SECRET = re.compile(
    r"((TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|WEBHOOK|BEARER|COOKIE)|(?<![A-Z])((PG)?PASS|PAT|O?AUTH|DSN)|(?<=_)PWD)S?\d*(_|$)"
    r"|(^|_)(DATABASE|DB|POSTGRES\w*|MYSQL|MONGO\w*|REDIS|AMQP|RABBITMQ|BROKER)_UR[IL](_|$)",
    re.IGNORECASE,
)
PASSWORD_IN_URL = re.compile(r"\w+://[^/\s@]*:[^/\s@]+@")

COPIED = (
    "A reward runs from a copy of its file in an empty folder, as a run freezes it, with the local modules that it imports."
)
DATA = f"""{COPIED}
Name data files in a list at its top level, FILES = ["words.txt"], and open them beside it: Path(__file__).parent / "words.txt"."""
MODULE = f"""{COPIED}
'{{}}' is not among them: import it by its name from beside the file, or relatively; where only running tells the name, add FILES = ["{{}}"]."""
TEXTS = "Prompts and completions are texts here; a function that takes `completions: list[list[dict]]` gets lists of messages."


def is_secret(variable: str, allowed: Collection[str] = (), value: str = "") -> bool:
    """Whether a variable of the environment is withheld from rewards: it looks like a secret, and nobody let it through.

    Its name tells, or a password in an address that it holds.
    """
    looks_so = SECRET.search(variable) is not None or PASSWORD_IN_URL.search(value) is not None
    return variable not in allowed and looks_so


def way_out(reason: str, file: str, allowed: Collection[str] = ()) -> str:
    """Return what to do about a reason that the function of `file` gave; "" where it is not about how rewards are run."""
    words = set(re.findall(r"\w+", reason))
    if withheld := sorted(name for name in words & os.environ.keys() if is_secret(name, allowed, os.environ[name])):
        names = ", ".join(withheld)
        fix = f"let it through by its name in the machine file (--on): environment: [{names}]"
        return f"{names} is withheld from rewards, for it looks like a secret: {fix}"
    if module := re.match(r"ModuleNotFoundError: No module named '(\w+)", reason):
        folders = [*Path(file).absolute().parents[:3], *Path(file).absolute().parent.glob("*/")]
        near = [folder / name for folder in folders for name in (f"{module[1]}.py", f"{module[1]}/__init__.py")]
        left = next((path for path in near if path.exists()), None)
        return MODULE.format(left, os.path.relpath(left, Path(file).parent)) if left else ""
    if re.match(r"(FileNotFound|NotADirectory)Error: .*'[^/][^']*'$", reason):
        return DATA
    return TEXTS if reason.startswith("TypeError: string indices must be") else ""
