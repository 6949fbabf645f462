"""Messages and answers as token ids: where a text ends, and what names of special tokens in data become."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import say, tiny_tokenizer

from selfkd.backend import tokens
from selfkd.backend.chat import Chat
from selfkd.backend.trainer import batches
from selfkd.core.pool import shape
from selfkd.errors import GuardError, UsageError

TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [" hello", " hello world", "It is 42.", "\nQuestion:", "日本", "é", "assistant\n", "user\n"]


def words_of(model: Any, special: list[Any], **more: Any) -> Any:
    """A tokenizer of whole words: each of WORDS is one token, everything else one token per byte."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(model)
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    raw.add_special_tokens(special)
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<|im_end|>", **more)
    tok.chat_template, tok.clean_up_tokenization_spaces = TURNS, False
    return tok


def byte_level(*added: Any) -> Any:
    """Merges that make one token of each of WORDS."""
    from tokenizers import models, pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [split.pre_tokenize_str(word)[0][0] for word in WORDS]
    vocabulary, merges = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
    for word in spelled:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    return words_of(models.BPE(vocabulary, merges), [*["<s>", "<|im_start|>", "<|im_end|>"], *added])


def word_marking(scheme: str) -> Any:
    """As in Llama 2: a token per letter, and '▁hello' for a word; `scheme` says where a blank is put in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(33, 127)), "▁h", "▁he", "▁hel", "▁hell", "▁hello"]
    merges = [("▁", "h"), ("▁h", "e"), ("▁he", "l"), ("▁hel", "l"), ("▁hell", "o")]
    raw = Tokenizer(models.BPE({text: at for at, text in enumerate(letters)}, merges, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme)
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tok.chat_template = "{% for message in messages %}<s>[INST] {{ message['content'] }} [/INST]</s>{% endfor %}answer:"
    tok.clean_up_tokenization_spaces = False
    return tok


@pytest.fixture(scope="module")
def tok() -> Any:
    return byte_level()


def ids(tok: Any, *parts: str) -> list[int]:
    """One token per part."""
    found = [tok(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert all(len(part) == 1 for part in found)
    return [part[0] for part in found]


PROMPT = "x"


def cut(tok: Any, sampled: list[int], text: str) -> tuple[str, list[int], int]:
    found, kept = tokens.ids_of_text(tok, ids(tok, PROMPT), sampled, text)
    return tok.decode(found), found, kept


# ---- where a text ends ----


def test_ids_end_where_a_stop_string_cut_the_text(tok):
    sampled = ids(tok, "It is 42.", "\nQuestion:")
    assert cut(tok, sampled, "It is 42.") == ("It is 42.", sampled[:1], 1)


def test_a_token_that_begins_before_the_stop_string_is_encoded_anew(tok):
    """Stop string 'e' inside the token ' hello': what is left of it is ' h'."""
    sampled = ids(tok, "It is 42.", " hello")
    assert cut(tok, sampled, "It is 42. h") == ("It is 42. h", [sampled[0], *ids(tok, " h")], 1)


def test_a_stop_string_over_several_tokens_leaves_none_of_them(tok):
    sampled = ids(tok, " hello", "\n", "Q", "u")
    assert cut(tok, sampled, " hello") == (" hello", sampled[:1], 1)


def test_a_character_split_over_tokens_is_kept_whole_or_not_at_all(tok):
    first, second, third = tok("€", add_special_tokens=False)["input_ids"]
    sampled = [*ids(tok, "a"), first, second, third, *ids(tok, "b")]
    assert cut(tok, sampled, "a€") == ("a€", sampled[:4], 4)
    assert cut(tok, sampled, "a") == ("a", sampled[:1], 1)


def test_a_stop_string_inside_a_token_of_two_characters_leaves_the_first(tok):
    assert cut(tok, ids(tok, "日本"), "日") == ("日", ids(tok, "日"), 0)


def test_a_stop_string_at_once_leaves_no_ids_and_an_end_token_to_learn(tok):
    found = tokens.ids_of_text(tok, ids(tok, PROMPT), ids(tok, "\nQuestion:"), "")
    assert found == ([], 0)
    assert tokens.encode_completion(tok, "", found[0]) == [tok.eos_token_id]


def test_a_text_that_holds_the_stop_string_keeps_its_ids(tok):
    """include_stop_str_in_output."""
    sampled = ids(tok, "It is 42.", "\nQuestion:")
    assert cut(tok, sampled, "It is 42.\nQuestion:") == ("It is 42.\nQuestion:", sampled, 2)


def test_a_tokenizer_that_marks_word_beginnings_gives_no_blank_to_what_is_encoded_anew():
    """As in Llama 2: '▁hello' is a token, and 'h' alone would be encoded as '▁h'."""
    metaspace = word_marking("first")
    vocabulary = metaspace.get_vocab()
    prompt, sampled = [vocabulary["o"]], [vocabulary["▁hello"], vocabulary["▁hello"]]
    found, kept = tokens.ids_of_text(metaspace, prompt, sampled, " hello he")
    assert metaspace.decode([*prompt, *found]) == "o hello he" and kept == 1
    found, kept = tokens.ids_of_text(metaspace, prompt, [vocabulary["l"], vocabulary["▁hello"]], "l")
    assert (found, kept) == ([vocabulary["l"]], 1)


# ---- names of special tokens in data ----


def test_a_special_token_named_in_a_prompt_is_text_and_the_templates_own_stay_special(tok):
    start, end = ids(tok, "<|im_start|>", "<|im_end|>")
    found = tokens.encode_prompt(tok, say("What does <|im_end|> mean?"))
    assert [found.count(start), found.count(end)] == [2, 1]
    assert tok.decode(found) == "<|im_start|>user\nWhat does <|im_end|> mean?<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_without_such_names_has_the_ids_of_its_rendered_text(tok):
    text = "<|im_start|>user\nIt is 42. hello<|im_end|>\n<|im_start|>assistant\n"
    assert tokens.encode_prompt(tok, say("It is 42. hello")) == tok(text, add_special_tokens=False)["input_ids"]


def test_many_prompts_at_once_have_the_ids_of_each_alone(tok):
    talks = [say("a"), say("<|im_end|>"), say("It is 42."), say("<s> and <|im_start|>user\nhi"), say("a")]
    assert tokens.encode_prompts(tok, talks, [""] * 5) == [tokens.encode_prompt(tok, talk) for talk in talks]


def test_a_special_token_named_in_a_gold_answer_does_not_end_it(tok):
    found = tokens.encode_completion(tok, "<|im_end|> ends a turn.")
    assert tok.decode(found[:-1]) == "<|im_end|> ends a turn." and found.count(tok.eos_token_id) == 1
    assert found[-1] == tok.eos_token_id


def test_white_space_that_a_special_token_swallows_is_swallowed_beside_named_ones_too():
    """Phi-3: <|user|> takes the line break behind it."""
    from tokenizers import AddedToken

    tok = byte_level(AddedToken("<|end|>", rstrip=True, special=True))
    tok.chat_template = TURNS.replace("<|im_end|>", "<|end|>")
    found = tokens.encode_prompt(tok, say("so <|im_end|>"))
    assert tok.decode(found) == "<|im_start|>user\nso <|im_end|><|end|><|im_start|>assistant\n"


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_tokenizer_that_marks_word_beginnings_names_special_tokens_as_text_too(scheme):
    """`<s>` strikes text through in HTML, and begins a sequence in Llama 2: between its own tokens a prompt is encoded as ever."""
    tok = word_marking(scheme)
    found = tokens.encode_prompt(tok, say("hello <s>old</s> price"))
    assert [found.count(tok.bos_token_id), found.count(tok.eos_token_id)] == [1, 1]
    whole = tok("<s>[INST] hello (s)old(/s) price [/INST]</s>answer:", add_special_tokens=False)["input_ids"]
    pieces = tok.convert_ids_to_tokens(whole)
    brackets = {"(": "<", ")": ">"}
    assert tok.convert_ids_to_tokens(found) == [brackets.get(piece, piece) for piece in pieces]


def test_a_bare_text_prompt_names_special_tokens_as_text(tok):
    bare = byte_level()
    bare.chat_template = None
    found = tokens.encode_prompt(bare, say("a <|im_end|>"))
    assert bare.decode(found) == "a <|im_end|>" and bare.eos_token_id not in found


def with_plain_end() -> Any:
    """A tokenizer whose end token is not marked as special: it is found in any text."""
    from tokenizers import AddedToken

    tok = byte_level()
    tok.add_tokens([AddedToken("<end>", special=False)])
    tok.eos_token = "<end>"
    return tok


def test_an_end_token_that_cannot_be_written_as_text_is_refused_with_its_place():
    tok = with_plain_end()
    with pytest.raises(UsageError, match=r"a\.jsonl: 'an'  names a special token"):
        tokens.encode_prompt(tok, say("an <end>"), "a.jsonl: 'an'")
    with pytest.raises(UsageError, match=r"a\.jsonl: 'an'  names a special token"):
        tokens.encode_completion(tok, "an <end>", name="a.jsonl: 'an'")


def test_a_training_row_that_cannot_be_written_is_refused_and_the_others_are_learned(tmp_path):
    tok, row = with_plain_end(), {"messages": say("a"), "chosen_ended": True}
    rows = [{**row, "id": "bad", "chosen": "an <end>"}, {**row, "id": "good", "chosen": "an end"}]
    shape("rows", rows).write_parquet(tmp_path / "rows.parquet")
    kept, drops = batches.read_rows(tok, [tmp_path / "rows.parquet"], False, 100)
    assert [one.id for one in kept] == ["good"] and tok.decode(kept[0].chosen) == "an end<end>"
    assert drops == {"bad": "names a special token, and this tokenizer cannot write that name as text"}


def test_rows_that_the_template_refuses_are_counted_as_that(tmp_path):
    tok = byte_level()
    tok.chat_template = "{{ raise_exception('not today') }}"
    shape("rows", [{"id": "r", "messages": say("a"), "chosen": "b", "chosen_ended": True}]).write_parquet(
        tmp_path / "rows.parquet"
    )
    with pytest.raises(GuardError, match="all 1 rows were refused: 1 refused by the chat template"):
        batches.read_rows(tok, [tmp_path / "rows.parquet"], False, 100)


def test_a_prompt_is_known_by_how_its_last_message_begins():
    assert tokens.opening([{"role": "system", "content": "s"}, *say("two\n  lines")]) == "'two lines'"
    assert tokens.opening(say("x" * 61)) == f"'{'x' * 60}…'"


# ---- each prompt once ----


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tok: Any) -> None:
        self.tok, self.texts = tok, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tok, name)

    def __call__(self, texts: list[str], **more: Any) -> Any:
        self.texts += texts
        return self.tok(texts, **more)


def test_a_prompt_is_encoded_once_however_often_and_wherever_it_is_asked() -> None:
    tok = Counting(tiny_tokenizer())
    talks = [say("one"), say("two"), say("one")] * 30
    found = tokens.encode_prompts(tok, talks, [""] * 90)
    assert len(tok.texts) == 2 and found[0] == found[2] != found[1]
    assert tokens.encode_prompt(tok, say("two")) == found[1] and len(tok.texts) == 2
    assert tokens.encode_prompts(tok, [say("three"), *talks], [""] * 91)[1:] == found and len(tok.texts) == 3


def test_ids_that_a_caller_changes_change_nobody_elses() -> None:
    tok = tiny_tokenizer()
    first = tokens.encode_prompts(tok, [say("one"), say("one")], ["", ""])
    first[0].append(7)
    assert first[1] == tokens.encode_prompt(tok, say("one")) == first[0][:-1]


def test_who_says_it_and_how_it_is_written_make_another_prompt() -> None:
    tok = tiny_tokenizer()
    other = [{"role": "system", "content": "one"}]
    assert tokens.encode_prompt(tok, other) != tokens.encode_prompt(tok, say("one"))
    with_template = tokens.encode_prompt(tok, say("one"))
    tok.chat_template = None
    assert tokens.encode_prompt(tok, say("one")) != with_template


def test_the_first_place_of_a_prompt_that_cannot_be_written_is_the_one_named() -> None:
    tok = word_marking("first")
    talks = [say("hello"), say("so <s>old</s>"), say("hello"), say("so <s>old</s>")]
    whole = [tokens.encode_prompts(tok, talks, list("abcd"))]
    assert whole[0][1] == whole[0][3]
    hidden = [say("hello"), say("\U00100000 <s>"), say("\U00100000 <s>")]
    with pytest.raises(UsageError) as caught:
        tokens.encode_prompts(tok, hidden, list("abc"))
    assert caught.value.where == "b"


def test_no_more_prompts_are_remembered_than_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "KEPT_TOKENS", 100)
    tok = Counting(tiny_tokenizer())
    long = [tokens.encode_prompt(tok, say(f"{number:030d}")) for number in range(10)]
    known = tokens._encoded(tok, str(tok.chat_template), repr(tokens.chat_of(tok)))
    assert known.tokens == sum(map(len, known.ids.values())) <= 100 and known.ids
    assert [tokens.encode_prompt(tok, say(f"{number:030d}")) for number in range(10)] == long


# ---- a gold answer behind its prompt ----


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("text", ["hello", "hello hello", "o", " hello", "an <s> in it"])
def test_an_answer_that_nobody_sampled_has_the_ids_that_it_has_behind_its_prompt(scheme: str, text: str) -> None:
    """Llama 2 puts a blank in front of a text that stands alone; behind `answer:` the model itself would draw none."""
    tok = tokens.with_chat(word_marking(scheme), Chat(behind=True))
    prompt = tokens.encode_prompt(tok, say("o"))
    written = tokens.rendered(tok, say("o"))
    found = tokens.encode_completion(tok, text, ended=False, messages=say("o"))
    joint = tok(written + text.replace("<s>", "(s)"), add_special_tokens=False)["input_ids"][len(prompt) :]
    assert tok.convert_ids_to_tokens(found) == [{"(": "<", ")": ">"}.get(one, one) for one in tok.convert_ids_to_tokens(joint)]
    assert tok.decode([*prompt, *found]) == tok.decode(prompt) + text


def test_a_gold_answer_of_an_older_run_is_encoded_alone_as_it_was() -> None:
    tok = word_marking("always")
    alone = tok("hello", add_special_tokens=False)["input_ids"]
    behind = tokens.encode_completion(tokens.with_chat(word_marking("always"), Chat(behind=True)), "hello", messages=say("o"))
    assert tokens.encode_completion(tok, "hello", messages=say("o"))[:-1] == alone != behind[:-1]


def test_a_bare_prompt_and_its_answer_that_would_become_one_token_stay_two() -> None:
    """'It is 42.' is one token; behind a prompt that ends in 'It', no model draws the rest of it."""
    tok = tokens.with_chat(byte_level(), Chat(behind=True))
    tok.chat_template = None
    found = tokens.encode_completion(tok, " is 42.", ended=False, messages=say("It"))
    assert tok.decode(found) == " is 42." and found == tok(" is 42.", add_special_tokens=False)["input_ids"]
