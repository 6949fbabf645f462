"""UltraFeedback (Cui et al. 2023, arXiv 2310.01377; hub id openbmb/UltraFeedback): its instructions, without the answers of other models."""


def row(raw: dict) -> dict | None:
    """The instruction as a prompt; None for one without text.

    >>> row({"instruction": " Name a bird. ", "completions": []})
    {'prompt': 'Name a bird.'}
    >>> row({"instruction": " "})
    """
    return {"prompt": raw["instruction"].strip()} if raw["instruction"].strip() else None
