"""Cuts and bit flips: what is read is what was written, or the damage is named with its numbers."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.data.tars import Samples, make_samples, write_tar
from trainer.data.index import read_index, write_index
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import DataError

CUTS, FLIPS = 600, 300
EXPECTED_AND_FOUND = re.compile(r"expect\w* .*found")


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> tuple[Path, Samples]:
    samples = make_samples(60)
    path = tmp_path_factory.mktemp("shard") / "a.tar"
    write_index(write_tar(path, samples))
    return path, samples


def read_each(path: Path) -> tuple[Samples, list[str]]:
    """What can be read, and what was said about the rest."""
    shards = ShardSet.open(str(path))
    read, problems = {}, []
    for index in range(len(shards)):
        try:
            sample = shards.read(index)
            read[sample.key] = sample.fields
        except DamagedSample as error:
            problems.append(str(error))
    shards.close()
    return read, problems


@pytest.mark.heavy
def test_every_cut_is_reported_with_both_sizes(shard):
    path, samples = shard
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(CUTS):
        length = draw.randrange(len(whole))
        path.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            read_each(path)
        message = f"expects {len(whole)} bytes ({len(samples)} samples), found {length}"
        assert message in str(caught.value)
    path.write_bytes(whole)
    assert read_each(path) == (samples, [])


def test_a_cut_while_the_shard_is_open(shard):
    path, samples = shard
    whole = path.read_bytes()
    shards = ShardSet.open(str(path))
    assert shards.read(0).fields == samples["k0000"]
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"expects {len(whole)} bytes, found {len(whole) // 2}"):
        shards.read(len(shards) - 1)
    path.write_bytes(whole)


@pytest.mark.heavy
def test_every_header_flip_is_read_right_or_reported(shard):
    path, samples = shard
    whole = path.read_bytes()
    index = read_index(str(path))
    draw = random.Random(1)
    for _ in range(FLIPS):
        member = draw.randrange(len(index.offset))
        bit = draw.randrange(8 * int(index.header_bytes[member]))
        byte = int(index.offset[member]) - int(index.header_bytes[member]) + bit // 8
        path.write_bytes(flipped(whole, byte, bit % 8))
        read, problems = read_each(path)
        assert len(read) + len(problems) == len(samples)
        assert all(samples[key] == fields for key, fields in read.items())
        assert len(problems) == 1
        assert EXPECTED_AND_FOUND.search(problems[0])
    path.write_bytes(whole)


@pytest.mark.heavy
def test_every_flip_of_content_is_reported(shard):
    path, samples = shard
    whole = path.read_bytes()
    index = read_index(str(path))
    draw = random.Random(2)
    for _ in range(FLIPS // 3):
        member = draw.choice([row for row, size in enumerate(index.size) if size])
        byte = int(index.offset[member]) + draw.randrange(int(index.size[member]))
        path.write_bytes(flipped(whole, byte, draw.randrange(8)))
        read, problems = read_each(path)
        assert len(problems) == 1
        assert EXPECTED_AND_FOUND.search(problems[0])
        assert all(samples[key] == fields for key, fields in read.items())
    path.write_bytes(whole)


@pytest.mark.heavy
def test_an_index_is_not_built_from_a_damaged_shard(shard, tmp_path):
    """Without an index a cut in the closing zeros is harmless, and so are flips of spaces."""
    whole, samples = shard[0].read_bytes(), shard[1]
    copy = tmp_path / "a.tar"
    index = read_index(str(shard[0]))
    data_end = -(-int(index.offset[-1] + index.size[-1]) // 512) * 512
    draw = random.Random(3)
    for number in range(200):
        length = draw.randrange(len(whole))
        header = int(index.offset[draw.randrange(len(index.offset))]) - 512
        damaged = whole[:length] if number % 2 else flipped(whole, header + draw.randrange(512), 5)
        copy.write_bytes(damaged)
        if problem := refusal(copy):
            assert re.search(r"found|readable|can't", problem)
        else:
            assert len(damaged) >= data_end + 512
            assert read_each(copy) == (samples, [])


def refusal(path: Path) -> str | None:
    try:
        write_index(str(path))
    except DataError as error:
        return str(error)
    return None


def flipped(data: bytes, byte: int, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[byte] ^= 1 << bit
    return bytes(damaged)
