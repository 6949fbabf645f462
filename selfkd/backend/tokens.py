"""The one place where messages become token ids, for generation and for training alike.

A prompt is encoded here once, on both sides, so a model is trained on exactly the ids it was asked with: one BOS at most, and an
end token to learn. Data is text: what a prompt or a gold answer says of a special token (`<|im_end|>`) never becomes that token.
Imports transformers only when called.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from selfkd.errors import UsageError

Messages = Sequence[Mapping[str, str]]
Conversation = tuple[tuple[str, str], ...]  # (role, content) of each message: all that decides the ids
KEPT_TOKENS = 2**23  # of encoded prompts: 32 MB of ids, and about as much of text; 29 thousand prompts of a few-shot recipe
BATCH = 1_000  # prompts per call of a tokenizer, which encodes them on all cores
ANCHORS = ("", "\n")  # what a text may be encoded behind: some tokenizers put a blank in front of whatever comes first
BEFORE = 8  # tokens of a prompt that decide how the text behind them begins
FIRST_MARK = 0x100000  # private characters, which stand for special tokens in data while a template is rendered
SHOWN = 60  # characters of a prompt in an error
UNWRITABLE = "names a special token, and this tokenizer cannot write that name as text"
REWORD = "Reword it, or leave it out."


@lru_cache(maxsize=4)
def tokenizer(folder: str) -> Any:
    """Load the tokenizer of a model folder, from local files only and without the folder's own code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


# ---- prompts ----


def encode_prompt(tok: Any, messages: Messages, name: str = "") -> list[int]:
    """Return the ids of what the model sees before it answers.

    A tokenizer without a chat template gets the bare contents, joined by blank lines. UsageError with the place `name` where a
    content holds the name of a special token that cannot be written as text.
    """
    return encode_prompts(tok, [messages], [name])[0]


def encode_prompts(tok: Any, conversations: Sequence[Messages], names: Sequence[str]) -> list[list[int]]:
    """Return the ids of many prompts: those of `encode_prompt`, in less time. One that was asked before is not encoded again."""
    known = _encoded(tok, str(tok.chat_template))
    said = [tuple((message["role"], message["content"]) for message in messages) for messages in conversations]
    new: dict[Conversation, int] = {}
    for place, key in enumerate(said):
        if key not in known.ids:
            new.setdefault(key, place)
    fresh = dict(
        zip(new, _encode(tok, [conversations[i] for i in new.values()], [names[i] for i in new.values()]), strict=True)
    )
    found = [(fresh[key] if key in fresh else known.ids[key]).tolist() for key in said]
    known.keep(fresh)
    return found


def _encode(tok: Any, conversations: Sequence[Messages], names: Sequence[str]) -> list[array[int]]:
    apart = [any(_reserved(tok).search(message["content"]) for message in messages) for messages in conversations]
    whole = [messages for messages, special in zip(conversations, apart, strict=True) if not special]
    encoded: list[list[int]] = []
    for start in range(0, len(whole), BATCH):
        texts = [_rendered(tok, messages) for messages in whole[start : start + BATCH]]
        encoded += tok(texts, add_special_tokens=not tok.chat_template)["input_ids"]
    ready = iter(encoded)
    return [
        array("i", _one_bos(tok, _encoded_apart(tok, messages, name) if special else next(ready)))
        for messages, name, special in zip(conversations, names, apart, strict=True)
    ]


class Encoded:
    """The prompts that a tokenizer encoded last, {conversation: ids}; at most KEPT_TOKENS of them, the oldest go first.

    Each answer of a prompt is a request, and each row that it became is encoded again by every rank.
    """

    def __init__(self) -> None:
        self.ids: dict[Conversation, array[int]] = {}
        self.tokens = 0

    def keep(self, fresh: Mapping[Conversation, array[int]]) -> None:
        self.ids.update(fresh)
        self.tokens += sum(map(len, fresh.values()))
        while self.tokens > KEPT_TOKENS:
            self.tokens -= len(self.ids.pop(next(iter(self.ids))))


@lru_cache(maxsize=4)
def _encoded(tok: Any, template: str) -> Encoded:
    return Encoded()


def _rendered(tok: Any, messages: Messages) -> str:
    if not tok.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    text: str = tok.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    return text


def _one_bos(tok: Any, ids: list[int]) -> list[int]:
    """Keep one BOS where the template wrote one and the tokenizer added another. Never adds one."""
    while len(ids) > 1 and tok.bos_token_id is not None and ids[0] == ids[1] == tok.bos_token_id:
        ids = ids[1:]
    return list(ids)


def opening(messages: Messages) -> str:
    """Return how the last message begins, in quotes: what a person knows a prompt by."""
    text = " ".join(messages[-1]["content"].split()) if messages else ""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


# ---- the names of special tokens, in data ----


@lru_cache(maxsize=4)
def _special(tok: Any) -> dict[str, tuple[int, Any]]:
    """Return {text: (id, token)} of what only a template may write, the longest first: special tokens, and those that end an answer."""
    ends = end_ids(tok)
    found = {token.content: (i, token) for i, token in tok.added_tokens_decoder.items() if token.special or i in ends}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


@lru_cache(maxsize=4)
def _reserved(tok: Any) -> re.Pattern[str]:
    """Match the names of special tokens."""
    return re.compile("|".join(map(re.escape, _special(tok))) or "(?!)")


@lru_cache(maxsize=4)
def _written(tok: Any) -> re.Pattern[str]:
    """Match the special tokens in a rendered prompt, each with the white space that it swallows."""
    space = r"\s*"
    names = [f"{space * token.lstrip}{re.escape(name)}{space * token.rstrip}" for name, (_, token) in _special(tok).items()]
    return re.compile(f"({'|'.join(names)})")


def _encoded_apart(tok: Any, messages: Messages, name: str) -> list[int]:
    """Encode a prompt in which data names special tokens: those that the template writes are special, those in the data are text.

    The names are marked before the template sees them, and the rendered text is cut at the template's own special tokens, where
    the tokenizer cuts it too. That it does is tried on the same prompt, with a letter in place of each mark.
    """
    if not tok.chat_template:
        text = _rendered(tok, messages)
        _plain(tok, text, name)  # refuses what cannot be written
        return list(tok(text, split_special_tokens=True)["input_ids"])
    names = list(_special(tok))
    marks = {text: chr(FIRST_MARK + place) for place, text in enumerate(names)}
    mark = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + len(names) - 1)}]")
    if any(mark.search(message["content"]) for message in messages):
        raise UsageError(UNWRITABLE, name, f"Leave out its private characters (U+{FIRST_MARK:X} and up).")
    marked = [{**message, "content": _reserved(tok).sub(lambda hit: marks[hit[0]], message["content"])} for message in messages]
    text = _rendered(tok, marked)
    trial = mark.sub("x", text)
    expected = tok(trial, add_special_tokens=False)["input_ids"]
    for anchor in ANCHORS:
        if _pieces(tok, trial, anchor) == expected:
            return _pieces(tok, text, anchor, name, lambda part: mark.sub(lambda hit: names[ord(hit[0]) - FIRST_MARK], part))
    raise UsageError(UNWRITABLE, name, REWORD)


def _pieces(tok: Any, text: str, anchor: str, name: str = "", unmarked: Callable[[str], str] = str) -> list[int]:
    """Encode what stands between the special tokens of a rendered prompt as text; `anchor` goes in front of all but the first."""
    ids: list[int] = []
    for place, part in enumerate(_written(tok).split(text)):
        if place % 2:
            ids.append(_special(tok)[part if part in _special(tok) else part.strip()][0])
        elif part:
            ids += _behind(tok, unmarked(part), anchor if ids else "", name)
    return ids


def _plain(tok: Any, text: str, name: str = "") -> list[int]:
    """Encode a text in which nothing is special; UsageError where a token would be special all the same, or would end an answer."""
    ids = list(tok(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    forbidden = end_ids(tok) | ({i for i, _ in _special(tok).values()} if _reserved(tok).search(text) else set())
    if not (forbidden - {tok.unk_token_id}).isdisjoint(ids):
        raise UsageError(UNWRITABLE, name, REWORD)
    return ids


def _behind(tok: Any, text: str, anchor: str, name: str = "") -> list[int]:
    """Return the ids of `text` as they are behind `anchor`, as far as the two can be told apart."""
    ids, lead = _plain(tok, anchor + text, name), _plain(tok, anchor) if anchor else []
    return ids[len(lead) :] if ids[: len(lead)] == lead else _plain(tok, text, name)


# ---- completions ----


def encode_completion(
    tok: Any, text: str, sampled: Iterable[int] | None = None, ended: bool = True, name: str = ""
) -> list[int]:
    """Return the ids to learn: as sampled where the model wrote the text itself, else encoded; an end token iff the text ended.

    A completion cut off at its token limit gets no end token: it would teach the model to stop mid-sentence.
    """
    ids = list(sampled) if sampled is not None else _plain(tok, text, name)
    if ended and (not ids or ids[-1] not in end_ids(tok)):
        ids.append(tok.eos_token_id)
    return ids


def ids_of_text(
    tok: Any, prompt: Sequence[int], ids: Sequence[int], text: str, skip_special: bool = True
) -> tuple[list[int], int]:
    """Return the ids of a text that ends inside what `ids` say behind `prompt`, and how many of them are as sampled.

    Tokens wholly inside the text are kept. Where it ends inside a token, its last characters are encoded anew, so that the ids say
    the text to the letter wherever the tokenizer can.
    """
    before = list(prompt[-BEFORE:])

    def said(answer: list[int]) -> str | None:
        lead, whole = (
            tok.decode(part, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
            for part in (before, before + answer)
        )
        return whole[len(lead) :] if whole.startswith(lead) else None

    for count in range(len(ids), -1, -1):
        kept = list(ids[:count])
        start = said(kept)
        if start is None or not text.startswith(start):
            continue
        rest = text[len(start) :]
        for tail in [_behind(tok, rest, anchor) for anchor in ANCHORS] if rest else [[]]:
            if said(kept + tail) == text:
                return kept + tail, count
    return _plain(tok, text), 0


# ---- end tokens ----


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


# ---- what engines are asked ----


def encode_requests(tok: Any, conversations: Sequence[Messages], room: int, context: int) -> list[list[int]]:
    """Return the ids of prompts whose answers may have `room` tokens; UsageError names one that `context` does not hold with them."""
    places = [f"the prompt {opening(messages)}" for messages in conversations]
    prompts = encode_prompts(tok, conversations, places)
    for place, ids in zip(places, prompts, strict=True):
        _must_fit(place, len(ids), room, context)
    return prompts


def encode_samples(tok: Any, rows: Sequence[Mapping[str, Any]], room: int, context: int) -> tuple[list[list[int]], list[int]]:
    """Return the ids of prompt and completion of each row, as a training row would have them, and where its completion begins.

    UsageError names a row that `context` does not hold with `room` more tokens.
    """
    places = [f"sample {row['id']} of the prompt {opening(row['messages'])}" for row in rows]
    prompts, found = encode_prompts(tok, [row["messages"] for row in rows], places), []
    for row, prompt, place in zip(rows, prompts, places, strict=True):
        ended = row["finish_reason"] == "stop"
        found.append(prompt + encode_completion(tok, row["text"] or "", row["token_ids"], ended, place))
        _must_fit(place, len(found[-1]), room, context)
    return found, [len(prompt) for prompt in prompts]


def _must_fit(place: str, length: int, room: int, context: int) -> None:
    if length + room > context:
        what = f"has {length} tokens and {room} more are to be generated, but the context holds {context}"
        raise UsageError(what, place, "Shorten or drop it, lower max_tokens, or raise the recipe's `context`.")
