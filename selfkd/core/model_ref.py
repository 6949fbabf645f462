"""How a recipe names a model: `role@when`, such as `policy@base` or `policy@round-3`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from selfkd.core.wording import did_you_mean

WHENS = ("now", "start", "base", "warm", "best")
ROUND = re.compile(r"round-(\d+)")


@dataclass(frozen=True)
class ModelRef:
    """`when` is now (the pool's newest), start (entered the round), base, warm (left round 0), best, or round-K."""

    role: str
    when: str

    @classmethod
    def parse(cls, text: str, role: str = "") -> ModelRef:
        """`policy@base`; a bare word is a role at `now`, or with `role` given a time of that role."""
        if "@" not in text and role:
            return cls(role, text)
        first, at, when = text.partition("@")
        return cls(first, when if at else "now")

    def __str__(self) -> str:
        return self.role if self.when == "now" else f"{self.role}@{self.when}"

    @property
    def round(self) -> int | None:
        """The K of round-K, None for the named times."""
        found = ROUND.fullmatch(self.when)
        return int(found[1]) if found else None

    def problem(self, roles: list[str], rounds: int, best_is_named: bool) -> str:
        """Why a recipe of so many rounds with these roles has no such model, or ''."""
        if self.role not in roles:
            also = f" Did you mean 'policy@{self.role}'?" if self.role in WHENS else did_you_mean(self.role, roles)
            return f"no model '{self}'.{also} Roles: {', '.join(roles)}"
        if self.when == "best" and not best_is_named:
            return "which round is best? Write best: {metric: dev/..., mode: max} in the recipe"
        if self.when in WHENS:
            return ""
        if self.round is None:
            return f"no model '{self}'.{did_you_mean(self.when, WHENS)} After '@' comes {', '.join(WHENS)} or round-K"
        return "" if self.round < rounds else f"'{self.when}' is never there to use: the last round is {rounds}"
