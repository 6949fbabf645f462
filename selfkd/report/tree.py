"""A trace on a terminal: what came before as one tree, what came of it as another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from selfkd.report.node import Node, Trace

MOST = 5  # nodes of one role under one node; the rest are counted
NOT_PROVED = "not proved: "


def print_trace(found: Trace, to: Console, most: int = MOST) -> None:
    """Print what was traced, back and forward; `most` things of one role are listed at one place."""
    to.print(_line(found.subject))
    _print_half("came of", found.origins, most, to)
    _print_half("what came of it", found.uses, most, to)
    for said in found.unproved:
        to.print(Text(f"{NOT_PROVED}{said}", "yellow"), soft_wrap=True)


def _print_half(title: str, nodes: Sequence[Node], most: int, to: Console) -> None:
    tree = Tree(Text(title, "bold"), guide_style="dim")
    _grow(tree, nodes, most)
    if not nodes:
        tree.add(Text("nothing in this run", "dim"))
    to.print(tree)


def _grow(tree: Tree, nodes: Sequence[Node], most: int) -> None:
    for one in _shown(nodes, most):
        if isinstance(one, str):
            tree.add(Text(one, "dim"))
        else:
            _grow(tree.add(_line(one)), one.links, most)


def _shown(nodes: Sequence[Node], most: int) -> Iterator[Node | str]:
    """Yield the nodes, of each role at most so many, and where there are more how many that is."""
    seen: dict[str, int] = {}
    for node in nodes:
        seen[node.role] = seen.get(node.role, 0) + 1
        if seen[node.role] <= most:
            yield node
    for role, count in seen.items():
        if count > most:
            yield f"… {count - most} more of '{role}' (-n {count}, or --json)"


def _line(node: Node) -> Text:
    text = Text(f"{node.role}: " if node.role else "", "dim")
    kind = "" if node.kind == node.role else node.kind
    text.append(" ".join(filter(None, (kind, node.id))), "bold" if not node.role else "")
    text.append(f"  {node.said}" if node.said else "")
    return text.append(f"  {NOT_PROVED}{node.unproved}", "yellow") if node.unproved else text
