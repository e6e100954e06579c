"""Drawings and names of an icon set in Iconify's form."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from trainer.data.corpus.icons import icon_name
from trainer.data.corpus.npm import IconifySet
from trainer.data.corpus.pictures import SIDE, render_svg
from trainer.errors import DataError

_STYLES = (
    "outline-rounded|outline-sharp|line-duotone|bold-duotone|outline|outlined|filled|fill|solid|"
    "linear|bold|duotone|broken|twotone|sharp|rounded"
)
"""Ends of file names that say how and not what."""
_MORE_STYLES = {
    "clarity": "line",
    "fluent": r"\d+-filled|\d+-regular|\d+-light",
    "gg": "o|r",
    "healthicons": "outline-24px|24px",
    "iconamoon": "light|thin|regular",
    "mingcute": "line",
    "octicon": r"\d+",
    "ri": "line",
    "streamline": "remix",
    "streamline-flex": "remix",
    "streamline-plump": "remix",
    "vaadin": "o",
}
"""The same of single sets, where these words are never a part of what is drawn."""
_NUMBERED = "streamline"
"""Sets of this family number their drawings of one idea: `kangaroo-2`."""
_PREFIX = re.compile(r"^bx[sl]?-")
_SIZE = re.compile(r"\d+(px)?-?")
_PREFERRED_SIZE = "24"


class Icon(NamedTuple):
    """One drawing of a set: its file name, what is drawn and how."""

    key: str
    name: str
    style: str
    alias: list[str]
    category: str | None


class IconifyFile(NamedTuple):
    """What an archive holds: drawings by file name, other names, categories."""

    bodies: dict[str, str]
    """A whole SVG each."""
    aliases: dict[str, list[str]]
    categories: dict[str, str]


def read_archive(path: Path, each: IconifySet) -> IconifyFile:
    """DataError where the archive has no such set or its licence is another one than is pinned."""
    with tarfile.open(path, "r:gz") as tar:
        icons, info = _json(tar, "icons.json"), _json(tar, "info.json")
        metadata = _json(tar, "metadata.json")
    found = info.get("license", {}).get("spdx")
    if found != each.licence:
        raise DataError(f"{path} says that its licence is {found}, and {each.licence} is pinned")
    shown = {key: icon for key, icon in icons["icons"].items() if not icon.get("hidden")}
    return IconifyFile(
        bodies={key: _svg(icon, icons) for key, icon in sorted(shown.items())},
        aliases=_aliases(icons.get("aliases", {})),
        categories={
            key: category
            for category, keys in metadata.get("categories", {}).items()
            for key in keys
        },
    )


def _json(tar: tarfile.TarFile, name: str) -> dict[str, Any]:
    try:
        file = tar.extractfile(f"package/{name}")
    except KeyError:
        return {}
    return {} if file is None else dict(json.loads(file.read()))


def _svg(icon: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    left, top, width, height = (
        icon.get(name, defaults.get(name, other))
        for name, other in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _aliases(table: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Other names by file name. A turned or mirrored drawing is no other name of it."""
    found: dict[str, list[str]] = {}
    for alias, entry in sorted(table.items()):
        if entry.keys() <= {"parent", "hidden"}:
            found.setdefault(entry["parent"], []).append(alias)
    return found


def what_and_how(key: str, vendor: str) -> tuple[str, str]:
    """`arrow-left-24-filled` of `fluent` -> `arrow left`, `24-filled`."""
    styles = "|".join(filter(None, (_MORE_STYLES.get(vendor), _STYLES)))
    match = re.fullmatch(rf"(.+?)-({styles})", key)
    stem, style = (match[1], match[2]) if match else (key, "plain")
    if vendor.startswith(_NUMBERED):
        stem = re.sub(r"(?<=.)-\d+$", "", stem)
    return icon_name(_PREFIX.sub("", stem)), style


def icons_of(file: IconifyFile, vendor: str) -> list[Icon]:
    """Every drawing; of one that a set has in several sizes, one."""
    chosen: dict[tuple[str, str], str] = {}
    icons: dict[str, Icon] = {}
    for key in file.bodies:
        name, style = what_and_how(key, vendor)
        plain_style = _SIZE.sub("", style).strip("-") or "plain"
        same = (key[: len(key) - len(style)] if _SIZE.match(style) else key, plain_style)
        if same not in chosen or style.startswith(_PREFERRED_SIZE):
            icons.pop(chosen.get(same, ""), None)
            chosen[same] = key
            alias = {what_and_how(other, vendor)[0] for other in file.aliases.get(key, [])}
            others = sorted(alias - {name})
            icons[key] = Icon(key, name, plain_style, others, file.categories.get(key))
    return list(icons.values())


def drawn_with() -> str:
    """The version of the library that draws: another one may draw otherwise."""
    return importlib.metadata.version("resvg-py")


def draw(path: Path, each: IconifySet, file: IconifyFile, keys: list[str]) -> dict[str, bytes]:
    """PNG by file name, kept beside the archive; what can't be drawn is missing.

    The file of drawings appears whole or not at all, so a build that was killed goes on with the
    next set.
    """
    kept, mark = path.with_suffix(".drawn.zip"), f"{each.pin.sha256} {SIDE} {drawn_with()}".encode()
    try:
        with ZipFile(kept) as archive:
            if archive.comment == mark:
                return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, BadZipFile):
        pass
    drawn = {}
    for key in keys:
        try:
            drawn[key] = render_svg(file.bodies[key].encode())
        except ValueError:
            continue
    unfinished = kept.with_suffix(".unfinished")
    with ZipFile(unfinished, "w", ZIP_STORED) as archive:
        archive.comment = mark
        for key, png in drawn.items():
            archive.writestr(key, png)
    unfinished.replace(kept)
    return drawn
