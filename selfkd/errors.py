"""Every error a user can meet, as a tree.

SelfkdError            exit code 1
├── RecipeError        2   the recipe is wrong; carries every problem found, not the first one
├── UsageError         2   the command line, or a file it names, is wrong
├── ChainError         1   what is on disk does not belong to this chain, or was damaged
├── GuardError         1   a number that must not happen happened (NaN, no rows, unchanged weights)
├── RewardError        1   too many samples could not be scored
├── BackendError       1   an engine, a trainer or a worker failed
│   └── WeightsError   1   the engine does not generate with the weights it claims
├── SandboxError       1   this host cannot hold model-written code, or the sandbox itself failed
├── StorageError       1   the disk refused
├── BusyError          1   another driver holds this run
└── Stopped            75  stopped on request; the same command goes on (schedulers requeue on this code)

A message says where, what, and what to do. Errors cross process borders (Ray), so each must survive pickling.
"""


def printable(text: str) -> str:
    """Return the text with halves of surrogate pairs, which data may hold and no terminal takes, as `\\ud83d`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


STOPPED = "stopped on request"


class SelfkdError(Exception):
    """`where` names the place, `what` the fact, `fix` what to do; the last may be empty only where nothing can be done."""

    code = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = printable(what), printable(where), printable(fix)
        super().__init__(self.what, self.where, self.fix)

    def __str__(self) -> str:
        head = f"{self.where}  {self.what}" if self.where else self.what
        return head + "".join(f"\n    {line}" for line in self.fix.splitlines())


class RecipeError(SelfkdError):
    """All problems of a recipe at once: `what` holds one line per problem."""

    code = 2


class UsageError(SelfkdError):
    code = 2


class ChainError(SelfkdError):
    pass


class GuardError(SelfkdError):
    pass


class RewardError(SelfkdError):
    pass


class BackendError(SelfkdError):
    pass


class WeightsError(BackendError):
    pass


class SandboxError(SelfkdError):
    pass


class StorageError(SelfkdError):
    pass


class BusyError(SelfkdError):
    pass


class Stopped(SelfkdError):
    """Raised at a safe point after SIGTERM or Ctrl-C: everything committed stays, the chunk in flight is asked again."""

    code = 75
