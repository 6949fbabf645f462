"""chrF: how much of a reference translation's character n-grams a text has (Popovic 2015, aclanthology.org/W15-3049)."""

from collections import Counter

ORDERS = 6
BETA = 2.0  # recall counts so many times as much as precision


def chrf(completion: str, answer: str) -> float:
    """The F-score over n-grams of 1 to 6 characters, blanks left out, precision and recall each averaged over n; 0 to 1.

    >>> chrf("the cat", "the  cat "), chrf("xyz", "the cat"), chrf("", "the cat")
    (1.0, 0.0, 0.0)
    >>> round(chrf("ab", "abc"), 4)  # precision 1, 1; recall 2/3, 1/2, and none of 3 letters in the text: (1+4)*1*.5833/(4*1+.5833)
    0.6364
    """
    said, wanted = "".join(completion.split()), "".join(answer.split())
    found = [(grams(said, n), grams(wanted, n)) for n in range(1, ORDERS + 1)]
    counted = [(both, one, other) for one, other in found if one and other for both in [(one & other).total()]]
    if not counted:
        return 0.0
    precision = sum(both / one.total() for both, one, _ in counted) / len(counted)
    recall = sum(both / other.total() for both, _, other in counted) / len(counted)
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall) if precision + recall else 0.0


def grams(text: str, n: int) -> Counter:
    """
    >>> sorted(grams("abab", 2).items())
    [('ab', 2), ('ba', 1)]
    """
    return Counter(text[at : at + n] for at in range(len(text) - n + 1))


def german_to_english(raw: dict) -> dict:
    """A row of WMT (hub id wmt/wmt14, subset de-en) as a text to translate and its translation.

    >>> german_to_english({"translation": {"de": "Hallo.", "en": "Hello."}})
    {'prompt': 'Translate from German to English:\\nHallo.', 'answer': 'Hello.'}
    """
    pair = raw["translation"]
    return {"prompt": f"Translate from German to English:\n{pair['de']}", "answer": pair["en"]}
