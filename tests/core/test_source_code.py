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
