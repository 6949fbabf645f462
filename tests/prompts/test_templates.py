"""A template sees only what it is given, says where it is wrong, and changes only the last user message."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.core.files import builtin_folder
from selfkd.errors import UsageError
from selfkd.prompts import templates

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 x 7?"}]


def prompt(**meta: object) -> templates.Prompt:
    return templates.visible_prompt(MESSAGES, "42", meta)


def test_text_with_braces_is_the_template_itself() -> None:
    template = templates.load(
        "{{ prompt.text }} It is {{ prompt.answer }}, level {{ prompt.level }} of {{ prompt.meta.level }}.", []
    )
    assert template.render(prompt=prompt(level=3)) == "6 x 7? It is 42, level 3 of 3."
    assert templates.load("{{ prompt }}: {{ of.text }}", []).render(prompt=prompt(), of={"text": "so"}) == "6 x 7?: so"


def test_a_file_is_found_next_to_the_recipe_and_then_built_in(tmp_path: Path) -> None:
    built_in = templates.load("templates/hint.j2", [tmp_path])
    assert Path(built_in.name) == builtin_folder() / "recipes/templates/hint.j2"
    assert templates.load("hint.j2", [tmp_path]).digest == built_in.digest
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/hint.j2").write_text("mine {{ prompt.text }}")
    assert templates.load("templates/hint.j2", [tmp_path]).render(prompt=prompt()) == "mine 6 x 7?"


def test_the_digest_is_that_of_the_text() -> None:
    assert templates.load("{{ prompt }}", []).digest == templates.load("{{ prompt }}", []).digest
    assert templates.load("{{ prompt }}", []).digest != templates.load("{{ prompt }}!", []).digest


def test_a_missing_name_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "x.j2").write_text("one\n{{ prompt.text }}\n{{ prompt.levle }}")
    with pytest.raises(UsageError, match=r"x\.j2:3  .*levle"):
        templates.load("x.j2", [tmp_path]).render(prompt=prompt(level=1))
    with pytest.raises(UsageError, match=r"template:1  'off' is undefined\. Names here: of, prompt"):
        templates.load("{{ off }}", []).render(prompt=prompt(), of=None)


def test_what_is_wrong_with_the_file_is_said_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.j2").write_text("one\n{% if prompt %}")
    with pytest.raises(UsageError, match=r"x\.j2:\d"):
        templates.load("x.j2", [tmp_path])
    (tmp_path / "y.j2").write_text("one\n{% include 'x.j2' %}")
    with pytest.raises(UsageError, match=r"y\.j2:2  a template cannot include"):
        templates.load("y.j2", [tmp_path])
    (tmp_path / "z.j2").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"z\.j2:1  not UTF-8"):
        templates.load("z.j2", [tmp_path])
    (tmp_path / "l.j2").write_bytes("one\ntwo ä".encode("latin-1"))
    with pytest.raises(UsageError, match=r"l\.j2:2  not UTF-8"):
        templates.load("l.j2", [tmp_path])
    with pytest.raises(UsageError, match=r"no file 'hnt\.j2'.*Did you mean 'hint\.j2'"):
        templates.load("hnt.j2", [tmp_path])


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(UsageError, match="unsafe"):
        templates.load("{{ prompt.__class__.__mro__ }}", []).render(prompt=prompt())
    with pytest.raises(UsageError, match="SecurityError"):
        templates.load("{{ of.append(1) }}", []).render(of=[])


def test_a_template_cannot_fill_the_memory() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{{ prompt.text }}{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match="grew beyond 1000000"):
        templates.load(loop, []).render(prompt=prompt())


def test_only_the_last_user_message_is_replaced() -> None:
    talk = [*MESSAGES, {"role": "assistant", "content": "42"}, {"role": "user", "content": "Sure?"}]
    assert templates.with_last_message(talk, "Why?") == [*talk[:3], {"role": "user", "content": "Why?"}]
    assert talk[3]["content"] == "Sure?"
    assert templates.with_last_message([], "Hi") == [{"role": "user", "content": "Hi"}]


def test_problems_are_found_before_any_prompt_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x.j2").write_text("{% set a = 1 %}{{ a }}\n{{ promt.text }}{{ range(2) }}")
    assert templates.problems("x.j2", [tmp_path]) == [f"{tmp_path}/x.j2:2  unknown name 'promt'. Did you mean 'prompt'?"]
    assert "no file" in templates.problems("nowhere.j2", [tmp_path])[0]
    assert templates.problems("{{ question }}", [], names=("question",)) == []


def test_only_the_prompt_and_the_sample_are_there(tmp_path: Path) -> None:
    (tmp_path / "x.j2").write_text("{{ prompt.text }} {{ of.text }}\n{{ group | length }}")
    assert templates.problems("x.j2", [tmp_path]) == [f"{tmp_path}/x.j2:2  unknown name 'group'. Names here: prompt, of"]


def test_the_text_of_a_conversation_is_its_last_user_message() -> None:
    talk = [*MESSAGES, {"role": "assistant", "content": "42"}, {"role": "user", "content": "Sure?"}]
    assert templates.text_of(talk) == "Sure?" and templates.text_of(talk[:1]) == ""


@pytest.mark.parametrize("path", sorted(builtin_folder().glob("recipes/templates/*.j2")), ids=lambda path: path.name)
def test_a_shipped_template_renders_from_a_prompt_alone_a_sample_or_two(path: Path) -> None:
    names = ("prompt", "of", "other") if "other." in path.read_text() else ("prompt", "of")  # of a comparison
    assert templates.problems(str(path), [], names) == []
    asked = [{"role": "user", "content": "What is 6 x 7? Marks?"}]
    sample = {"text": "It is 42.", "answer": "42", "last_number": 1.0, "error": 2.0, "teacher_messages": asked}
    shown = {name: sample for name in names[1:]}
    text = templates.load(str(path), []).render(prompt=prompt(passage="A passage.", solution="6 x 7 = 42."), **shown)
    assert ("6 x 7?" in text or sample["text"] in text) and "{" not in text


# ---- turns ----


def talk(source: str, **values: object) -> list[tuple[str, str]]:
    """Return (role, content) of each message that a template makes of its values."""
    rendered = templates.compile_template("template", source).render(**values)
    asked = templates.with_last_message([{"role": "user", "content": "asked"}], rendered)
    return [(message["role"], message["content"]) for message in asked]


TURNS = {
    "lines": ("Be brief.\n--- user\n1+1\n--- assistant  \n2\n--- user\n{{ x }}", "user:Be brief. user:1+1 assistant:2 user:x"),
    "loop": (
        "{% for n in [1, 2] %}\n--- user\n{{ n }}\n--- assistant\n{{ n }}{% endfor %}",
        "user:1 assistant:1 user:2 assistant:2",
    ),
    "stripped": ("{%- for n in [1, 2] -%}\n--- user\n{{ n }}\n{%- endfor -%}", "user:1 user:2"),
    "condition": ("{% if x %}--- system\n{{ x }}{% else %}--- user\nno{% endif %}", "system:x"),
    "comment": ("{# a #}--- user{# b #}\n{{ x }}", "user:x"),
    "macro": ("{% macro one(n) %}\n--- user\n{{ n }}\n{% endmacro %}{{ one(1) }}{{ one(x) | trim }}", "user:1 user:x"),
    "set": (
        "{% set shown %}\n--- user\n{{ x }}\n{% endset %}{{ shown }}--- assistant{{ shown }}",
        "user:x\n--- assistant user:x",
    ),
    "call": ("{% macro one() %}{{ caller(3) }}{% endmacro %}{% call(n) one() %}\n--- user\n{{ n }}{% endcall %}", "user:3"),
    "no line": ("say --- user\nand --- assistant: {{ x }}", "user:say --- user\nand --- assistant: x"),
    "touched": ("{{ x }}--- user\nhi", "user:x--- user\nhi"),
}


@pytest.mark.parametrize("source, expected", TURNS.values(), ids=TURNS.keys())
def test_a_role_line_of_the_template_begins_a_message(source: str, expected: str) -> None:
    found = talk(source, x="x")
    assert " ".join(f"{role}:{content}" for role, content in found) == expected


def test_a_role_line_in_a_prompt_stays_text() -> None:
    diff = "Fix this diff:\n--- user\n+++ b/user\n--- assistant\nx"
    assert talk("Q: {{ prompt }}", prompt=templates.visible_prompt([{"role": "user", "content": diff}], "y", {})) == [
        ("user", f"Q: {diff}")
    ]
    assert talk("--- system\nBe brief.\n--- user\n{{ x }}\nGo.", x=diff) == [("system", "Be brief."), ("user", f"{diff}\nGo.")]


def test_a_gold_answer_with_a_role_line_stays_whole() -> None:
    gold = templates.visible_prompt(MESSAGES, "one\n--- user\ntwo", {})
    assert talk("{{ prompt.answer }}", prompt=gold) == [("user", "one\n--- user\ntwo")]


def test_data_cannot_complete_a_role_line() -> None:
    assert talk("--- user{{ x }}", x="\n") == [("user", "--- user")]
    assert talk("{{ x }}--- user\nhi", x="a\n") == [("user", "a\n--- user\nhi")]
    assert talk("{{ '--- user\nhi' }}") == [("user", "--- user\nhi")]
    assert talk("{% filter replace('+', '-') %}{{ x }}{% endfilter %}", x="+++ user\nhi") == [("user", "--- user\nhi")]


def test_a_role_from_an_expression_is_refused_with_its_line() -> None:
    with pytest.raises(UsageError, match=r"template:2  `--- \{\{ \}\}` does not begin a message"):
        talk("{% for m in prompt.messages %}\n--- {{ m.role }}\n{{ m.content }}{% endfor %}", prompt=prompt())
    assert talk("--- {{ x }} ---\nhi", x="Sums") == [("user", "--- Sums ---\nhi")]
    assert talk("{{ x }}--- {{ x }}\nhi", x="Sums") == [("user", "Sums--- Sums\nhi")]


PIECES = st.lists(
    st.sampled_from(["--- user", "--- system", "--- assistant", "\n", " ", "--- ", "user", "\r", "\u2028", "a", "{{ x }}"])
)
DATA = st.one_of(PIECES.map("".join), st.text())


@given(DATA, DATA)
def test_no_data_can_make_a_turn(first: str, second: str) -> None:
    shots = "{% for word in words %}\n--- user\n{{ word }}\n--- assistant\n{{ word | trim }}{% endfor %}"
    found = talk(f"{{{{ first }}}}{shots}\n--- system\n{{{{ second }}}}", first=first, second=second, words=[first, second])
    opening = [("user", first.strip())] if first.strip() else []
    turns = [(role, text.strip()) for text in (first, second) for role in ("user", "assistant")]
    assert found == [*opening, *turns, ("system", second.strip())]


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "x.j2").write_bytes(b"\xef\xbb\xbf--- user\r\n{{ prompt.text }}\r\n")
    rendered = templates.load("x.j2", [tmp_path]).render(prompt=prompt())
    assert templates.with_last_message([], rendered) == [{"role": "user", "content": "6 x 7?"}]


def test_a_template_without_turns_makes_one_message_of_plain_text() -> None:
    rendered = templates.load("{{ prompt.text }}!", []).render(prompt=prompt())
    assert type(rendered) is str and rendered == "6 x 7?!"
    assert type(templates.with_last_message([], "--- user\nhi")[0]["content"]) is str


def test_four_worked_sums_are_shown_as_eight_turns() -> None:
    rendered = templates.load("templates/sum_examples.j2", []).render(prompt=prompt(), of=None)
    made = templates.with_last_message(MESSAGES, rendered)
    assert [message["role"] for message in made] == ["system", *["user", "assistant"] * 4, "user"]
    assert made[2]["content"] == "6 + 3 = 9\nAnswer: 9" and made[-1]["content"] == "6 x 7?"
