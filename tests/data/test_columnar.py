"""Parquet and Arrow files are read as the shard of the same samples is: order, ledger, resume.

All but the last test need pyarrow, which is not among the requirements.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.streams import image_samples, open_stream, png, same
from tests.data.tars import Samples
from tests.data.test_tables import both, told
from trainer.data import columnar
from trainer.data.columnar import ColumnarFiles
from trainer.data.index import write_index
from trainer.data.shards import DamagedSample, ShardSet
from trainer.data.tables import Columns
from trainer.errors import ConfigError, DataError


@pytest.fixture
def arrow() -> Any:
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed")


def columns_of(samples: Samples) -> dict[str, list[Any]]:
    """As a Hugging Face dataset holds pictures: bytes and a name."""
    return {
        "key": list(samples),
        "image": [
            {"bytes": fields["png"], "path": f"{key}.png"} for key, fields in samples.items()
        ],
        "caption": [fields["txt"].decode() for fields in samples.values()],
        "maker": [json.loads(fields["json"])["maker"] for fields in samples.values()],
    }


def write_parquet(path: Path, columns: dict[str, list[Any]], *, rows: int = 5) -> str:
    arrow = importlib.import_module("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(
        arrow.table(columns), path, row_group_size=rows
    )
    return str(path)


def write_arrow(path: Path, columns: dict[str, list[Any]], *, rows: int = 5) -> str:
    """The stream format, which `save_to_disk` writes."""
    arrow, ipc = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.ipc")
    table = arrow.table(columns)
    with ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=rows)
    return str(path)


SAVE = """
import json, sys
from datasets import Dataset, Image
hub, saved = sys.argv[1:]
data = Dataset.from_parquet(hub).cast_column("image", Image()).shuffle(seed=3)
data.save_to_disk(saved, num_shards=2)
print(json.dumps(Dataset.load_from_disk(saved)["label"][:]))
"""
WRITERS = {"parquet": write_parquet, "arrow": write_arrow}


def all_forms(folder: Path, samples: Samples) -> list[str]:
    """The same samples as a tar, as a table, as Parquet and as Arrow."""
    columns = columns_of(samples)
    forms = [*both(folder, samples)]
    for ending, write in WRITERS.items():
        forms.append(write(folder / f"pairs.{ending}", columns))
        write_index(forms[-1])
    return forms


def test_every_sample_is_the_tars(tmp_path: Path, arrow: Any) -> None:
    tar, *others = map(ShardSet.open, all_forms(tmp_path, told(12)))
    for other in others:
        assert other.ids.tolist() == tar.ids.tolist()
        for index in (11, *range(12)):
            ours, theirs = other.read(index), tar.read(index)
            assert (ours.key, ours.fields) == (theirs.key, theirs.fields)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"rank": 1, "world_size": 2}])
def test_batches_and_ledger_are_the_tars(
    tmp_path: Path, arrow: Any, options: dict[str, Any]
) -> None:
    samples = told(23)
    list(samples.values())[5]["png"] = b"no picture"
    list(samples.values())[9]["txt"] = b" "
    took, lines = [], []
    for number, spec in enumerate(all_forms(tmp_path, samples)):
        workdir = tmp_path / f"run-{number}"
        stream = open_stream(spec, workdir=workdir, bad_sample_budget=0.5, **options)
        took.append([batch for _ in range(8) for batch in stream.take()])
        stream.close()
        (ledger,) = (workdir / "ledger").iterdir()
        rows = [json.loads(line) for line in ledger.read_text().splitlines()]
        assert all(Path(row.pop("shard")).stem == "pairs" for row in rows)
        lines.append(rows)
    assert lines[0]
    for batches, rows in zip(took[1:], lines[1:], strict=True):
        assert same(took[0], batches)
        assert rows == lines[0]


@pytest.mark.parametrize("ending", list(WRITERS))
def test_a_run_goes_on_in_the_middle_and_other_rows_are_another_run(
    tmp_path: Path, arrow: Any, ending: str
) -> None:
    columns, path = columns_of(told(20)), tmp_path / f"pairs.{ending}"
    write_index(WRITERS[ending](path, columns))
    whole = open_stream(str(path))
    batches = [batch for _ in range(6) for batch in whole.take()]
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in (path.name, f"{path.name}.index"):
        (tmp_path / name).rename(moved / name)
    again = open_stream(str(moved / path.name), before=whole.shard_lines)
    again.seek(24)
    assert same(batches[3:], [batch for _ in range(3) for batch in again.take()])
    columns["maker"][3] = "another"
    write_index(WRITERS[ending](moved / path.name, columns))
    with pytest.raises(DataError, match="1 changed, as pairs"):
        open_stream(str(moved / path.name), before=whole.shard_lines)


@pytest.mark.parametrize("ending", list(WRITERS))
def test_bad_cells_are_bad_samples(tmp_path: Path, arrow: Any, ending: str) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    path = WRITERS[ending](
        tmp_path / f"rows.{ending}",
        {
            "image": ["0.png", None, "gone.png", ".", "0.png"],
            "caption": [["one\nline", "two"], [], None, None, None],
            "size": [1, 2, None, 4, 5],
        },
    )
    write_index(path)
    shards, found = ShardSet.open(path), []
    for index in range(5):
        try:
            found.append(shards.read(index).fields)
        except DamagedSample as error:
            found.append(str(error).removeprefix(f"{path}: "))
    assert found == [
        {"png": png(0), "txt": b"one line\ntwo", "json": b'{"size": 1}'},
        "000000001: there is no picture ''",
        "000000002: there is no picture 'gone.png'",
        "000000003: there is no picture '.'",
        {"png": png(0), "json": b'{"size": 5}'},
    ]


@pytest.mark.parametrize("ending", list(WRITERS))
def test_a_flipped_byte_is_found_and_spoils_no_other_group(
    tmp_path: Path, arrow: Any, ending: str
) -> None:
    noise = [bytes((17 * row + n * n) % 251 for n in range(300)) for row in range(10)]
    path = Path(WRITERS[ending](tmp_path / f"a.{ending}", {"image": noise}))
    write_index(str(path))
    data = bytearray(path.read_bytes())
    data[data.index(noise[2][:60]) + 100] ^= 1
    path.write_bytes(data)
    shards = ShardSet.open(str(path))
    with pytest.raises(DamagedSample, match=r"000000002: row 2 "):
        shards.read(2)
    assert shards.read(7).fields == {"image": noise[7]}


def test_a_truncated_file_is_one_sentence(tmp_path: Path, arrow: Any) -> None:
    path = Path(write_parquet(tmp_path / "a.parquet", {"image": [png(0)]}))
    write_index(str(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"is truncated: its index expects"):
        ShardSet.open(str(path))
    with pytest.raises(DataError, match=r"a.parquet can't be read: "):
        write_index(str(path))


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"picture": [b"x"]}, Columns(), "no column 'image', only picture; name it by --image-"),
        ({"image": [b"x"]}, Columns(caption="text"), "no column 'text'.*--caption-column"),
        ({"key": [1, 1], "image": [b"x", b"y"]}, Columns(), "key '1' of row 1 comes a second time"),
        ({"image": []}, Columns(), "has columns and no row"),
    ],
)
def test_what_can_be_no_set_is_one_sentence(
    tmp_path: Path, arrow: Any, columns: dict[str, list[Any]], asked: Columns, message: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises((DataError, ConfigError), match=message):
        write_index(path, columns=asked)
    assert not Path(f"{path}.index").exists()


def test_groups_are_let_go_and_read_again(
    tmp_path: Path, arrow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns_of(told(20)))
    write_index(path)
    before = [ShardSet.open(path).read(index).fields for index in range(20)]
    monkeypatch.setattr(columnar, "KEPT_BYTES", 1)
    shards = ShardSet.open(path)
    assert [shards.read(index).fields for index in (19, 0, 7, 19)] == [
        before[index] for index in (19, 0, 7, 19)
    ]
    assert isinstance(shards._columnar, ColumnarFiles)
    assert len(shards._columnar._groups) == 1


def test_the_file_is_read_by_ranges_from_elsewhere(tmp_path: Path, arrow: Any) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns_of(told(7)))
    write_index(path)
    near, far = ShardSet.open(path), ShardSet.open(f"file://{path}")
    assert [far.read(n).fields for n in range(7)] == [near.read(n).fields for n in range(7)]
    stream = write_arrow(tmp_path / "a.arrow", columns_of(told(2)))
    with pytest.raises(DataError, match=r"is Arrow, which has to lie on a disk"):
        write_index(f"file://{stream}")


def test_a_dataset_saved_on_disk_is_read_as_it_lies(tmp_path: Path, arrow: Any) -> None:
    """Written and read back by that library in a process of its own."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    samples = image_samples(9)
    columns = {
        "image": [{"bytes": fields["png"], "path": None} for fields in samples.values()],
        "label": list(range(9)),
    }
    hub = write_parquet(tmp_path / "hub.parquet", columns)
    command = [sys.executable, "-c", SAVE, hub, f"{tmp_path}/saved"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with pytest.raises(DataError, match=r"is a folder; name its shards, as .*/saved/\*.arrow"):
        ShardSet.open(f"{tmp_path}/saved")
    spec = f"{tmp_path}/saved/data-*.arrow"
    for file in sorted((tmp_path / "saved").glob("data-*.arrow")):
        write_index(str(file))
    shards = ShardSet.open(spec)
    labels = [json.loads(shards.read(index).fields["json"])["label"] for index in range(9)]
    assert labels == json.loads(told.splitlines()[-1])
    assert sorted(labels) == list(range(9))
    for index, label in enumerate(labels):
        assert shards.read(index).fields["png"] == samples[f"{label:05d}"]["png"]
    write_index(hub)
    assert ShardSet.open(hub).read(4).fields["png"] == samples["00004"]["png"]


def test_without_the_package_one_sentence_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        write_index(str(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match=r"only data.reader: indexed reads"):
        open_stream(f"{tmp_path}/a.parquet", reader="webdataset", epoch_samples=8)
