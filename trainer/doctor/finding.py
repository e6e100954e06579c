"""One thing that was looked at, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from trainer.addresses import without_secrets
from trainer.errors import TrainerError


class Finding(NamedTuple):
    """`wrong` is a sentence with the way out; empty where all is well."""

    about: str
    wrong: str = ""
    said: str = ""
    """What is so, where nothing is wrong."""
    blocks: bool = True
    """Whether a run can't go well with it; else it is only slower or shorter."""

    def __str__(self) -> str:
        mark = "ok   " if not self.wrong else ("WRONG" if self.blocks else "note ")
        text = self.wrong or self.said
        return without_secrets(f"{mark} {self.about}" + (f": {text}" if text else ""))


def looked_at(about: str, look: Callable[[], str | None]) -> Finding:
    """What `look` says of itself; a user's mistake that it meets is what is wrong."""
    try:
        return Finding(about, said=look() or "")
    except (TrainerError, OSError) as error:
        return Finding(about, str(error))
