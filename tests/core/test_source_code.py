"""The identity of a Python file is its code and that of the local modules it imports."""

from __future__ import annotations

from selfkd.core.source_code import code_digest


def test_a_comment_in_a_reward_changes_nothing_and_a_helper_it_imports_does(tmp_path):
    (tmp_path / "helper.py").write_text("LIMIT = 3\n")
    (tmp_path / "mine.py").write_text('"""Doc."""\nfrom helper import LIMIT\ndef f(x):\n    return x > LIMIT\n')
    before = code_digest(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text('"""Other doc."""\n# why\nfrom helper import LIMIT\n\ndef f(x):\n    return x > LIMIT\n')
    assert code_digest(tmp_path / "mine.py") == before
    (tmp_path / "helper.py").write_text("LIMIT = 4\n")
    assert code_digest(tmp_path / "mine.py") != before


def test_the_digest_of_a_file_is_the_same_on_every_python(tmp_path):
    """Written down on 3.11, and equal on 3.12 and 3.13, whose syntax trees have more fields."""
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n\n\n"
        "@staticmethod\ndef f(x: int, *, y=None, **more) -> str:\n"
        "    return f'{x!r:>{y}}' if x in (1, 1.0, True, b'1', None, ...) else [a for a in more if a][::2]\n\n\n"
        "class C(list[int]):\n    async def g(self): await (z := self)\n"
    )
    assert code_digest(tmp_path / "mine.py") == "1a704790df04a22c76d50f49cbb0c9a43a53092661456c949e718e24e52e86de"


def test_constants_of_another_type_are_another_code(tmp_path):
    def digest_with(value: str) -> str:
        (tmp_path / "mine.py").write_text(f"def f():\n    return {value}\n")
        return code_digest(tmp_path / "mine.py")

    assert (
        len({digest_with(value) for value in ("1", "1.0", "True", "'1'", "b'1'", "None", "...", "[]", "()", "'\\ud800'")}) == 10
    )
    assert digest_with("u'1'") == digest_with("'1'")
    assert digest_with("['', 'a']") != digest_with("['a']")


def test_a_letter_that_only_newer_pythons_know_is_the_same_code(tmp_path):
    """repr() would write U+1FAE8 as an escape on 3.11 and as itself on 3.12."""
    (tmp_path / "mine.py").write_text("X = '\U0001fae8'\n", "utf-8")
    written = code_digest(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text("X = '\\U0001fae8'\n", "utf-8")
    assert code_digest(tmp_path / "mine.py") == written == "9fbda01f11942e663967a9b8d246bd61dd6f60d59c7623b30782fafe3396fec4"
