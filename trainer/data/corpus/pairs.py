"""One image-text pair before it is written, and the licence of each vendor's drawings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from trainer.data.corpus.npm import SETS

LICENCES = {
    "google": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "openmoji": "CC-BY-SA-4.0",
    "heroicons": "MIT",
    "lucide": "ISC",
    "material": "Apache-2.0",
    "mdi": "Apache-2.0",
    "phosphor": "MIT",
    "tabler": "MIT",
    **{each.vendor: each.licence for each in SETS},
}
"""Licence of the drawings; a vendor that is not listed here is never written."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A vendor's drawing of a concept.

    `key` is unique within a vendor, `concept` across the corpus; `facts` is what else goes into
    the sample's json; `pixels` is the hash of what is seen.
    """

    domain: str
    vendor: str
    key: str
    concept: str
    png: bytes
    pixels: str
    caption: str
    facts: dict[str, Any]

    @property
    def toned(self) -> bool:
        """Whether the drawing differs from another one by skin tone."""
        return bool(self.facts["tone"])


def fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on the words alone: how splits and orders are drawn."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:6], "little") / 2**48
