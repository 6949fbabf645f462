"""The kinds of chat templates there are, rebuilt on a tiny tokenizer, and the ids that a conversation must have with each, by hand.

The templates are written for this table; each has the habits of one family of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

# Every piece of a text is a token: a word, a line break, a blank, any other letter. Numbers up to 19 are control tokens.
IDS = {
    **{"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "<start_of_turn>": 5, "<end_of_turn>": 6},
    **{"<|user|>": 9, "<|assistant|>": 10, "<|end|>": 11, "<think>": 12, "</think>": 13, "<|eot_id|>": 14},
    **{"<|start_header_id|>": 15, "<|end_header_id|>": 16, "<|endoftext|>": 17, "<|system|>": 18},
    **{"\n": 20, " ": 21, "system": 22, "user": 23, "assistant": 24, "model": 25},
    **{"Ask": 30, "Say": 31, "Rule": 32, "More": 33, "Fine": 34, "Why": 35, "You": 36},
    **{"<": 40, "/": 41, "s": 42, ">": 43, "|": 44, "im_end": 45, ":": 46, "#": 47, "Instruction": 48, "Response": 49},
    **{"[": 50, "INST": 51, "]": 52, "SYS": 53, "27": 56, "28": 57},
}
LAST_CONTROL = 19
THOUGHTS = ("<think>", "</think>")  # added tokens, but not special ones, as in Qwen3
NOW = "2026-11-27T22:50:00Z"

ASK = [("user", "Ask")]
RULE = [("system", "Rule"), *ASK]
SHOTS = [*ASK, ("assistant", "Say"), ("user", "More")]
ALL = [("system", "Rule"), *SHOTS]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou<|im_end|>\n{% endif %}" + CHATML
MARKED = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS_THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_IN_USER = (
    "{% if messages[0].role == 'system' %}{% set rule = '[SYS] ' + messages[0].content + ' ' %}{% set rest = messages[1:] %}"
    "{% else %}{% set rule = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    + ALTERNATE
    + "{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ (rule if loop.first else '') + m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
DATED = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n{{ strftime_now('%d') }}{% if messages[0].role == 'system' %} "
    "{{ messages[0].content }}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SWALLOWS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
NAMED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SILENT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<|assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONE_TURN = "### Instruction:\n{{ messages[-1].content }}\n\n{% if add_generation_prompt %}### Response:\n{% endif %}"


@dataclass(frozen=True)
class Kind:
    """A kind of template: a conversation, the ids of its prompt, and those of the gold answer "Fine"."""

    name: str
    template: Any
    talk: Sequence[tuple[str, str]]
    prompt: Sequence[int]
    answer: Sequence[int]
    eos: str | None = "</s>"
    fold: bool = False
    join: bool = False
    words: Mapping[str, Any] = field(default_factory=dict)
    around: str = "$A"  # what the tokenizer itself puts around a text
    swallowing: Sequence[str] = ()  # special tokens that take the white space behind them


U, A, S, END = (
    [3, 23, 20],
    [3, 24, 20],
    [3, 22, 20],
    [4, 20],
)  # ChatML: a user's turn, an assistant's, a system's, and their ends
KINDS = [
    Kind("no template", None, RULE, [32, 20, 20, 30], [34, 2]),
    Kind("no template, BOS by the tokenizer", None, RULE, [1, 32, 20, 20, 30], [34, 2], around="<s> $A"),
    Kind("no template, an end by the tokenizer", None, ASK, [1, 30], [34, 2], around="<s> $A </s>"),
    Kind(
        "ChatML",
        CHATML,
        ALL,
        [*S, 32, *END, *U, 30, *END, *A, 31, *END, *U, 33, *END, *A],
        [34, 4],
        eos="<|im_end|>",
    ),
    Kind(
        "ChatML on a base model: another end token",
        CHATML,
        ASK,
        [*U, 30, *END, *A],
        [34, 4],
        eos="<|endoftext|>",
    ),
    Kind("no end token but the template's", CHATML, ASK, [*U, 30, *END, *A], [34, 4], eos=None),
    Kind("a system prompt of its own", DEFAULT_SYSTEM, ASK, [*S, 36, *END, *U, 30, *END, *A], [34, 4], eos="<|im_end|>"),
    Kind("marks for what is learned", MARKED, SHOTS, [*U, 30, *END, *A, 31, *END, *U, 33, *END, *A], [34, 4], eos="<|im_end|>"),
    Kind(
        "several templates",
        {"default": CHATML, "tool_use": "{{ raise_exception('tools only') }}"},
        ASK,
        [*U, 30, *END, *A],
        [34, 4],
        eos="<|im_end|>",
    ),
    Kind(
        "thinking switched off, and dropped from earlier turns",
        THINKS,
        [*ASK, ("assistant", "<think>Why</think>Say"), ("user", "More")],
        [*U, 30, *END, *A, 31, *END, *U, 33, *END, *A, 12, 20, 20, 13, 20, 20],
        [34, 4],
        eos="<|im_end|>",
        words={"enable_thinking": False},
    ),
    Kind("thinking as it comes", THINKS, ASK, [*U, 30, *END, *A], [34, 4], eos="<|im_end|>"),
    Kind("opens a thought", OPENS_THINKING, RULE, [1, 32, 9, 30, 10, 12, 20], [34, 2]),
    Kind(
        "no system role, strict turns, an end of turn that is not the end token",
        NO_SYSTEM,
        [*RULE, ("user", "More")],
        [1, 5, 23, 20, 32, 20, 20, 30, 20, 20, 33, 6, 20, 5, 25, 20],
        [34, 6],
        eos="<|endoftext|>",
        fold=True,
        join=True,
        around="<s> $A",
    ),
    Kind(
        "brackets in plain text, no opening of the model's turn",
        BRACKETS,
        SHOTS,
        [1, 50, 51, 52, 21, 30, 21, 50, 41, 51, 52, 31, 2, 50, 51, 52, 21, 33, 21, 50, 41, 51, 52],
        [34, 2],
        fold=True,
        join=True,
        around="<s> $A",
    ),
    Kind(
        "the system text inside the first user turn, a blank before the end",
        SYSTEM_IN_USER,
        ALL,
        [
            *[1, 50, 51, 52, 21, 50, 53, 52, 21, 32, 21, 30, 21, 50, 41, 51, 52, 21, 31, 21, 2],
            *[1, 50, 51, 52, 21, 33, 21, 50, 41, 51, 52],
        ],
        [34, 21, 2],
        join=True,
    ),
    Kind(
        "today's date, and heads of several tokens",
        DATED,
        RULE,
        [1, 15, 22, 16, 20, 20, 56, 21, 32, 14, 15, 23, 16, 20, 20, 30, 14, 15, 24, 16, 20, 20],
        [34, 14],
        eos="<|eot_id|>",
    ),
    Kind(
        "control tokens that swallow the line break behind them",
        SWALLOWS,
        SHOTS,
        [9, 30, 11, 10, 31, 11, 9, 33, 11, 10],
        [34, 11],
        eos="<|endoftext|>",
        swallowing=("<|user|>", "<|assistant|>", "<|end|>", "<|system|>"),
    ),
    Kind("the end token behind each turn", NAMED, RULE, [18, 20, 32, 2, 20, 9, 20, 30, 2, 20, 10, 20], [34, 2]),
    Kind("a system message dropped without a word", SILENT, RULE, [9, 32, 20, 20, 30, 10], [34, 2], fold=True),
    Kind(
        "the last message only",
        ONE_TURN,
        RULE,
        [47, 47, 47, 21, 48, 46, 20, 32, 20, 20, 30, 20, 20, 47, 47, 47, 21, 49, 46, 20],
        [34, 2],
        fold=True,
        join=True,
    ),
]  # fmt: skip


def tokenizer_of(kind: Kind) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\S\n]|\w+|[^\w\s]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(single=kind.around, special_tokens=[("<s>", 1), ("</s>", 2)])
    control = [name for name, number in IDS.items() if number <= LAST_CONTROL and name not in THOUGHTS]
    raw.add_special_tokens([AddedToken(name, special=True, rstrip=name in kind.swallowing) for name in control])
    raw.add_tokens([AddedToken(name, special=False) for name in THOUGHTS])
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>", eos_token=kind.eos)
    tok.chat_template, tok.clean_up_tokenization_spaces = kind.template, False
    return tok


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name.startswith(name))


class OtherDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(2026, 11, 28)
