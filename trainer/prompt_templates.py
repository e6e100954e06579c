"""Sentences that a class name is put into: by name, from a file, or written in the run file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SETS: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "pictures": (
        *("{}", "a picture of {}", "this picture shows {}", "a close view of {}"),
        *("{}, seen from afar", "a small picture of {}", "a bright picture of {}"),
        *("a dark picture of {}", "a blurred picture of {}", "part of {}", "several of {}"),
    ),
    "photos": (
        *("a photograph of {}", "a snapshot of {}", "a photograph showing {} up close"),
        *("a photograph of {} outdoors", "a photograph of {} indoors", "{} in daylight"),
        *("a grainy photograph of {}", "a photograph of {} from the side", "{} at night"),
    ),
    "drawings": (
        *("{}", "a picture of {}", "an icon of {}", "{} emoji", "a drawing of {}"),
        *("a line drawing of {}", "a flat picture of {}", "a symbol for {}"),
    ),
}
"""Of our own writing."""
MOST_BYTES = 1 << 20


def read_templates(value: Any) -> Any:
    """A list as it is; of a text the set that it names, or the lines of the file.

    In a file `{c}`, as zero-shot benchmarks write it, stands for the name too; empty lines, and
    those that begin with `#`, say nothing.
    """
    if not isinstance(value, str):
        return value
    if value in SETS:
        return SETS[value]
    path = Path(value).expanduser()
    if not path.is_file():
        raise ValueError(
            f"{value!r} is neither a file nor a set of templates; sets: {', '.join(SETS)}"
        )
    lines = [line.replace("{c}", "{}") for line in read_names(path) if not line.startswith("#")]
    if not lines:
        raise ValueError(f"{value} holds no template")
    return tuple(lines)


def read_names(path: Path) -> list[str]:
    """The lines of a file of names that are not empty; ValueError where it is none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} is larger than 1 MiB, which no list of names is")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
