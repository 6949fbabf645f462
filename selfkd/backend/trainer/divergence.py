"""How far a student's next-token distribution is from its teacher's, token by token, from the hidden states of both.

Logits are made for a few tokens at a time, and again in the backward pass: of a whole sequence they are never there. Gradients go to the
student alone. Knows neither rows nor TRL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from selfkd.backend.base import DivergenceSpec
from selfkd.backend.memory import PIECE_ELEMENTS
from selfkd.backend.trainer.cpu_head import Heard
from selfkd.errors import UsageError

MOST_ELEMENTS = PIECE_ELEMENTS  # of a table of logits: 64 MiB in fp32, of which a dozen are there at once


class Compared(NamedTuple):
    """What is known of each token: how far the two are apart, its log-probability under both, and for the log the student's entropy,
    and whether both find the same token likeliest."""

    divergence: torch.Tensor
    logps: torch.Tensor
    teacher_logps: torch.Tensor
    entropy: torch.Tensor
    agreement: torch.Tensor


def compared(teacher: Heard, student: Heard, labels: torch.Tensor, how: DivergenceSpec, most: int = MOST_ELEMENTS) -> Compared:
    """Compare the two at the tokens that `labels` follow; UsageError where they have other vocabularies."""
    if teacher.weight.shape[0] != student.weight.shape[0]:
        sizes = f"{teacher.weight.shape[0]:,} entries and the student's {student.weight.shape[0]:,}"
        fix = "Name a teacher that descends from the same model."
        raise UsageError(f"the teacher's vocabulary has {sizes}, so no divergence is defined", "train.teacher", fix)
    assert len(teacher.hidden) == len(student.hidden) == len(labels)
    tokens = max(1, most // student.weight.shape[0])
    if len(labels) <= tokens:
        return _piece(teacher, student, labels, how, 0, len(labels))
    parts = [
        checkpoint(_piece, teacher, student, labels, how, at, at + tokens, use_reentrant=False, preserve_rng_state=False)
        for at in range(0, len(labels), tokens)
    ]
    return Compared(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _piece(teacher: Heard, student: Heard, labels: torch.Tensor, how: DivergenceSpec, first: int, last: int) -> Compared:
    with torch.no_grad():
        told = teacher.logits(first, last)
        p = torch.log_softmax(told, -1)
    logits, labels = student.logits(first, last), labels[first:last, None]
    q = torch.log_softmax(logits, -1)
    logps, teacher_logps = q.gather(-1, labels)[:, 0], p.gather(-1, labels)[:, 0]
    with torch.no_grad():
        entropy = -(q.exp() * q).sum(-1)
        agreement = (q.argmax(-1) == p.argmax(-1)).to(q.dtype)
    if how.temperature != 1.0:
        p, q = torch.log_softmax(told / how.temperature, -1), torch.log_softmax(logits / how.temperature, -1)
    return Compared(between(p, q, how), logps, teacher_logps, entropy, agreement)


def between(p: torch.Tensor, q: torch.Tensor, how: DivergenceSpec) -> torch.Tensor:
    """Return the divergence of each row of log-probabilities q, the student's, from the same row of p, the teacher's."""
    if 0 < how.top_k < p.shape[-1]:
        p, q = bucketed(p, q, how.top_k)
    entries = _entries(p, q, how)
    if how.clip_entry:
        entries = entries.clamp(max=how.clip_entry)
    values = entries.sum(-1)
    return values.clamp(max=how.clip) if how.clip else values


def bucketed(p: torch.Tensor, q: torch.Tensor, k: int) -> Sequence[torch.Tensor]:
    """Return both with the teacher's k likeliest entries, and all others as one: no divergence grows by that."""
    kept = p.topk(k, -1).indices
    return [_with_rest(table, kept) for table in (p, q)]


def _with_rest(table: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    rest = torch.logsumexp(table.scatter(-1, kept, -torch.inf), -1, keepdim=True)  # 1 - sum would lose a small rest to rounding
    return torch.cat([table.gather(-1, kept), rest], -1)


def _entries(p: torch.Tensor, q: torch.Tensor, how: DivergenceSpec) -> torch.Tensor:
    """Return what each entry of the vocabulary adds."""
    if how.kind == "forward":
        return p.exp() * (p - q)
    if how.kind == "reverse":
        return q.exp() * (q - p)
    m = torch.logaddexp(p + math.log(how.beta), q + math.log1p(-how.beta))
    return how.beta * p.exp() * (p - m) + (1 - how.beta) * q.exp() * (q - m)
