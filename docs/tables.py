"""Markdown for the parts of pages that are rendered from code."""

from __future__ import annotations

import re
from collections.abc import Iterable


def prose(text: str) -> str:
    """Escape what Markdown would read as markup, except code in backticks and an *emphasised* word."""
    escaped = []
    for part in re.split(r"(`[^`]*`|(?<!\w)\*\w[^*]*\*(?!\w))", " ".join(text.split())):
        kept = part[:1] in "`*" and len(part) > 1
        escaped.append(part.replace("|", r"\|") if kept else re.sub(r"([\\*_<>\[\]|#~])", r"\\\1", part))
    return "".join(escaped)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table, or a line that says that there is nothing."""
    titles, body = list(head), [list(row) for row in rows]
    if not body:
        return "None yet.\n"
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def bullets(items: Iterable[str]) -> str:
    """Return a Markdown list."""
    return "".join(f"- {item}\n" for item in items)
