"""Icon sets: one-colour line and solid drawings whose file names are their captions."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple
from zipfile import ZipFile

from trainer.data.corpus.pairs import LICENCES, Pair
from trainer.data.corpus.pictures import pixel_hash, render_svg


class IconSet(NamedTuple):
    """Where a vendor's icons lie in its archive and how a path becomes (style, name)."""

    vendor: str
    package: str
    nested: bool
    """Whether the icons are in an `icons.zip` inside the archive."""
    read_path: Callable[[str], tuple[str, str] | None]


def _mdi(path: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"([^/]+?)(-outline)?\.svg", path)
    return ("outline" if match[2] else "solid", match[1]) if match else None


def _phosphor(path: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"(regular|fill|duotone)/(.+?)(-fill|-duotone)?\.svg", path)
    return (match[1], match[2]) if match else None


def _lucide(path: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"([^/]+)\.svg", path)
    return ("line", match[1]) if match else None


def _material(path: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"(filled|outlined)/(.+)\.svg", path)
    return (match[1], match[2]) if match else None


def _heroicons(path: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"24/(outline|solid)/(.+)\.svg", path)
    return (match[1], match[2]) if match else None


def _tabler(path: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"pytablericons/icons/(outline|filled)/(.+)\.svg", path)
    return (match[1], match[2]) if match else None


ICON_SETS = (
    IconSet("heroicons", "justmyresource-heroicons", True, _heroicons),
    IconSet("lucide", "justmyresource-lucide", True, _lucide),
    IconSet("material", "justmyresource-material-icons", True, _material),
    IconSet("mdi", "justmyresource-mdi", True, _mdi),
    IconSet("phosphor", "justmyresource-phosphor", True, _phosphor),
    IconSet("tabler", "pytablericons", False, _tabler),
)


def icon_name(file_name: str) -> str:
    """`arrow-left_2` -> `arrow left 2`."""
    return " ".join(re.split("[-_ ]+", file_name)).strip()


def read_icons(archives: Mapping[str, ZipFile], dropped: Counter[str]) -> list[Pair]:
    """Every icon of the archives that are there; counts in `dropped` what can't be drawn."""
    tags = _read_tags(archives["icon-mcp"]) if "icon-mcp" in archives else {}
    pairs: list[Pair] = []
    for icons in ICON_SETS:
        for style, name, data in _files(icons, archives):
            try:
                pairs.append(_pair(icons.vendor, style, name, render_svg(data), tags))
            except ValueError:
                dropped[f"{icons.vendor}: can't be drawn"] += 1
    return pairs


def _files(icons: IconSet, archives: Mapping[str, ZipFile]) -> Iterator[tuple[str, str, bytes]]:
    archive = archives.get(icons.package)
    if archive is None:
        return
    if icons.nested:
        inner = next(name for name in archive.namelist() if name.endswith("/icons.zip"))
        archive = ZipFile(io.BytesIO(archive.read(inner)))
    seen: set[tuple[str, str]] = set()
    for path in sorted(archive.namelist()):
        found = icons.read_path(path)
        if found and found not in seen:
            seen.add(found)
            yield *found, archive.read(path)


def _read_tags(archive: ZipFile) -> dict[str, list[str]]:
    rows = json.loads(archive.read("icon_mcp/icon_index.json"))["icons"]
    return {icon_name(name): list(dict.fromkeys(row["tags"])) for name, row in rows.items()}


def _pair(vendor: str, style: str, file_name: str, png: bytes, tags: dict[str, list[str]]) -> Pair:
    name = icon_name(file_name)
    facts = {
        "name": name,
        "concept": name,
        "concept_id": f"icon:{name}",
        "group": None,
        "subgroup": None,
        "tone": [],
        "vendor": vendor,
        "domain": "icon",
        "style": style,
        "alias": [],
        "keywords": tags.get(name, []),
        "lang": {"en": name},
        "gloss": None,
        "long": None,
        "licence": LICENCES[vendor],
    }
    return Pair(
        domain="icon",
        vendor=vendor,
        key=f"{style}-{file_name}",
        concept=f"icon:{name}",
        png=png,
        pixels=pixel_hash(png),
        caption=f"{name} icon",
        facts=facts,
    )
