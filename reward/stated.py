"""The answer that a completion states, as text: what rewards of every kind read before they compare. Rules: docs/rewards.md.

Every function takes time in proportion to its text, whatever a model wrote.
"""

import re

BOX = re.compile(r"\\(?P<box>boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
BETWEEN = re.compile(r"[\s,;$]{0,9}(?:and|or)?[\s,;$]{0,9}")  # of boxes that are one list
LINE = re.compile(r"\banswer[*_]{0,3}(?:\s?:|\s?is\b:?)[*_]{0,3}", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b[A-Z][a-z])[.!?](?=\s|$)|,?\s(?:because|since|which)\s")
PAIRS = (
    ("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"),
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("(", ")"),
)  # fmt: skip
COMMAND = re.compile(r"\\(?:boxed|fbox|text\w{0,9}|math(?:rm|bf|it|sf|tt))\s?\{([^{}]*)\}")
MOST_WRAPPERS = 8
OPTION = re.compile(r"\(?([A-Za-z])[).:]{1,2}(?:\s+(?P<rest>.*))?")  # on one line
SECOND_OPTION = re.compile(
    r"^(?:is|isn['’]t|was|wrong|incorrect)\b|(?<![\w'’])(?:[B-Z](?![\w'’+#])|A(?!\s(?!and\b|or\b|but\b)[a-z])(?![\w'’])|I['’]|[a-z]\))"
)


def final(completion: str) -> str:
    """What is not thought: the text behind the last `</think>`, and before a `<think>` that is never closed.

    >>> final("<think>2 or 3?</think> It is 3."), final("It is <think>2 or 3")
    (' It is 3.', 'It is ')
    """
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def stated(completion: str) -> str | None:
    """What stands in the last box, <answer> element, `Answer:` line or behind the last `####`, whichever comes last.

    None where nothing is stated, and "" where it was cut: a box that is not closed states nothing.

    >>> stated(r"Answer: 3, no: \\boxed{\\frac{1}{2}}."), stated("#### 42\\nDone"), stated("42"), stated(r"\\boxed{4")
    ('\\\\frac{1}{2}', '42', None, '')
    """
    text = final(completion)
    found = [mark for mark in (boxes(text), element(text), answer_line(text), hashes(text)) if mark]
    return max(found)[1] if found else None


def boxes(text: str) -> tuple[int, str] | None:
    """Where the last box begins, and what it holds; boxes with only a comma, `and` or `or` between them are a list."""
    open_braces: list[int | None] = []
    closed: list[tuple[int, int, int]] = []  # where the command begins, what it holds begins and ends
    begun: dict[int, int] = {}
    for match in BOX.finditer(text):
        if match["box"]:
            open_braces.append(match.end())
            begun[match.end()] = match.start()
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces and (inside := open_braces.pop()) is not None:
            while closed and closed[-1][0] > begun[inside]:
                closed.pop()
            closed.append((begun[inside], inside, match.start()))
    cut = [begun[inside] for inside in open_braces if inside is not None]
    if cut and (not closed or cut[-1] > closed[-1][0]):
        return cut[-1], ""
    return (closed[-1][0], listed(text, closed)) if closed else None


def listed(text: str, closed: list[tuple[int, int, int]]) -> str:
    """What the last box holds, with those right before it that are its list."""
    start = len(closed) - 1
    while start and len(closed) - start < 20 and BETWEEN.fullmatch(text, closed[start - 1][2] + 1, closed[start][0]):
        start -= 1
    return ", ".join(dict.fromkeys(text[inside:end].strip() for _, inside, end in closed[start:]))


def element(text: str) -> tuple[int, str] | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return (start, text[start + len("<answer>") : end].strip()) if start >= 0 else None


def answer_line(text: str) -> tuple[int, str] | None:
    """Behind the last `Answer:` or `answer is`: the line, or the first line that has text; after `is`, the sentence."""
    marks = list(LINE.finditer(text))
    if not marks:
        return None
    last = marks[-1]
    line = next((line for line in text[last.end() :].split("\n", 9)[:9] if line.strip(" *_\t\r")), "")
    if "is" in last[0].lower().removeprefix("answer"):
        line = SENTENCE_END.split(line.strip(), maxsplit=1)[0]
    return last.start(), without_half_emphasis(line.strip(), text[text.rfind("\n", 0, last.start()) + 1 : last.end()])


def without_half_emphasis(line: str, before: str) -> str:
    """The line without the end of an emphasis that began before it; a mark that nothing began is a sign of the answer.

    >>> without_half_emphasis("42**", "**Answer: "), without_half_emphasis("**42**", "Answer: "), without_half_emphasis("42*", "Answer: ")
    ('42', '**42**', '42*')
    """
    for mark in ("**", "__", "*", "_", "`"):
        if line.endswith(mark) and line.count(mark) % 2 and before.count(mark) % 2:
            line = line.removesuffix(mark)
    return line


def hashes(text: str) -> tuple[int, str] | None:
    start = text.rfind("####")
    return (start, text[start + 4 :].partition("\n")[0].strip()) if start >= 0 else None


def bare(text: str) -> str:
    """The text without what is around it: spaces, emphasis, quotes, `$`, round brackets, and the marks that end a sentence.

    >>> bare(" **Paris**. "), bare("(B)"), bare("$-5$"), bare("C++"), bare("(1, 2)"), bare("f(x)"), bare("?")
    ('Paris', 'B', '-5', 'C++', '(1, 2)', 'f(x)', '?')
    """
    text = text.strip()
    for _ in range(MOST_WRAPPERS):
        inner = unwrapped(ended(text) or text)
        if inner == text:
            break
        text = inner
    return text


def ended(text: str) -> str:
    """The text without the marks that end a sentence; ! and ? only behind a word, for 5! is not 5."""
    text = text.rstrip(".,;: ")
    asked = text.rstrip("!?")
    return asked if asked[-2:].isalpha() and len(asked) > 1 else text


def unwrapped(text: str) -> str:
    """The text without one pair around it. Round brackets go only around one word: (1, 2) is a pair."""
    if (command := COMMAND.fullmatch(text)) is not None:
        return command[1].strip()
    for left, right in PAIRS:
        inner = text[len(left) : len(text) - len(right)]
        if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) and left not in inner:
            return inner.strip() if left != "(" or re.fullmatch(r"[^\s,;()]+", inner) else text
    return text


def plain(text: str) -> str:
    """The text as it is compared: bare, in one case, with single spaces and plain minus signs.

    >>> plain("  **The  END!** "), plain("−5"), plain("...")
    ('the end', '-5', '...')
    """
    return " ".join(bare(text.translate(SIGNS)).casefold().split())


SIGNS = str.maketrans({"−": "-", "–": "-", "’": "'", "‘": "'", "“": '"', "”": '"'})


def same(said: str, gold: str) -> bool:
    """Whether two texts are equal as `plain` has them; `B) Paris` is option B where the gold answer is a single letter.

    Where another letter stands alone behind the first, the text may be a list of the options or a change of mind: it is none.

    >>> same("**paris**", "Paris"), same("B) Paris", "B"), same("C", "C++"), same("5", "-5")
    (True, True, False, False)
    """
    option = OPTION.fullmatch(bare(said))
    if option and re.fullmatch("[a-z]", plain(gold)) and not SECOND_OPTION.search(option["rest"] or ""):
        said = option[1]
    return plain(said) == plain(gold)
