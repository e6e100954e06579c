"""The same pictures in five layouts become the same samples, read back by the trainer's reader."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.programs.make_shards import make_shards
from trainer.programs.shard_sources import (
    Columns,
    Item,
    coco,
    image_folder,
    let_it_wag,
    parquet,
    saved_dataset,
    table,
)

WORDS = ["a red bird", "a blue fish", "two cats"]
COLUMNS = Columns("path", "title")


def encoded(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (5 + number, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded(number))
    return folder


def samples(out: Path) -> list[dict[str, object]]:
    shards = ShardSet.open(f"{out}/*.tar")
    fields = [shards.read(index).fields for index in range(len(shards))]
    return [
        {
            "picture": each.get("png") or each.get("jpg"),
            "txt": each.get("txt", b"").decode(),
            "json": json.loads(each["json"]),
        }
        for each in fields
    ]


def check(items: Iterable[Item], out: Path) -> None:
    """Pictures byte for byte, captions, sizes and licences."""
    make_shards(items, out, about={}, per_shard=2)
    found = samples(out)
    assert [each["picture"] for each in found] == [encoded(number) for number in range(3)]
    assert [each["txt"] for each in found] == WORDS
    told = [each["json"] for each in found]
    assert [(t["width"], t["height"]) for t in told] == [(7, 5), (7, 6), (7, 7)]
    assert [t["license"] for t in told] == ["MIT"] * 3
    assert sorted(path.name for path in out.glob("*.tar*")) == [
        f"{number:06d}.tar{end}" for number in range(2) for end in ("", ".index")
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_table_of_paths(tmp_path: Path, pictures: Path, kind: str) -> None:
    path = tmp_path / f"pairs.{kind}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
        writer.writerow(["path", "title", "license"])
        writer.writerows([f"pictures/{n}.png", WORDS[n], "MIT"] for n in range(3))
    check(table(path, COLUMNS), tmp_path / "out")
    with pytest.raises(ConfigError, match="has no column 'image', only path, title, license"):
        list(table(path, Columns()))


def test_coco_captions_and_licences(tmp_path: Path, pictures: Path) -> None:
    told = {
        "licenses": [{"id": 4, "name": "MIT", "url": "u"}],
        "images": [{"id": 70 + n, "file_name": f"{n}.png", "license": 4} for n in range(3)],
        "annotations": [{"image_id": 70 + n, "id": n, "caption": WORDS[n]} for n in range(3)],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(told))
    check(coco(path, pictures), tmp_path / "out")
    told["annotations"].append({"image_id": 70, "id": 9, "caption": "one more"})
    path.write_text(json.dumps(told))
    [first, *_] = coco(path, pictures)
    assert first.captions == (WORDS[0], "one more")


def test_parquet_with_pictures_inside(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow
    from pyarrow import parquet as files

    cells = [{"bytes": encoded(n), "path": None} for n in range(3)]
    data = pyarrow.table({"path": cells, "title": WORDS, "license": ["MIT"] * 3})
    files.write_table(data, tmp_path / "a.parquet")
    check(parquet(tmp_path / "a.parquet", COLUMNS), tmp_path / "out")


def test_a_saved_dataset(tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed")
    import datasets

    rows = {"path": [{"bytes": encoded(n), "path": None} for n in range(3)], "title": WORDS}
    data = datasets.Dataset.from_dict(rows | {"license": ["MIT"] * 3})
    data.cast_column("path", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    check(saved_dataset(tmp_path / "saved", COLUMNS), tmp_path / "out")


def test_an_image_folder_gives_classes_and_other_formats_become_png(tmp_path: Path) -> None:
    for name, kind in (("cat", "JPEG"), ("ant", "BMP")):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"x.{kind.lower()}").write_bytes(encoded(1, kind))
    made = make_shards(image_folder(tmp_path / "in"), tmp_path / "out", about={})
    assert made.samples == 2
    ant, cat = samples(tmp_path / "out")
    assert (ant["json"]["class"], ant["json"]["class_id"], cat["txt"]) == ("ant", 0, "cat")
    assert cat["picture"] == encoded(1, "JPEG")
    pixels = Image.open(io.BytesIO(ant["picture"]))
    assert pixels.format == "PNG"
    assert np.array_equal(np.asarray(pixels), np.asarray(Image.open(io.BytesIO(encoded(1, "BMP")))))


def test_a_killed_run_goes_on_to_the_same_bytes_and_bad_pictures_are_listed(
    tmp_path: Path, pictures: Path
) -> None:
    """Stopped in the third shard, with half a shard lying about."""
    (pictures / "1.png").write_bytes(b"no picture")

    def items() -> Iterable[Item]:
        for number in range(9):
            path = pictures / f"{number % 3}.png"
            yield Item(f"item {number}", path, (f"text {number}",), {})

    def stopped() -> Iterable[Item]:
        yield from islice(items(), 5)
        raise KeyboardInterrupt

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert make_shards(items(), whole, about={"a": 1}, per_shard=2).skipped == 3
    with pytest.raises(KeyboardInterrupt):
        make_shards(stopped(), killed, about={"a": 1}, per_shard=2)
    (killed / "000002.tar.partial").write_bytes(b"half")
    (killed / "000001.tar.index").unlink()
    again = make_shards(items(), killed, about={"a": 1}, per_shard=2)
    assert again.already_there == 1
    names = [path.name for path in sorted(whole.glob("*.tar*"))]
    assert names == [path.name for path in sorted(killed.glob("*.tar*"))]
    assert all((whole / n).read_bytes() == (killed / n).read_bytes() for n in names)
    assert "item 1\tno picture that Pillow knows" in (whole / "skipped.tsv").read_text()
    with pytest.raises(ConfigError, match="a was 1 and is 2"):
        make_shards(items(), killed, about={"a": 2}, per_shard=2)
    with pytest.raises(DataError, match="holds no picture"):
        make_shards([], tmp_path / "empty", about={})


def wag_folder(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(encoded(1, "PNG"))
    return root


def test_let_it_wag_has_290_classes_whose_names_are_no_folders_order(tmp_path: Path) -> None:
    names = [f"thing_{n:03d}" for n in range(287)] + ["ab_food", "aa_z_bird", "aa_bird"]
    made = make_shards(let_it_wag(wag_folder(tmp_path / "in", names)), tmp_path / "out", about={})
    assert made.samples == 290
    values: list[Any] = [each["json"] for each in samples(tmp_path / "out")]
    by_word = {each["class"]: each for each in values}
    assert len(by_word) == len({each["class_id"] for each in values}) == 290
    assert by_word["aa z"]["class_raw"] == "aa_z"
    assert by_word["aa z"]["source"].startswith("aa_z_bird")
    assert by_word["thing 003"]["class_raw"] == "thing_003"


def test_another_number_of_classes_or_two_of_one_name_are_refused(tmp_path: Path) -> None:
    few = wag_folder(tmp_path / "few", ["one", "two"])
    with pytest.raises(DataError, match=r"2 folders .* 290 classes"):
        next(let_it_wag(few))
    names = [f"thing_{n:03d}" for n in range(288)] + ["jay", "jay_bird"]
    with pytest.raises(DataError, match="are both 'jay'"):
        next(let_it_wag(wag_folder(tmp_path / "twins", names)))
