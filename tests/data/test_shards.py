"""The indexed reader against Python's tarfile and webdataset's own reader of the same shards."""

from __future__ import annotations

import gc
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.tars import make_samples, write_members, write_tar
from trainer.data.index import index_path, read_index, write_index
from trainer.data.remote import expand_shards
from trainer.data.shards import ShardSet, sample_id
from trainer.errors import DataError


def read_all(spec: str) -> dict[str, dict[str, bytes]]:
    shards = ShardSet.open(spec)
    samples = [shards.read(index) for index in range(len(shards))]
    shards.close()
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: sample.fields for sample in samples}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_was_written(tmp_path, layout):
    samples = make_samples(20)
    if layout != tarfile.USTAR_FORMAT:
        samples["long/" + "x" * 300] = {"txt": b"a long name", "jpg": b"1"}
        samples["grüße/ключ"] = {"txt": b"", "seg.png": b"2"}
    shard = write_tar(tmp_path / "a.tar", samples, format=layout)
    assert write_index(shard) == len(samples)
    assert read_all(shard) == samples


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to gc
def test_equals_webdataset(tmp_path, monkeypatch):
    # A stream sets it for its process, after which webdataset doubts patterns of paths.
    monkeypatch.setattr(webdataset.utils, "enforce_security", False)
    with webdataset.ShardWriter(f"{tmp_path}/%03d.tar", maxcount=7, verbose=0) as writer:
        for key, fields in make_samples(30).items():
            writer.write({"__key__": f"dir.x/{key}", **fields})
    spec = f"{tmp_path}/{{000..004}}.tar"
    theirs = {}
    for sample in webdataset.WebDataset(expand_shards(spec), shardshuffle=False, empty_check=False):
        theirs[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    gc.collect()
    for shard in expand_shards(spec):
        write_index(shard)
    assert read_all(spec) == theirs


def test_ids_are_unique_and_follow_the_shards_name(tmp_path):
    for number in range(3):
        write_index(write_tar(tmp_path / f"s{number}.tar", make_samples(9)))
    shards = ShardSet.open(f"{tmp_path}/s*.tar")
    assert shards.sizes == (9, 9, 9)
    assert len(np.unique(shards.ids)) == 27
    assert shards.ids.dtype == np.int64
    assert (shards.ids >= 0).all()
    for index in (0, 13, 26):
        sample = shards.read(index)
        assert sample.sample_id == shards.ids[index] == sample_id(sample.shard, sample.key)
        assert shards.name_of(index) == (sample.shard, sample.key, sample.sample_id)
    assert sample_id("s3://b/x/00012.tar?v=1", "k") == sample_id("00012", "k")
    os.rename(tmp_path / "s1.tar", tmp_path / "t1.tar")
    os.rename(tmp_path / "s1.tar.index", tmp_path / "t1.tar.index")
    renamed = ShardSet.open(str(tmp_path / "t1.tar"))
    assert renamed.ids.tolist() == [sample_id("t1", key) for key in make_samples(9)]


def test_a_copy_for_a_worker_reads_the_same(tmp_path):
    write_index(write_tar(tmp_path / "a.tar", make_samples(5)))
    shards = ShardSet.open(str(tmp_path / "a.tar"))
    shards.read(0)
    assert pickle.loads(pickle.dumps(shards)).read(3) == shards.read(3)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    for reader in ("shards", "open_files"):
        monkeypatch.setattr(f"trainer.data.{reader}.OPEN_SHARDS", 2)
    for number in range(6):
        write_index(write_tar(tmp_path / f"{number}.tar", make_samples(3, seed=number)))
    shards = ShardSet.open(f"{tmp_path}/{{0..5}}.tar")
    for index in [*range(18), *reversed(range(18))]:
        number, row = divmod(index, 3)
        key = f"k{row:04d}"
        assert shards.read(index).fields == make_samples(3, seed=number)[key]
    assert len(shards._files._handles) == len(shards._indexes) == 2


def test_spec_lists(tmp_path):
    for name in ("a1", "a2", "b[1]", "c"):
        (tmp_path / f"{name}.tar").touch()
    found = expand_shards(f"{tmp_path}/{{a1,c}}.tar::{tmp_path}/a[2-9].tar :: {tmp_path}/b[1].tar")
    assert [Path(path).stem for path in found] == ["a1", "c", "a2", "b[1]"]
    assert expand_shards("https://h/{000..002}.tar?v=1")[2] == "https://h/002.tar?v=1"
    assert index_path("https://h/002.tar?v=1") == "https://h/002.tar.index?v=1"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{dir}/no*.tar", "no shard matches"),
        ("{dir}/a.tar::{dir}/[a].tar", "twice"),
        ("{dir}/a.tar::", "empty part"),
        ("pipe:cat x.tar", "allow_pipe"),
        ("{dir}/*", "matches 2 files that are no shards, as .*.json; end the pattern in .tar"),
        ("{dir}", "is a folder; name its shards, as .*\\*.tar"),
        ("{dir}/nope.tar", "no shard .*nope.tar"),
        ("{dir}/bare.tar", "no index .*bare.tar.index; build it: python tools/index.py"),
    ],
)
def test_mistakes_in_a_spec_are_named(tmp_path, spec, message):
    write_index(write_tar(tmp_path / "a.tar", make_samples(2)))
    write_tar(tmp_path / "bare.tar", make_samples(2))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match=message):
        ShardSet.open(spec.replace("{dir}", str(tmp_path)))


def test_equal_names_in_two_folders(tmp_path):
    for folder, prefix in (("x", "k"), ("y", "k"), ("z", "other")):
        (tmp_path / folder).mkdir()
        write_index(write_tar(tmp_path / folder / "0.tar", make_samples(4, prefix=prefix)))
    both = ShardSet.open(f"{tmp_path}/{{x,y}}/0.tar")
    assert both.sets == ("x", "y")
    assert len(set(both.ids.tolist())) == 8
    assert len(ShardSet.open(f"{tmp_path}/{{x,z}}/0.tar")) == 8


def with_header(tmp_path: Path, **fields: object) -> str:
    """A shard with one good sample and then one member whose header has these fields."""
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("good.txt"), io.BytesIO())
        member = tarfile.TarInfo("odd.txt")
        for name, value in fields.items():
            setattr(member, name, value)
        archive.addfile(member, io.BytesIO(b"x" * member.size))
    return str(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": tarfile.SYMTYPE, "size": 512}, "'odd.txt' is a symbolic link, yet has 512"),
        ({"type": b"9"}, "of tar type b'9'"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "a sparse file"),
        ({"name": "/abs.txt"}, "'/abs.txt' points outside"),
        ({"name": "a/../../b.txt"}, "points outside"),
        ({"name": "good.txt"}, "key 'good' has two members 'txt'"),
        ({"size": 5000}, "'odd.txt' has 5000 bytes, over the cap of 4096"),
    ],
)
def test_refused_by_name(tmp_path, fields, message):
    with pytest.raises(DataError, match=message):
        write_index(with_header(tmp_path, **fields), max_member_bytes=4096)
    assert not list(tmp_path.glob("*.index*"))


def test_directories_are_skipped(tmp_path):
    shard = with_header(tmp_path, name="folder.d", type=tarfile.DIRTYPE)
    assert write_index(shard) == 1
    assert read_all(shard) == {"good": {"txt": b""}}


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "good.txt"},
        {"type": tarfile.CHRTYPE},
        {"type": tarfile.FIFOTYPE},
        {"name": "README"},
        {"name": ".DS_Store", "size": 700},
        {"name": "folder/._good.txt", "size": 4000},
        {"name": "written as a file/"},
    ],
    ids=str,
)
def test_members_of_no_sample_are_skipped_and_named(tmp_path, fields):
    shard = with_header(tmp_path, **fields)
    skipped: list[str] = []
    assert write_index(shard, skipped=skipped) == 1
    assert skipped == [fields.get("name", "odd.txt")]
    assert read_all(shard) == {"good": {"txt": b""}}


def test_stray_members_between_those_of_a_sample_are_not_read_as_its_bytes(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("._a.jpg", "a.jpg", "._a.txt", "a.txt", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("l" * 300 + ".jpg")  # both of its names need headers of their own
        link.type, link.linkname = tarfile.SYMTYPE, "t" * 300
        archive.addfile(link)
        member = tarfile.TarInfo("b.txt")
        archive.addfile(member)
    skipped: list[str] = []
    assert write_index(str(path), skipped=skipped) == 2
    assert sorted(skipped) == sorted(["._a.jpg", "._a.txt", link.name])
    assert read_all(str(path)) == {
        "a": {"jpg": b"a.jpg", "txt": b"a.txt"},
        "b": {"jpg": b"b.jpg", "txt": b""},
    }


def test_a_shard_of_stray_members_alone_is_refused(tmp_path):
    shard = write_members(tmp_path / "a.tar", [("README", b"1"), (".DS_Store", b"2")])
    with pytest.raises(DataError, match="none of its 2 members, as 'README'"):
        write_index(shard)


def test_interleaved_keys_are_refused(tmp_path):
    names = ["a.jpg", "b.jpg", "a.txt", "b.txt"]
    shard = write_members(tmp_path / "a.tar", [(name, b"1") for name in names])
    with pytest.raises(DataError, match="key 'a' comes again after 'b'"):
        write_index(shard)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(tmp_path, mode):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{mode}") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(DataError, match="-compressed; shards are plain tars"):
        write_index(str(path))


def test_glued_archives_are_refused(tmp_path):
    first = write_tar(tmp_path / "a.tar", make_samples(2))
    Path(first).write_bytes(Path(first).read_bytes() * 2)
    with pytest.raises(DataError, match="data behind its end-of-archive"):
        write_index(first)


def test_a_large_size_in_base_256_is_capped(tmp_path):
    shard = with_header(tmp_path)
    data = bytearray(Path(shard).read_bytes())
    header = data[512:1024]
    header[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[512:1024] = header
    Path(shard).write_bytes(data)
    with pytest.raises(DataError, match="has 1099511627776 bytes, over the cap"):
        write_index(shard)


def test_index_is_checked_and_columnar(tmp_path):
    shard = write_tar(tmp_path / "a.tar", make_samples(100))
    write_index(shard)
    index = read_index(shard)
    assert index.shard_bytes == os.path.getsize(shard)
    assert index.keys == list(make_samples(100))
    whole = Path(index_path(shard)).read_bytes()
    for byte in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << byte % 8
        with pytest.raises(DataError, match="index"):
            read_index(shard, bytes(damaged))
    for length in (0, 10, 80, len(whole) - 1):
        with pytest.raises(DataError, match="index"):
            read_index(shard, whole[:length])


def test_the_tool_builds_what_open_asks_for(tmp_path):
    write_tar(tmp_path / "a.tar", make_samples(4))
    write_tar(tmp_path / "b.tar", make_samples(3))
    command = [sys.executable, "tools/index.py", f"{tmp_path}/{{a,b}}.tar"]
    assert "\n7 samples\nnext: " in subprocess.check_output(command, text=True)
    again = subprocess.check_output([*command, "--missing"], text=True)
    assert again.count("has an index") == 2
    assert len(ShardSet.open(f"{tmp_path}/*.tar")) == 7
    failed = subprocess.run([*command[:2], f"{tmp_path}/c.tar"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "c.tar" in failed.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_tool_indexes_what_is_good_and_names_all_that_is_bad(tmp_path, workers):
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", make_samples(3))
    cut = tmp_path / "1.tar"
    cut.write_bytes(cut.read_bytes()[:700])
    write_members(tmp_path / "4.tar", [("README", b"x"), ("k.txt", b"y"), ("._k.txt", b"z")])
    command = [sys.executable, "tools/index.py", f"{tmp_path}/{{0..5}}.tar", "--workers", workers]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert [path.name for path in sorted(tmp_path.glob("*.index"))] == [
        f"{number}.tar.index" for number in (0, 2, 3, 4)
    ]
    first, *named = done.stderr.splitlines()
    assert first.startswith("error: 2 of 6 shards")
    assert ["1.tar" in named[0], "5.tar" in named[1], len(named)] == [True, True, 2]
    assert "4.tar: 1 samples, skipped 2 members of no sample, as 'README'" in done.stdout
    assert "\n10 samples\n" in done.stdout
