"""What the site does otherwise than a browser of the repository: files outside docs/ are named, for they are no pages of it."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links to files of the repository are their names."""
    return OUTSIDE.sub(r"\1", markdown)
