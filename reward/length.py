"""Length rewards. `overlong` is DAPO's soft punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13), in characters or words."""


def within(completion: str, least: int = 1, most: int = 2000, unit: str = "chars") -> float:
    """1.0 when the completion has at least `least` and at most `most` of `unit` (chars or words).

    >>> within("abc", most=3), within("abcd", most=3), within("  "), within("a b c", most=2, unit="words")
    (1.0, 0.0, 0.0, 0.0)
    """
    return float(least <= size(completion, unit) <= most)


def overlong(completion: str, most: int = 2000, buffer: int = 400, unit: str = "chars") -> float:
    """0 up to `most - buffer`, then down in a straight line to -1 at `most`, and -1 beyond.

    >>> overlong("a" * 5, most=10, buffer=4), overlong("a" * 8, most=10, buffer=4), overlong("a" * 20, most=10, buffer=4)
    (0.0, -0.5, -1.0)
    """
    beyond = size(completion, unit) - (most - buffer)
    return 0.0 - min(max(beyond / buffer, 0.0), 1.0)


def finished(sample: dict) -> float:
    """1.0 when the model ended by itself, 0.0 when it was cut off at the token limit.

    >>> finished({"finish_reason": "stop"}), finished({"finish_reason": "length"})
    (1.0, 0.0)
    """
    return float(sample["finish_reason"] == "stop")


def size(text: str, unit: str) -> int:
    """
    >>> size(" two words ", "words"), size(" two words ", "chars")
    (2, 9)
    """
    if unit not in ("chars", "words"):
        raise ValueError(f"unit is 'chars' or 'words', not {unit!r}")
    return len(text.split()) if unit == "words" else len(text.strip())
