"""The one place where messages become token ids, for generation and for training alike.

A prompt is encoded here once, on both sides, so a model is trained on exactly the ids it was asked with: one BOS at most, and an
end token to learn. Data is text: what a prompt or a gold answer says of a special token (`<|im_end|>`) never becomes that token.
How the model of a folder is spoken to stands in its chat.json (chat.py). Imports transformers only when called.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from selfkd.backend import chat_trial
from selfkd.backend.chat import PARAGRAPH, PLAIN, Chat, read
from selfkd.backend.chat_template import Write, said_by
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
BORDER = 64  # characters of a bare prompt that decide how its answer is encoded
OF_A_PROMPT = ("the prompt ", "sample ")  # how the place in an error begins that only names a prompt, or an answer to one
REFUSED = "the model's chat template refuses it"
REARRANGE = "Write its turns otherwise: the model's template knows no other way."
NO_END = "neither the tokenizer nor the model's configuration names an end token, so no answer could end"
NAME_END = "Set `eos_token` in tokenizer_config.json, or `eos_token_id` in generation_config.json, of the model's folder."


@lru_cache(maxsize=4)
def tokenizer(folder: str) -> Any:
    """Load the tokenizer of a model folder, from local files only and without the folder's own code."""
    from transformers import AutoTokenizer

    return with_chat(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), read(folder))


def with_chat(tok: Any, chat: Chat) -> Any:
    """Have a tokenizer write conversations as `chat` says, from now on; return it. Before anything is encoded with it."""
    tok.selfkd_chat = chat
    return tok


def chat_of(tok: Any) -> Chat:
    """Return how conversations are written with a tokenizer."""
    found: Chat = getattr(tok, "selfkd_chat", PLAIN)
    return found


# ---- prompts ----


def encode_prompt(tok: Any, messages: Messages, name: str = "") -> list[int]:
    """Return the ids of what the model sees before it answers.

    A tokenizer without a chat template gets the bare contents, joined by blank lines. UsageError with the place `name` where a
    content holds the name of a special token that cannot be written as text.
    """
    return encode_prompts(tok, [messages], [name])[0]


def encode_prompts(tok: Any, conversations: Sequence[Messages], names: Sequence[str]) -> list[list[int]]:
    """Return the ids of many prompts: those of `encode_prompt`, in less time. One that was asked before is not encoded again."""
    known = _encoded(tok, str(tok.chat_template), repr(chat_of(tok)))
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
    whole = [(messages, name) for messages, name, special in zip(conversations, names, apart, strict=True) if not special]
    encoded: list[list[int]] = []
    for start in range(0, len(whole), BATCH):
        texts = [rendered(tok, messages, name) for messages, name in whole[start : start + BATCH]]
        encoded += tok(texts, add_special_tokens=not tok.chat_template)["input_ids"]
    ready = iter(encoded)
    return [
        array("i", _bordered(tok, _encoded_apart(tok, messages, name) if special else next(ready)))
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
def _encoded(tok: Any, template: str, chat: str) -> Encoded:
    return Encoded()


def rendered(tok: Any, messages: Messages, name: str = "") -> str:
    """Return a prompt as the text that the model is shown; UsageError, with the place `name`, in the words of a template that refuses it."""
    chat = chat_of(tok)
    if not tok.chat_template:
        return PARAGRAPH.join(message["content"] for message in messages)
    try:
        return writer(tok, chat)(chat.arranged(messages), True)
    except Exception as error:  # a template is a program of somebody else's, so any exception is possible
        what = f"{REFUSED}: {said_by(error)} (turns: {', '.join(m['role'] for m in messages)})"
        raise UsageError(what, name or named(messages), REARRANGE) from None


def writer(tok: Any, chat: Chat) -> Write:
    """Return what renders messages with the template of a tokenizer, given what `chat` says and not arranged yet."""
    given = chat.given()

    def write(messages: Messages, opens: bool) -> str:
        text: str = tok.apply_chat_template(list(messages), add_generation_prompt=opens, tokenize=False, **given)
        return text

    return write


def _bordered(tok: Any, ids: list[int]) -> list[int]:
    """Return a prompt that begins with one BOS where the template wrote one and the tokenizer another, and ends open.

    Some tokenizers put an end token behind a text that no template ended; a prompt of an older run keeps it.
    """
    while len(ids) > 1 and tok.bos_token_id is not None and ids[0] == ids[1] == tok.bos_token_id:
        ids = ids[1:]
    while ids and not tok.chat_template and chat_of(tok).behind and ids[-1] in end_ids(tok) - {tok.bos_token_id}:
        ids = ids[:-1]
    return list(ids)


def opening(messages: Messages) -> str:
    """Return how the last message begins, in quotes: what a person knows a prompt by."""
    text = " ".join(messages[-1]["content"].split()) if messages else ""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def named(messages: Messages) -> str:
    """Return how an error names a prompt of which only its words are known."""
    return f"{OF_A_PROMPT[0]}{opening(messages)}"


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
        text = rendered(tok, messages, name)
        _plain(tok, text, name)  # refuses what cannot be written
        return list(tok(text, split_special_tokens=True)["input_ids"])
    names = list(_special(tok))
    marks = {text: chr(FIRST_MARK + place) for place, text in enumerate(names)}
    mark = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + len(names) - 1)}]")
    if any(mark.search(message["content"]) for message in messages):
        raise UsageError(UNWRITABLE, name, f"Leave out its private characters (U+{FIRST_MARK:X} and up).")
    marked = [{**message, "content": _reserved(tok).sub(lambda hit: marks[hit[0]], message["content"])} for message in messages]
    text = rendered(tok, marked, name)
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
    return _without_control(tok, text, ids, name)


def _without_control(tok: Any, text: str, ids: list[int], name: str) -> list[int]:
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
    tok: Any,
    text: str,
    sampled: Iterable[int] | None = None,
    ended: bool = True,
    name: str = "",
    messages: Messages = (),
) -> list[int]:
    """Return the ids to learn: as sampled where the model wrote the text itself, else encoded as behind its prompt `messages`.

    One that ended has the end of a turn as the template writes it, so that gold and own answers end alike. A completion cut off at its
    token limit gets no end token: it would teach the model to stop mid-sentence.
    """
    if sampled is not None:
        ids = list(sampled)
    else:
        ids = _behind_prompt(tok, messages, text, name) if chat_of(tok).behind else _plain(tok, text, name)
    return ids + turn_end(tok) if ended and (not ids or ids[-1] not in end_ids(tok)) else ids


def _behind_prompt(tok: Any, messages: Messages, text: str, name: str) -> list[int]:
    """Encode an answer as it stands behind its prompt: some tokenizers put a blank in front of a text that stands alone.

    Where the two together would be merged into a token over the border, which no model draws, the answer is encoded behind ANCHORS.
    """
    if not text:
        return []
    lead = _lead(tok, repr(chat_of(tok))) if tok.chat_template else _ending(tok, messages)
    trial = _reserved(tok).sub("x", text)
    expected = _joint(tok, lead, trial)
    if trial == text and expected is not None:
        return _without_control(tok, text, expected, name)
    anchors = (_written(tok).split(lead)[-1], *ANCHORS)
    for anchor in anchors:
        if _behind(tok, trial, anchor, name) == expected or (
            expected is None and _behind(tok, "x", anchor) == _joint(tok, lead, "x")
        ):
            return _behind(tok, text, anchor, name)
    if expected is None:
        return _plain(tok, text, name)
    raise UsageError(UNWRITABLE, name, REWORD)


def _joint(tok: Any, lead: str, text: str) -> list[int] | None:
    """Return the ids of `text` behind `lead`, which the template wrote; None where a token spans the border, or an unknown one might."""
    before, whole = (list(tok(part, add_special_tokens=False)["input_ids"]) for part in (lead, lead + text))
    unknown = bool(before) and before[-1] == tok.unk_token_id
    return whole[len(before) :] if whole[: len(before)] == before and not unknown else None


@lru_cache(maxsize=4)
def _lead(tok: Any, chat: str) -> str:
    """Return what the template writes in front of every answer."""
    return chat_trial.lead(writer(tok, chat_of(tok)))


def _ending(tok: Any, messages: Messages) -> str:
    """Return how a bare prompt ends, what it says of special tokens in other words."""
    return _reserved(tok).sub("x", messages[-1]["content"][-BORDER:]) if messages else ""


def turn_end(tok: Any) -> list[int]:
    """Return the ids that end an answer; UsageError where nothing is known to end one."""
    if chat_of(tok).end:
        return list(chat_of(tok).end)
    if not end_ids(tok):
        raise UsageError(NO_END, tok.name_or_path, NAME_END)
    return [tok.eos_token_id if tok.eos_token_id is not None else min(end_ids(tok))]


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
    """Return every token that ends an answer: the tokenizer's, those that the model's configuration lists, and the template's."""
    own = frozenset() if tok.eos_token_id is None else frozenset([tok.eos_token_id])
    return own | _configured_ends(tok.name_or_path) | frozenset(chat_of(tok).end[-1:])


# ---- how a model is spoken to ----


def settled(tok: Any, words: Mapping[str, Any], now: str) -> Chat:
    """Return how conversations are written for a model that comes in; `words` are the recipe's `chat`, `now` when the run was created.

    UsageError for a word that nothing would read, and where no answer could end.
    """
    source = _template(tok, words) if tok.chat_template else None
    if wrong := chat_trial.unknown_words(source, words):
        raise UsageError(
            "; ".join(problem for _, problem in wrong), "chat", "See the template: chat_template in the model's folder."
        )
    if source is None:
        chat = Chat(behind=True)
    else:
        write = writer(tok, Chat(words, now))
        found = chat_trial.settled(source, write, words, now)
        chat = replace(found, end=_written_end(tok, chat_trial.behind_answer(write)))
    if not (end_ids(tok) or chat.end):
        raise UsageError(NO_END, tok.name_or_path, NAME_END)
    return chat


def _template(tok: Any, words: Mapping[str, Any]) -> str:
    try:
        source: str = tok.get_chat_template(tools=words.get("tools"))
    except ValueError as error:  # several, and none of them is called default
        raise UsageError(f"no chat template can be chosen: {error}", tok.name_or_path, "Name one of them `default`.") from None
    return source


def _written_end(tok: Any, behind: str) -> tuple[int, ...]:
    """Return the ids up to the first control token `behind` an answer; () where there is none, or where it is the end token alone."""
    names = [*{token.content for token in tok.added_tokens_decoder.values()}, *filter(None, [tok.eos_token])]
    written = re.match(rf"\s*(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})", behind) if names else None
    if written is None:
        return ()
    alone, ended = (tok(chat_trial.SAID + part, add_special_tokens=False)["input_ids"] for part in ("", written[0]))
    end = tuple(ended[len(alone) :]) if ended[: len(alone)] == alone else ()
    return () if end == (tok.eos_token_id,) else end


# ---- what engines are asked ----


def encode_requests(
    tok: Any, asked: Sequence[Messages], room: int, context: int, drop_long: bool = False, begun: Sequence[str] = ()
) -> list[list[int] | None]:
    """Return the ids of prompts whose answers may have `room` tokens; one that `context` does not hold is a UsageError, None with `drop_long`.

    `begun` says how each answer begins, which stands behind its prompt in the ids that a training row would have.
    """
    places = [named(messages) for messages in asked]
    prompts = encode_prompts(tok, asked, places)
    for at, begin in enumerate(begun):
        prompts[at] += encode_completion(tok, begin, None, False, places[at], asked[at]) if begin else []
    for place, ids in zip(places, prompts, strict=True) if not drop_long else ():
        _must_fit(place, len(ids), room, context)
    return [ids if len(ids) + room <= context else None for ids in prompts]


def _must_fit(place: str, length: int, room: int, context: int) -> None:
    if length + room > context:
        what = f"has {length} tokens and {room} more are to be generated, but the context holds {context}"
        raise UsageError(what, place, "Drop it (`long: drop`), shorten it, lower max_tokens, or raise `context`.")
