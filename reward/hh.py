"""Anthropic's HH (Bai et al. 2022, arXiv 2204.05862; hub id Anthropic/hh-rlhf): its dialogues as conversation and two answers."""

import re

TURN = re.compile(r"\n\n(Human|Assistant): ?")
ROLES = {"Human": "user", "Assistant": "assistant"}


def row(raw: dict) -> dict | None:
    """The dialogue before its last answer, with the preferred answer as gold and the other one as `rejected`; None where they do not fit.

    >>> row({"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello!", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: What?"})
    {'prompt': [{'role': 'user', 'content': 'Hi'}], 'answer': 'Hello!', 'rejected': 'What?'}
    >>> row({"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: ", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: What?"})
    """
    *asked, chosen = turns(raw["chosen"])
    *also, rejected = turns(raw["rejected"])
    whole = asked == also and asked and all(turn["content"] for turn in (*asked, chosen, rejected))
    fits = chosen["role"] == rejected["role"] == "assistant" and asked[-1:] and asked[-1]["role"] == "user"
    return {"prompt": asked, "answer": chosen["content"], "rejected": rejected["content"]} if whole and fits else None


def turns(text: str) -> list[dict]:
    """
    >>> turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello!")[1]
    {'role': 'assistant', 'content': 'Hello!'}
    """
    _, *parts = TURN.split(text)
    pairs = zip(parts[::2], parts[1::2])
    return [{"role": ROLES[who], "content": said.strip()} for who, said in pairs] or [{"role": "", "content": ""}]
