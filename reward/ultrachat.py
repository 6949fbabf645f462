"""UltraChat (Ding et al. 2023, arXiv 2305.14233; hub id HuggingFaceH4/ultrachat_200k): its rows as prompt and human-side answer."""


def row(raw: dict) -> dict | None:
    """The first question and the answer that the data set gives to it; None for a row that lacks one of the two.

    >>> row({"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]})
    {'prompt': 'Hi', 'answer': 'Hello!'}
    >>> row({"messages": [{"role": "user", "content": "Hi"}]})
    """
    said = [message["content"] for message in raw["messages"] if message["role"] != "system"]
    return {"prompt": said[0], "answer": said[1]} if len(said) > 1 and all(said[:2]) else None
