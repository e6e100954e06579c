"""A CSV or TSV table is read as the shard of the same samples is: order, ledger and resume."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.streams import image_samples, open_stream, png, same
from tests.data.tars import Samples, write_tar
from trainer.data.index import write_index
from trainer.data.shards import DamagedSample, ShardSet
from trainer.data.tables import Columns
from trainer.errors import ConfigError, DataError

TEXTS = ("plain", "a, comma", 'a "quote"', "two\nlines", "Ünï çødé \u2028 ↯", "tab\there")


def told(count: int) -> Samples:
    """Samples whose captions try the format, with a column of their own."""
    samples = image_samples(count)
    for number, fields in enumerate(samples.values()):
        fields["txt"] = f"sample {TEXTS[number % len(TEXTS)]} {number}".encode()
        fields["json"] = json.dumps({"maker": f"m{number % 3}"}).encode()
    return samples


def write_table(path: Path, samples: Samples, *, first: str = "", **options: Any) -> str:
    """The pictures in a folder beside the table, and a row for each."""
    pictures = path.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(first)
        writer = csv.writer(file, delimiter=delimiter, **options)
        writer.writerow(["key", "maker", "image", "caption"])
        for key, fields in samples.items():
            (pictures / f"{key}.png").write_bytes(fields["png"])
            maker = json.loads(fields["json"])["maker"]
            writer.writerow([key, maker, f"pictures/{key}.png", fields["txt"].decode()])
    write_index(str(path))
    return str(path)


def both(folder: Path, samples: Samples, ending: str = "csv", **options: Any) -> tuple[str, str]:
    """The same samples as a tar and as a table."""
    tar = write_tar(folder / "pairs.tar", samples)
    write_index(tar)
    return tar, write_table(folder / f"pairs.{ending}", samples, **options)


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("csv", {}),
        ("csv", {"lineterminator": "\n", "quoting": csv.QUOTE_ALL, "first": "\ufeff"}),
        ("tsv", {"lineterminator": "\r", "quoting": csv.QUOTE_ALL}),
    ],
)
def test_every_sample_is_the_tars(tmp_path: Path, ending: str, options: dict[str, Any]) -> None:
    tar, table = map(ShardSet.open, both(tmp_path, told(12), ending, **options))
    assert len(tar) == len(table) == 12
    for index in range(12):
        ours, theirs = table.read(index), tar.read(index)
        assert (ours.key, ours.sample_id, ours.fields) == (
            theirs.key,
            theirs.sample_id,
            theirs.fields,
        )


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"rank": 1, "world_size": 2}])
def test_batches_and_ledger_are_the_tars(tmp_path: Path, options: dict[str, Any]) -> None:
    samples = told(23)
    list(samples.values())[5]["png"] = b"no picture"
    list(samples.values())[9]["txt"] = b" "
    took, lines = [], []
    for name, spec in zip(("tar", "table"), both(tmp_path, samples), strict=True):
        workdir = tmp_path / name
        stream = open_stream(spec, workdir=workdir, bad_sample_budget=0.5, **options)
        took.append([batch for _ in range(8) for batch in stream.take()])
        stream.close()
        (ledger,) = (workdir / "ledger").iterdir()
        rows = [json.loads(line) for line in ledger.read_text().splitlines()]
        assert all(Path(row.pop("shard")).stem == "pairs" for row in rows)
        lines.append(rows)
    assert same(*took)
    assert lines[0]
    assert lines[0] == lines[1]


def test_a_run_goes_on_in_the_middle_and_elsewhere(tmp_path: Path) -> None:
    _, table = both(tmp_path, told(20))
    whole = open_stream(table)
    batches = [batch for _ in range(6) for batch in whole.take()]
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("pictures", "pairs.csv", "pairs.csv.index"):
        (tmp_path / name).rename(moved / name)
    again = open_stream(str(moved / "pairs.csv"), before=whole.shard_lines)
    again.seek(24)
    assert same(batches[3:], [batch for _ in range(3) for batch in again.take()])
    text = (moved / "pairs.csv").read_text()
    (moved / "pairs.csv").write_text(text.replace("m1", "m7"))
    write_index(str(moved / "pairs.csv"))
    with pytest.raises(DataError, match="1 changed, as pairs"):
        open_stream(str(moved / "pairs.csv"), before=whole.shard_lines)


def test_bad_rows_are_bad_samples_and_take_no_other_along(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    table = tmp_path / "rows.csv"
    table.write_bytes(
        b"image,caption\n"
        b"0.png,sound\n"
        b'0.png,"never closed\n'
        b"0.png,sound\n"
        b"0.png\n"
        b"\n"
        b"gone.png,sound\n"
        b"0.png,a,b\n"
        b"0.png,caf\xe9\n"
        b",sound\n"
        b'0.png,"the quote that\ncloses"\n'
        b'0.png,"never\n'
        b'0.png,"sound"\n'
        b".,sound"
    )
    assert write_index(str(table)) == 12
    shards, found = ShardSet.open(str(table)), []
    for index in range(12):
        try:
            found.append(shards.read(index).fields["txt"].decode())
        except DamagedSample as error:
            found.append(str(error).removeprefix(f"{table}: "))
    assert found == [
        "sound",
        "000000001: no row of 2 columns: unexpected end of data",
        "sound",
        "000000003: 1 values for 2 columns",
        "000000004: there is no picture 'gone.png'",
        "000000005: 3 values for 2 columns",
        found[6],
        "000000007: there is no picture ''",
        "the quote that\ncloses",
        "000000009: no row of 2 columns: unexpected end of data",
        "sound",
        "000000011: there is no picture '.'",
    ]
    assert "can't decode byte 0xe9" in found[6]


def test_bad_rows_count_against_the_budget(tmp_path: Path) -> None:
    samples = told(40)
    _, table = both(tmp_path, samples)
    for key in list(samples)[:20]:
        (tmp_path / "pictures" / f"{key}.png").unlink()
    stream = open_stream(table, workdir=tmp_path, bad_sample_budget=0.1)
    with pytest.raises(
        DataError, match=r"bad_sample_budget = 0.1: .*there is no picture 'pictures/"
    ):
        [stream.take() for _ in range(20)]


def test_a_changed_row_and_a_changed_table_are_named(tmp_path: Path) -> None:
    _, table = both(tmp_path, told(6))
    text = Path(table).read_bytes()
    Path(table).write_bytes(text.replace(b"m1", b"m2", 1))
    shards = ShardSet.open(table)
    with pytest.raises(DamagedSample, match=r"pairs.csv: 00001: content at byte .* is damaged"):
        shards.read(1)
    assert shards.read(2).key == "00002"
    Path(table).write_bytes(text + b"x,y,z,w\n")
    with pytest.raises(DataError, match=r"pairs.csv is changed: its index expects"):
        ShardSet.open(table)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("path,caption\na.png,x\n", Columns(), "no column 'image', only path, caption; name it by"),
        ("image,title\na.png,x\n", Columns(caption="text"), "no column 'text'.*--caption-column"),
        ("image,image\na.png,x\n", Columns(), "two columns of one name"),
        ("image,caption\n\n", Columns(), "has a header and no row"),
        ("", Columns(), "does not begin with a line of column names"),
        ('"image,caption\n', Columns(), "does not begin with a line of column names"),
        ("key,image\na,a.png\na,b.png\n", Columns(), "key 'a' of row 1 comes a second time"),
    ],
)
def test_what_can_be_no_table_is_one_sentence(
    tmp_path: Path, text: str, columns: Columns, message: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises((DataError, ConfigError), match=message):
        write_index(str(path), columns=columns)
    assert not path.with_suffix(".csv.index").exists()


def test_other_files_say_the_way(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", image_samples(2))
    with pytest.raises(ConfigError, match=r"a.tar is no table"):
        write_index(tar, columns=Columns(image="path"))
    _, table = both(tmp_path, told(2))
    with pytest.raises(ConfigError, match=r"only data.reader: indexed reads"):
        open_stream(table, reader="webdataset", epoch_samples=8)


def test_the_tool_takes_other_columns_and_a_row_is_called_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    table = tmp_path / "t.tsv"
    table.write_text(f"title\tpath\tlicense\nwords\t{tmp_path}/0.png\tCC0\n")
    command = [sys.executable, "tools/index.py", str(table)]
    subprocess.run([*command, "--image-column", "path", "--caption-column", "title"], check=True)
    sample = ShardSet.open(f"mine={table}").read(0)
    assert (sample.key, sample.fields["txt"]) == ("000000000", b"words")
    assert json.loads(sample.fields["json"]) == {"license": "CC0"}


def test_tables_and_tars_mix(tmp_path: Path) -> None:
    tar, table = both(tmp_path, told(10))
    stream = open_stream(f"a={tar}::b={table}", global_batch=15, weights={"b": 2})
    ids = [int(value) for _ in range(2) for value in stream.take()[0].sample_id]
    shards = ShardSet.open(f"a={tar}::b={table}")
    assert sorted(ids) == sorted([*shards.ids.tolist(), *shards.ids[10:].tolist()])


def test_a_gap_in_a_brace_range_names_what_is_missing(tmp_path: Path) -> None:
    for number in (0, 2, 4):
        write_index(write_tar(tmp_path / f"{number}.tar", image_samples(2, first=2 * number)))
    with pytest.raises(DataError) as error:
        ShardSet.open(f"{tmp_path}/{{0..5}}.tar")
    assert str(error.value).startswith(
        f"no shard {tmp_path}/1.tar, {tmp_path}/3.tar, {tmp_path}/5.tar: 3 of 6 are missing; "
    )
    assert len(ShardSet.open(f"{tmp_path}/{{0..4..2}}.tar")) == 6
    with pytest.raises(DataError, match=r"8.tar, nor any other of the 2 that are listed"):
        ShardSet.open(f"{tmp_path}/{{8..9}}.tar")
