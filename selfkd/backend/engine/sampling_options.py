"""Which fields of vLLM's SamplingParams a `vllm:` block may hold, as plain data, so that `lint` can check them without vLLM.

Every field of vLLM 0.31's SamplingParams is in one of two tables: passed through, or decided by selfkd with the place to set it
instead. A test compares both with the installed wheel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from selfkd.backend.option_kinds import is_kind
from selfkd.core.wording import did_you_mean

# name -> (kind of value, smallest, greatest); None where there is no bound. Kinds: int, float, bool, ints (a list of whole
# numbers), texts (a list of texts), mapping.
PASSED: dict[str, tuple[str, float | None, float | None]] = {
    "allowed_token_ids": ("ints", None, None),
    "bad_words": ("texts", None, None),
    "extra_args": ("mapping", None, None),
    "frequency_penalty": ("float", -2, 2),
    "ignore_eos": ("bool", None, None),
    "logit_bias": ("mapping", None, None),
    "logprobs": ("int", -1, None),
    "min_p": ("float", 0, 1),
    "min_tokens": ("int", 0, None),
    "presence_penalty": ("float", -2, 2),
    "repetition_detection": ("mapping", None, None),
    "repetition_penalty": ("float", 1e-6, None),
    "skip_special_tokens": ("bool", None, None),
    "spaces_between_special_tokens": ("bool", None, None),
    "structured_outputs": ("mapping", None, None),
    "thinking_token_budget": ("int", -1, None),
    "watermarking": ("bool", None, None),
}
# The words of the fields that are mappings of fixed words.
INNER: dict[str, tuple[str, ...]] = {
    "structured_outputs": (
        *("json", "regex", "choice", "grammar", "json_object", "disable_any_whitespace", "disable_additional_properties"),
        *("whitespace_pattern", "structural_tag"),
    ),
    "repetition_detection": ("max_pattern_size", "min_pattern_size", "min_count"),
}
# What the generator transformers obeys; any other word would change which answers are drawn, and nobody would obey it.
OF_TRANSFORMERS = ("logprobs", "skip_special_tokens")
_OWNED_BY_REASON: dict[str, str] = {
    "write it as a field of the step": "n temperature top_p top_k max_tokens stop",
    "each answer has a seed of its own, from the recipe's field `seed`": "seed",
    "the model's end tokens end an answer; for a text that ends one there is the step's field `stop`": "stop_token_ids",
    "strings of `stop` are not part of an answer": "include_stop_str_in_output",
    "selfkd reads whole answers with their texts": (
        "detokenize output_kind stream_interval skip_clone output_text_buffer_length skip_reading_prefix_cache flat_logprobs"
    ),
    "nothing would read it": (
        "prompt_logprobs prompt_logprob_token_ids prompt_logprob_start logprob_token_ids routed_experts_prompt_start "
        "trace_decode_token_ids"
    ),
}
OWNED: dict[str, str] = {name: reason for reason, names in _OWNED_BY_REASON.items() for name in names.split()}


def check_vllm(name: str, value: Any) -> Iterator[str]:
    """Yield what is wrong with one entry of a `vllm:` block; nothing where vLLM will take it."""
    if name in OWNED:
        yield f"vllm.{name} is not passed on: {OWNED[name]}"
    elif name not in PASSED:
        hint = did_you_mean(name, [*PASSED, *OWNED]) or f" Fields: {', '.join(PASSED)}"
        yield f"vllm has no field '{name}' here.{hint}"
    elif value is not None:
        yield from _value_problems(name, value)


def check_length(options: Mapping[str, Any], max_tokens: int) -> Iterator[str]:
    """Yield what is wrong with a `vllm:` block beside the step's own `max_tokens`."""
    least = options.get("min_tokens")
    if isinstance(least, int) and least > max_tokens:
        yield f"vllm.min_tokens is {least}, more than the step's max_tokens of {max_tokens}: no answer could be that long"


def _value_problems(name: str, value: Any) -> Iterator[str]:
    kind, least, most = PASSED[name]
    if not is_kind(kind, value):
        yield f"vllm.{name} should be {WORDS[kind]}, not {value!r}"
    elif least is not None and value < least:
        yield f"vllm.{name} should be at least {least:g}, not {value!r}"
    elif most is not None and value > most:
        yield f"vllm.{name} should be at most {most:g}, not {value!r}"
    elif value == [] and kind == "ints":
        yield f"vllm.{name} is an empty list, which leaves no token to draw: name some, or leave it out"
    known = INNER.get(name, ())
    for word in value if known and isinstance(value, Mapping) else ():
        if word not in known:
            yield f"vllm.{name} has no field '{word}'.{did_you_mean(word, known) or ' Fields: ' + ', '.join(known)}"


WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "ints": "a list of whole numbers",
    "texts": "a list of texts",
    "mapping": "a mapping (name: value)",
}
