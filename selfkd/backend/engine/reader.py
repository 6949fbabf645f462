"""A model that reads texts and writes none, in transformers: classifiers, process reward models, and the distributions of a language model.

Every kind that transformers has a class for, on any machine, by the model's own code there and never by code that came with it. Batches are
cut from the order of the texts, so that a value does not depend on how many processes read. torch is imported when a reader is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.adapters import Weights, base_folder
from selfkd.backend.engine.root_model import quietly
from selfkd.backend.engine.transformers_engine import start_torch
from selfkd.backend.facts import of_engine
from selfkd.backend.model_files import config_of, context_of
from selfkd.backend.reading import NO_STEPS, READ_TOKENS, Read, Reading, class_of, classes_of, head_of, problem_of
from selfkd.backend.scored import encode_scored
from selfkd.backend.tokens import encode_prompt, tokenizer
from selfkd.core.pool import Model
from selfkd.errors import UsageError

CLASSES = {"sequence": "AutoModelForSequenceClassification", "tokens": "AutoModelForTokenClassification"}
NO_LIMIT = 1 << 20  # tokenizers that know no limit say a number near 10^30
ASKED_OF_OWN = ("entropy", "certainty")


@dataclass(frozen=True)
class Encoded:
    """The ids of one text, where it is read (nowhere in particular: as a whole), and which of its two parts each id is of."""

    ids: list[int]
    places: tuple[int, ...] = ()
    parts: list[int] | None = None


class Reader:
    """Holds one model and reads as `reading` says; `facts` is what it computes with."""

    def __init__(self, numerics: Mapping[str, Any], model: Model, reading: Reading) -> None:
        self.model, self.reading = model, reading
        self._torch, self._device = start_torch(numerics)
        folder = base_folder(model.path, model.base)
        config = config_of(folder)
        self._head = "words" if reading.kind in ASKED_OF_OWN else head_of(config)
        if reading.kind not in ASKED_OF_OWN and (problem := problem_of(reading, config)[1]):
            raise UsageError(problem, str(folder), "Name another model, or other words, in the score step.")
        self._tok = tokenizer(model.path)
        self._net = self._opened(folder, "float32" if self._device == "cpu" else numerics["dtype"])
        self._class = class_of(reading.label, classes_of(config)) if self._head in CLASSES else 0
        self._limit = self._most(folder)
        self.facts = {**of_engine(), "runner": f"transformers.{type(self._net).__name__}", "device": self._device}

    def read(self, rows: pl.DataFrame) -> list[Read]:
        """Return what is read of each text (columns TEXTS), in their order."""
        asked = rows.to_dicts()
        found = self._encoded(asked)
        refused = {at: why for at, one in enumerate(found) if (why := self._refusal(one))}
        fits = [at for at in range(len(found)) if at not in refused]
        values: dict[int, tuple[float, ...]] = {}
        for batch in self._batches(fits, found):
            values |= dict(zip(batch, self._values([found[at] for at in batch]), strict=True))  # type: ignore[misc]
        return [_read(row["id"], values.get(at, ()), refused.get(at, "")) for at, row in enumerate(asked)]

    # ---- the model ----

    def _opened(self, folder: Path, dtype: str) -> Any:
        """Return the model; UsageError where a part of it is not in its files: transformers would fill it with random numbers."""
        import transformers

        kind = getattr(transformers, CLASSES.get(self._head, "AutoModelForCausalLM"))
        try:
            with quietly():
                net, found = kind.from_pretrained(
                    str(folder),
                    dtype=getattr(self._torch, dtype),
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except Exception as error:  # safetensors, configurations and models each have kinds of their own
            what = f"the model cannot be opened: {type(error).__name__}: {str(error).strip()}"
            raise UsageError(what, str(folder), "Check that transformers knows it without code of its own.") from error
        absent = sorted([*found["missing_keys"], *(str(entry) for entry in found["mismatched_keys"])])
        if absent:
            what = f"{len(absent)} tensors are missing or of another shape: {', '.join(absent[:5])}"
            raise UsageError(what, str(folder), "It was not trained for this: what it says would be random.")
        if self.reading.kind in ASKED_OF_OWN:
            Weights(self.model.path, self.model.base).merge_into(net)
        return net.to(self._device).eval()

    def _most(self, folder: Path) -> int:
        """Return the most tokens of a text: what the step allows, the tokenizer says, and the model has positions for."""
        own = min(self._tok.model_max_length, NO_LIMIT)
        return min(self.reading.context or NO_LIMIT, int(own), context_of(folder, NO_LIMIT))

    # ---- texts ----

    def _encoded(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded | str]:
        """Return the ids of each text, or why it has none."""
        if self.reading.kind in ASKED_OF_OWN:
            found = encode_scored(self._tok, rows)
            return [Encoded(one.ids, tuple(range(one.start - 1, len(one.ids) - 1))) for one in found]
        return [self._steps(row) if self.reading.kind == "steps" else self._whole(row) for row in rows]

    def _whole(self, row: Mapping[str, Any]) -> Encoded | str:
        """Encode a conversation with the model's own template, else two texts as the tokenizer joins them."""
        messages = row["messages"]
        if messages is None:
            return self._two(row["text"], row["second"])
        if not self._tok.chat_template:
            return self._two("\n\n".join(message["content"] for message in messages), row["text"])
        whole = [*messages, {"role": "assistant", "content": row["text"]}]
        if named := self._special_in([message["content"] for message in whole]):
            return named
        try:
            text = self._tok.apply_chat_template(whole, tokenize=False)
        except Exception as error:  # a template is a program of somebody else's
            return f"the model's chat template refuses it: {type(error).__name__}: {error}"
        return Encoded(list(self._tok(text, add_special_tokens=False)["input_ids"]))

    def _two(self, first: str, second: str | None) -> Encoded:
        found = self._tok(first, second, split_special_tokens=True)
        return Encoded(list(found["input_ids"]), parts=found.get("token_type_ids"))

    def _special_in(self, texts: Sequence[str]) -> str:
        """Return why texts cannot be written into a template: they name what only the template may write."""
        names = [token.content for token in self._tok.added_tokens_decoder.values() if token.special]
        found = next((name for name in names for text in texts if name in text), None)
        return f"it names the special token {found}, which the model would read as one" if found else ""

    def _steps(self, row: Mapping[str, Any]) -> Encoded | str:
        """Encode a prompt and each step of the answer with the mark behind it, at whose last token it is read."""
        steps = [step for step in row["text"].split(self.reading.separator) if step.strip()]
        if not steps:
            return NO_STEPS
        mark = self._tok(self.reading.mark, add_special_tokens=False)["input_ids"]
        try:
            ids = encode_prompt(self._tok, row["messages"])
        except UsageError as error:
            return error.what
        places = []
        for step in steps:
            ids = [*ids, *self._tok(step, add_special_tokens=False, split_special_tokens=True)["input_ids"], *mark]
            places.append(len(ids) - 1)
        return Encoded(ids, tuple(places))

    def _refusal(self, one: Encoded | str) -> str:
        if isinstance(one, str):
            return one
        if len(one.ids) > self._limit:
            return f"it has {len(one.ids):,} tokens, and the model reads {self._limit:,}"
        if self.reading.kind in ASKED_OF_OWN and (not one.places or one.places[0] < 0):
            return "it has no tokens" if not one.places else "nothing stands before its first token"
        return "" if one.ids else "it has no tokens"

    # ---- values ----

    def _batches(self, fits: Sequence[int], found: Sequence[Encoded | str]) -> Iterator[list[int]]:
        """Yield the texts of each pass, in their order; one at a time where the model has no padding token to find their ends by."""
        most = READ_TOKENS if self._head in CLASSES else READ_TOKENS // 2
        alone = self._head == "sequence" and self._net.config.get_text_config().pad_token_id is None
        batch: list[int] = []
        for at in fits:
            width = max(len(found[one].ids) for one in [*batch, at])  # type: ignore[union-attr]
            if batch and (alone or (len(batch) + 1) * width > most):
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch

    def _values(self, batch: Sequence[Encoded]) -> list[tuple[float, ...]]:
        torch = self._torch
        with torch.inference_mode():
            logits = self._net(**self._inputs(batch)).logits
            if self._head == "sequence":
                return [(value,) for value in self._chances(logits.float()).tolist()]
            picked = [row[list(one.places)].float() for row, one in zip(logits, batch, strict=True)]
            if self.reading.kind in ASKED_OF_OWN:
                return [(self._statistic(row),) for row in picked]
            if self._head == "words":
                picked = [row[:, self._said_by()] for row in picked]
            return [tuple(self._chances(row).tolist()) for row in picked]

    def _inputs(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        width, pad = max(len(one.ids) for one in batch), self._net.config.get_text_config().pad_token_id or 0
        columns = {
            "input_ids": [one.ids + [pad] * (width - len(one.ids)) for one in batch],
            "attention_mask": [[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in batch],
        }
        if batch[0].parts is not None:
            columns["token_type_ids"] = [(one.parts or []) + [0] * (width - len(one.ids)) for one in batch]
        return {name: self._torch.tensor(rows, device=self._device) for name, rows in columns.items()}

    def _chances(self, logits: Any) -> Any:
        """Return of each row the chance of the class that counts; of a model with one class its logit, as a chance where it is of two texts or of a step."""
        torch, only = self._torch, logits.shape[-1] == 1
        if only:
            return logits[:, 0] if self.reading.kind == "label" else torch.sigmoid(logits[:, 0])
        if getattr(self._net.config, "problem_type", None) == "multi_label_classification":
            return torch.sigmoid(logits)[:, self._class]
        return torch.softmax(logits, -1)[:, self._class]

    def _said_by(self) -> list[int]:
        """Return the ids of the tokens that say good and bad, in this order: the chance of the first one counts."""
        found = [self._tok(word, add_special_tokens=False)["input_ids"] for word in (self.reading.good, self.reading.bad)]
        for word, ids in zip((self.reading.good, self.reading.bad), found, strict=True):
            if len(ids) != 1:
                fix = "Write the token as the tokenizer has it, with the blank in front of it if it has one."
                raise UsageError(f"{word!r} is {len(ids)} tokens of this model, and one is read", self.model.path, fix)
        return [ids[0] for ids in found]

    def _statistic(self, logits: Any) -> float:
        """Return the mean over tokens of the entropy in nats, or of how far the distribution is from a uniform one, KL(uniform || it)."""
        chances = self._torch.log_softmax(logits, -1)
        if self.reading.kind == "entropy":
            return float(-(chances.exp() * chances).nan_to_num(0.0).sum(-1).mean())
        return float((-chances.mean(-1) - math.log(chances.shape[-1])).mean())


def _read(name: str, values: tuple[float, ...], why: str) -> Read:
    odd = next((value for value in values if not math.isfinite(value)), None)
    return Read(name, (), f"the model gave {odd}") if odd is not None else Read(name, values, why)
