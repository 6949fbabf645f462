"""What a trace is made of: one thing in a run, what is known of it, and the things it hangs together with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Node:
    """`role` is what it is to the one above (chosen, prompt, made by); `kind` and `id` name it; `said` is a line for a person.

    `facts` are the same for a program, whole lists of ids among them. `unproved` says why the link to the one above does not hold for
    certain, '' where the records prove it.
    """

    role: str
    kind: str
    id: str = ""
    said: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    unproved: str = ""
    links: Sequence[Node] = ()

    def walk(self) -> Iterator[Node]:
        yield self
        for one in self.links:
            yield from one.walk()


@dataclass(frozen=True)
class Trace:
    """One thing of a run, what it came of, and what came of it. `unproved` are files that it rests on and that are not as committed."""

    subject: Node
    origins: Sequence[Node]
    uses: Sequence[Node]
    unproved: Sequence[str] = ()

    def doubts(self) -> list[str]:
        """Return all that could not be proved, once each."""
        nodes = [self.subject, *(node for one in (*self.origins, *self.uses) for node in one.walk())]
        said = [f"{node.kind} {node.id}: {node.unproved}".replace(" :", ":") for node in nodes if node.unproved]
        return list(dict.fromkeys([*said, *self.unproved]))
