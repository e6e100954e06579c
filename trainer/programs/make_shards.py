"""Shards from other people's layouts: deterministic, indexed at writing, gone on with after a kill.

OUT/000000.tar, 000000.tar.index   `--per-shard` samples each: picture, txt, json
OUT/shards.json                    what they were made from, and with which settings
OUT/skipped.tsv                    samples that could not be read, and why
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from trainer.data.index import index_path, write_index
from trainer.errors import ConfigError, DataError
from trainer.long_work import LongWork
from trainer.programs.shard_sources import Item
from trainer.store.header import write_whole

KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes are kept as they are; others become PNG."""
ABOUT = "shards.json"


class Made(NamedTuple):
    samples: int
    """In shards that were written now."""
    shards: int
    skipped: int
    already_there: int
    """Shards of an earlier start."""


def make_shards(
    items: Iterable[Item], out: Path, *, about: dict[str, Any], per_shard: int = 1000
) -> Made:
    """Write them. `about` says what the items are; other items do not go into the same folder.

    A picture that can't be read is left out and listed. DataError where there is no item.
    """
    out.mkdir(parents=True, exist_ok=True)
    _refuse_another_source(out, about | {"per_shard": per_shard})
    made, skipped = [0, 0, 0], list[str]()
    with LongWork("writing shards", total=None, unit="samples") as work:
        for number, chunk in enumerate(_chunks(items, per_shard)):
            tar = out / f"{number:06d}.tar"
            if tar.exists() and Path(index_path(str(tar))).exists():
                made[2] += 1
                continue
            bad = _write(tar, chunk, first=number * per_shard)
            skipped += bad
            made[0] += len(chunk) - len(bad)
            made[1] += 1
            work.done(len(chunk))
    if not made[1] + made[2]:
        raise DataError("the source holds no picture")
    with (out / "skipped.tsv").open("a") as file:
        file.writelines(f"{line}\n" for line in skipped)
    return Made(made[0], made[1], len(skipped), made[2])


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _refuse_another_source(out: Path, about: dict[str, Any]) -> None:
    path = out / ABOUT
    if path.exists():
        before = json.loads(path.read_text())
        if before != about:
            key = next(k for k in {*before, *about} if before.get(k) != about.get(k))
            raise ConfigError(
                f"{out} holds shards of another source ({key} was {before.get(key)!r} and is "
                f"{about.get(key)!r}); give another folder"
            )
    elif any(out.glob("*.tar")):
        raise ConfigError(
            f"{out} holds shards that this program did not write; give another folder"
        )
    write_whole(path, json.dumps(about, indent=2, sort_keys=True).encode() + b"\n")


def _write(tar: Path, items: list[Item], *, first: int) -> list[str]:
    """One shard: whole under its name or not at all. What was left out, and why."""
    partial, skipped = tar.with_suffix(".tar.partial"), []
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for place, item in enumerate(items):
            try:
                members = _members(item)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                skipped.append(f"{item.source}\t{' '.join(str(error).split())}")
                continue
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{first + place:09d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    os.replace(partial, tar)
    write_index(str(tar))
    return skipped


def _members(item: Item) -> dict[str, bytes]:
    """Picture, captions (a line each), and json with size and source."""
    data = item.picture if isinstance(item.picture, bytes) else item.picture.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            size, kind = image.size, image.format or ""
            if kind not in KEPT:
                data, kind = _as_png(image), "PNG"
    except UnidentifiedImageError:
        raise ValueError("no picture that Pillow knows") from None
    values = {**item.values, "width": size[0], "height": size[1], "source": item.source}
    if len(item.captions) > 1:
        values["captions"] = list(item.captions)
    said = {"txt": "\n".join(item.captions).encode()} if item.captions else {}
    return {KEPT[kind]: data, **said, "json": json.dumps(values, ensure_ascii=False).encode()}


def _as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    clear = "A" in image.getbands() or "transparency" in image.info
    image.convert("RGBA" if clear else "RGB").save(file, format="PNG")
    return file.getvalue()
