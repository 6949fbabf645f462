"""SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250; hub id rajpurkar/squad): questions on passages, of which every tenth is held out.

Practised and held-out questions are about the same passages: what a model learns of them is seen in questions that it never had.
"""

import zlib

FORM = "\nEnd with a line of the form 'Answer: <a few words>'."


def practised(raw: dict) -> dict | None:
    """Nine questions of ten, with their passage.

    >>> practised({"id": "a", "question": "Who?", "context": "Ann did.", "answers": {"text": ["Ann"], "answer_start": [0]}})["passage"]
    'Ann did.'
    """
    return None if is_held_out(raw) else row(raw)


def held_out(raw: dict) -> dict | None:
    """The tenth question.

    >>> held_out({"id": "a", "question": "Who?", "context": "Ann did.", "answers": {"text": ["Ann"], "answer_start": [0]}}) is None
    True
    """
    return row(raw) if is_held_out(raw) else None


def row(raw: dict) -> dict:
    """
    >>> row({"id": "a", "question": "Who?", "context": "Ann did.", "answers": {"text": ["Ann"], "answer_start": [0]}})["answer"]
    'Ann'
    """
    return {"prompt": raw["question"].strip() + FORM, "answer": raw["answers"]["text"][0], "passage": raw["context"]}


def is_held_out(raw: dict) -> bool:
    """
    >>> sum(is_held_out({"id": str(number)}) for number in range(1000)) in range(70, 130)
    True
    """
    return zlib.crc32(raw["id"].encode()) % 10 == 0
