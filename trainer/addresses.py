"""URLs as they may be shown: without passwords, tokens and signatures.

A URL may let in whoever reads it: by `https://name:password@host/`, or by a query that a store has
signed. What is written down (errors, logs, ledgers, run files) outlives the run and travels.
"""

from __future__ import annotations

import re
from typing import Any

NOT_KEPT = "..."
_WHO = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY = re.compile(
    r"(?P<place>[A-Za-z][\w+.-]*://[^\s?'\"]*)\?(?!\.\.\.)"
    r"(?:(?!::)[^\s'\"])*?(?=[:;,.)\]}]*(?:[\s'\"]|::|$))"
)
_HEADER = re.compile(r"(?i)(authorization: *(?:basic|bearer)? *)[^\s'\"]+")


def without_secrets(text: str) -> str:
    """The text with `//...@` and `?...` for what stands there in the URLs of it."""
    if "://" not in text:
        return text
    shown = _QUERY.sub(rf"\g<place>?{NOT_KEPT}", _WHO.sub(f"{NOT_KEPT}@", text))
    return _HEADER.sub(rf"\g<1>{NOT_KEPT}", shown)


def all_without_secrets(value: Any) -> Any:
    """Every text in a tree of lists and mappings, as `without_secrets` makes it."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: all_without_secrets(each) for key, each in value.items()}
    return [all_without_secrets(each) for each in value] if isinstance(value, list) else value


def lacks_secrets(url: str) -> bool:
    """Whether this is a URL as it is shown, which nobody can open."""
    return f"://{NOT_KEPT}@" in url or ("://" in url and f"?{NOT_KEPT}" in url)
