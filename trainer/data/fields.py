"""Text and json out of a sample's members: whatever can be wrong with them is a bad sample.

A member is found by its name, all that follows the first dot of the file's: `txt`, `input.jpg`.
Where no member is called just `txt`, the only one that ends in `.txt` is meant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trainer.config import IMAGE_FIELDS
from trainer.data.decode import BadSample

MAX_TEXT_BYTES = 1 << 20
"""Of a text or json: what is parsed takes up to fifty times as much memory."""


def member_of(fields: dict[str, bytes], *names: str) -> str | None:
    """The first of the names that a member has; else the only member that ends in one of them.

    BadSample where several members end so.
    """
    for name in names:
        if name in fields:
            return name
    alike = [member for member in fields if member.endswith(tuple(f".{name}" for name in names))]
    if len(alike) > 1:
        raise BadSample(
            f"{' and '.join(sorted(alike))} could all be the {' or '.join(names)}; name the one "
            "that is meant (data.images, data.captions.fields)"
        )
    return alike[0] if alike else None


def find_image(fields: dict[str, bytes], names: Sequence[str] = IMAGE_FIELDS) -> bytes:
    """The bytes of the sample's image, a member as `member_of` finds it; BadSample without one."""
    member = member_of(fields, *names)
    if member is None:
        raise BadSample(f"no image among its fields ({', '.join(sorted(fields)) or 'none'})")
    return fields[member]


def json_of(fields: dict[str, bytes]) -> dict[str, Any]:
    """The sample's json object, empty where it has none; BadSample where it can't be read."""
    data = _not_too_long(fields.get("json") or b"{}", "json")
    try:
        # strict, while json.loads lets halves of surrogate pairs pass where it decodes bytes
        value = json.loads(data.decode(json.detect_encoding(data)))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"json can't be read: {type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise BadSample(f"json holds a {type(value).__name__}, not an object")
    return value


def text_of(fields: dict[str, bytes], name: str) -> str:
    """The text of one member, empty where the sample lacks it; BadSample where it is none."""
    try:
        text = _not_too_long(fields.get(member_of(fields, name) or "", b""), name).decode()
    except UnicodeDecodeError as error:
        raise BadSample(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    return checked_text(text, name)


def _not_too_long(data: bytes, name: str) -> bytes:
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample(f"{name} has {len(data)} bytes, over {MAX_TEXT_BYTES}")
    return data


def checked_text(text: str, name: str) -> str:
    """`text`; BadSample where no UTF-8 can hold it, or where it has a NUL, as no text does."""
    if "\0" in text:
        raise BadSample(f"{name} holds a NUL at character {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(
            f"{name} holds half of a surrogate pair at character {error.start}"
        ) from None
    return text


def check_texts(value: Any, name: str) -> None:
    """BadSample where a string anywhere in a json value is half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise BadSample(f"{name} holds half of a surrogate pair, or too many lists") from None
