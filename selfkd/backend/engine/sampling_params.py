"""What a sample step asks for, as vLLM's SamplingParams: plain YAML values converted, and what vLLM refuses as a user's error.

Imports vLLM only when called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from selfkd.backend.base import Sampling
from selfkd.backend.engine.sampling_options import check_vllm
from selfkd.errors import UsageError

PLACE = "sample.vllm"


def request_params(sampling: Sampling, ends: Sequence[int], seeds: Sequence[int]) -> list[Any]:
    """Return the parameters of one request per seed; UsageError names the word of `sampling.extra` that vLLM does not take.

    Log-probabilities of the sampled tokens cost 7 % of generation (SmolLM2-135M, CPU): `extra: {logprobs: 0}` asks for them.
    """
    from pydantic import TypeAdapter
    from vllm import SamplingParams

    for word, value in sampling.extra.items():  # as lint does; a run made before a word was refused comes here unchecked
        for problem in check_vllm(word, value):
            raise UsageError(problem, f"{PLACE}.{word}")
    words = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": list(ends),
        **sampling.extra,
    }
    read = TypeAdapter(SamplingParams).validate_python
    with refusals(sampling.extra):
        return [read({**words, "seed": seed}) for seed in seeds]


@contextmanager
def refusals(extra: Mapping[str, Any]) -> Iterator[None]:
    """Turn what vLLM says against the words `extra` into a UsageError; where a recipe gave none, the error is not its own."""
    from pydantic import ValidationError
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (VLLMClientError, ValueError) as error:
        if not extra:
            raise
        said, word = str(error), getattr(error, "parameter", None)
        if isinstance(error, ValidationError):
            found = error.errors()[-1]  # of a union's alternatives the last: the words, not a finished object
            said, word = f"{found['msg']}, not {found['input']!r}", next((part for part in found["loc"] if part in extra), None)
        word = word or next((one for one in extra if one in said), None)
        place = f"{PLACE}.{word}" if word in extra else f"{PLACE} ({', '.join(extra)})"
        raise UsageError(f"vLLM refuses it: {said}", place, "See SamplingParams in vLLM's documentation.") from error
