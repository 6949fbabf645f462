"""The one place where messages become token ids, for generation and for training alike.

A prompt is encoded here once, on both sides, so a model is trained on exactly the ids it was asked with: one BOS at most, and an
end token to learn. Imports transformers only when called.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache(maxsize=4)
def tokenizer(folder: str) -> Any:
    """Load the tokenizer of a model folder, from local files only and without the folder's own code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def encode_prompt(tok: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the ids of what the model sees before it answers.

    A tokenizer without a chat template gets the bare contents, joined by blank lines.
    """
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    if tok.chat_template:
        text = tok.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    else:
        text = "\n\n".join(message["content"] for message in plain)
    return _one_bos(tok, tok(text, add_special_tokens=not tok.chat_template)["input_ids"])


def _one_bos(tok: Any, ids: list[int]) -> list[int]:
    """Keep one BOS where the template wrote one and the tokenizer added another. Never adds one."""
    while len(ids) > 1 and tok.bos_token_id is not None and ids[0] == ids[1] == tok.bos_token_id:
        ids = ids[1:]
    return list(ids)


def encode_completion(tok: Any, text: str, sampled: Iterable[int] | None = None, ended: bool = True) -> list[int]:
    """Return the ids to learn: as sampled where the model wrote the text itself, else encoded; an end token iff the text ended.

    A completion cut off at its token limit gets no end token: it would teach the model to stop mid-sentence.
    """
    ids = list(sampled) if sampled is not None else list(tok(text, add_special_tokens=False)["input_ids"])
    if ended and (not ids or ids[-1] not in end_ids(tok)):
        ids.append(tok.eos_token_id)
    return ids


@lru_cache(maxsize=4)
def _configured_ends(folder: str) -> frozenset[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.is_file():
            value = json.loads(path.read_text("utf-8")).get("eos_token_id")
            if value is not None:
                found.update(value if isinstance(value, list) else [value])
    return frozenset(found)


def end_ids(tok: Any) -> frozenset[int]:
    """Return every token that ends an answer: the tokenizer's, and those that the model's configuration lists."""
    own = frozenset() if tok.eos_token_id is None else frozenset([tok.eos_token_id])
    return own | _configured_ends(tok.name_or_path)
