"""Image-text data as other programs keep them, read one sample after another.

folder     an ImageFolder: CLASS/picture.jpg
table      a CSV or TSV file with a header, one picture a row
parquet    a Parquet file or a folder of them: pictures as bytes or paths (needs pyarrow)
coco       COCO-style JSON: images, annotations with captions, licenses
datasets   a Hugging Face dataset saved on disk (needs datasets)
let-it-wag the folder of Let it Wag!: 290 classes, CLASS_bird/picture.jpg
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.columnar import needed
from trainer.errors import ConfigError, DataError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Item(NamedTuple):
    """One picture with what is said of it."""

    source: str
    """Where it comes from, in a word or path; kept in the sample's json."""
    picture: bytes | Path
    captions: tuple[str, ...]
    values: dict[str, Any]


class Columns(NamedTuple):
    """Which columns of a table hold what; all others go into the json."""

    image: str = "image"
    caption: str = "caption"


def image_folder(folder: Path) -> Iterator[Item]:
    """In the order of names; a class's number is its place among the sorted names."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{folder} has no folders of classes; an ImageFolder is CLASS/picture.jpg")
    for number, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in PICTURES:
                values = {"class": name, "class_id": number}
                yield Item(str(path.relative_to(folder)), path, (name,), values)


def let_it_wag(folder: Path) -> Iterator[Item]:
    """The long-tail set of arXiv 2404.04125, a folder a class.

    A folder's name says what kind of thing the class is (`_bird`, `_aircraft`), which is no part of
    it. `class` is the name in words and `class_raw` with its underscores, as the published program
    puts it into prompts. DataError where there are not 290 classes, or two have one name.
    """
    folders = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    if len(folders) != _WAG_CLASSES:
        raise DataError(
            f"{folder} has {len(folders)} folders and Let it Wag! {_WAG_CLASSES} classes; give the "
            "folder that holds one a class, or take `folder` for another set"
        )
    raw = {name: _without_kind(name) for name in folders}
    words = {name: " ".join(short.replace("_", " ").split()) for name, short in raw.items()}
    by_name = {word: name for name, word in words.items()}
    if len(by_name) < len(words):
        double = next(name for name, word in words.items() if by_name[word] != name)
        raise DataError(
            f"{double} and {by_name[words[double]]} of {folder} are both {words[double]!r}; rename "
            "one of the folders"
        )
    for number, (name, place) in enumerate(folders.items()):
        for path in sorted(place.rglob("*")):
            if path.suffix.lower() in PICTURES:
                values = {"class": words[name], "class_raw": raw[name], "class_id": number}
                yield Item(str(path.relative_to(folder)), path, (words[name],), values)


_WAG_CLASSES = 290
_WAG_KINDS = ("_bird", "_flowers", "_aircraft", "_food")


def _without_kind(name: str) -> str:
    kind = next((kind for kind in _WAG_KINDS if name.endswith(kind)), "")
    return name.removesuffix(kind)


def table(path: Path, columns: Columns) -> Iterator[Item]:
    """Paths are relative to the table's folder."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        _refuse_missing(columns, rows.fieldnames or (), path)
        for number, row in enumerate(rows):
            extra = {k: v for k, v in row.items() if k is not None and v not in (None, "")}
            yield _row(extra, columns, f"{path.name}:{number}", path.parent)


def parquet(path: Path, columns: Columns) -> Iterator[Item]:
    module = needed("pyarrow.parquet", "pyarrow")
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .parquet file")
    for file in files:
        opened = module.ParquetFile(file)
        _refuse_missing(columns, opened.schema_arrow.names, file)
        number = 0
        for batch in opened.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield _row(row, columns, f"{file.name}:{number}", file.parent)
                number += 1


def coco(path: Path, images: Path) -> Iterator[Item]:
    """`images` is the folder that `file_name` is in."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        pictures = told["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no COCO-style JSON with `images`: {error}") from error
    captions: dict[Any, list[str]] = defaultdict(list)
    for entry in told.get("annotations", ()):
        if "caption" in entry:
            captions[entry["image_id"]].append(" ".join(str(entry["caption"]).split()))
    licences = {entry["id"]: entry for entry in told.get("licenses", ())}
    for entry in pictures:
        values = {k: v for k, v in entry.items() if isinstance(v, (str, int, float))}
        if (licence := licences.get(entry.get("license"))) is not None:
            values["license"] = licence.get("name") or licence.get("url")
            values["license_url"] = licence.get("url")
        name = entry["file_name"]
        yield Item(name, images / name, tuple(captions[entry["id"]]), values)


def saved_dataset(path: Path, columns: Columns) -> Iterator[Item]:
    """One split. Pictures stay as they were encoded."""
    module = needed("datasets", "datasets")
    data = module.load_from_disk(str(path))
    if hasattr(data, "keys"):
        raise ConfigError(f"{path} holds the splits {', '.join(data.keys())}; give one of them")
    _refuse_missing(columns, data.column_names, path)
    if type(data.features[columns.image]).__name__ == "Image":
        data = data.cast_column(columns.image, module.Image(decode=False))
    for number, row in enumerate(data):
        yield _row(row, columns, f"{path.name}:{number}", path)


def _row(row: Mapping[str, Any], columns: Columns, source: str, folder: Path) -> Item:
    values = {k: v for k, v in row.items() if k not in columns and _is_json(v)}
    return Item(
        source, _picture(row[columns.image], folder), _texts(row.get(columns.caption)), values
    )


def _picture(value: Any, folder: Path) -> bytes | Path:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return folder / str(value)


def _texts(value: Any) -> tuple[str, ...]:
    found = value if isinstance(value, (list, tuple)) else [value]
    return tuple(" ".join(str(text).split()) for text in found if text not in (None, ""))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return value is not None


def _refuse_missing(columns: Columns, found: Sequence[str], path: Path) -> None:
    if columns.image not in found:
        raise ConfigError(
            f"{path} has no column {columns.image!r}, only {', '.join(found)}; name it by "
            "--image-column"
        )
