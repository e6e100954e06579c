"""The index beside a shard: where each member lies, and what its bytes must sum up to.

One file `<shard>.index`: a header (counts, the shard's size, checksums) and then columns, so
that a shard of ten thousand samples is read in a millisecond. Little-endian throughout.
"""

from __future__ import annotations

import re
import struct
import zlib
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.columnar import COLUMNAR, is_columnar, scan_columnar
from trainer.data.remote import file_size, open_for_scan, read_file, write_file
from trainer.data.tables import ENDINGS, USUAL, Columns, is_table, scan_table
from trainer.data.tar import Member, scan_tar
from trainer.errors import ConfigError, DataError
from trainer.hashing import hash_bits, hash_bits_of, key_of

MAX_MEMBER_BYTES = 64 * 2**20
MAX_SAMPLE_BYTES = 4 * MAX_MEMBER_BYTES
"""From the first to the last member of one sample: they are read at once."""
_MOST_SUFFIXES = 2**16
_MAGIC = b"SHARDIX1"
_HEADER = struct.Struct("<8sQQQQQ16s")
_CRC = struct.Struct("<I")
_MEMBER_COLUMNS = (
    ("offset", "<i8"),
    ("size", "<i8"),
    ("header_bytes", "<u4"),
    ("header_crc", "<u4"),
    ("crc", "<u4"),
    ("suffix", "<u2"),
)


def shard_stem(shard: str) -> str:
    """The file's name without folders, URL query and ending: `s3://b/00012.tar` -> `00012`."""
    name = PurePosixPath(shard.split("?")[0]).name
    ending = next((ending for ending in (".tar", *ENDINGS, *COLUMNAR) if name.endswith(ending)), "")
    return name.removesuffix(ending)


def sample_id(shard_name: str, key: str, set_name: str = "") -> int:
    """63 bits that stand for a sample wherever its shard is stored.

    A hash of the shard's name and the key, and of the set's name where it has one.
    """
    text = f"{shard_stem(shard_name)}/{key}"
    digest = blake2b(text.encode(), digest_size=8).digest()
    plain = int.from_bytes(digest, "little") >> 1
    return hash_bits_of(plain, key_of("set", set_name)) >> 1 if set_name else plain


def ids_in_set(ids: NDArray[np.int64], set_name: str) -> NDArray[np.int64]:
    """What the ids of samples without a set are where they belong to one; its name may be ''."""
    if not set_name:
        return ids
    bits = hash_bits(torch.from_numpy(ids.copy()), key_of("set", set_name)).numpy()
    return (bits.view(np.uint64) >> np.uint64(1)).astype(np.int64)


def index_path(shard: str) -> str:
    path, question, query = shard.partition("?")
    return f"{path}.index{question}{query}"


class ShardIndex(NamedTuple):
    """The members of one shard, in columns. Sample i has members first[i] to first[i + 1]."""

    shard_bytes: int
    keys: list[str]
    ids: NDArray[np.int64]
    suffixes: list[str]
    first: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    header_bytes: NDArray[np.uint32]
    header_crc: NDArray[np.uint32]
    crc: NDArray[np.uint32]
    suffix: NDArray[np.uint16]


class IndexSummary(NamedTuple):
    """What an index's header says, without its columns."""

    shard_bytes: int
    num_samples: int
    num_members: int
    keys_bytes: int
    suffixes_bytes: int
    digest: bytes


HEADER_BYTES = _HEADER.size + _CRC.size


def write_index(
    shard: str,
    *,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    skipped: list[str] | None = None,
    columns: Columns = USUAL,
) -> int:
    """Scan a tar or a table, write `<shard>.index` beside it and return the number of samples.

    Members that belong to no sample are put into `skipped`: links, and files that are not named
    key.suffix, such as README, .DS_Store and ._x. DataError where a reader could disagree about
    the samples: damaged or truncated archives, keys that are interleaved or double; and where no
    file at all is named so. `columns` say what a table's columns hold.
    """
    if is_table(shard) or is_columnar(shard):
        scanned_rows = (
            scan_columnar(shard, asked=columns)
            if is_columnar(shard)
            else scan_table(read_file(shard), path=shard, asked=columns)
        )
        rows, keys, layout = scanned_rows
        _write(shard, rows, keys, [layout] * len(rows), list(range(len(rows) + 1)))
        return len(keys)
    if columns != USUAL:
        raise ConfigError(
            f"{shard} is no table (.csv, .tsv, .parquet, .arrow); only those have columns"
        )
    skipped = [] if skipped is None else skipped
    with open_for_scan(shard) as file:
        scanned = scan_tar(file, shard=shard, max_member_bytes=max_member_bytes, skipped=skipped)
        members = [member for member in scanned if _is_named(member.name, skipped)]
    if skipped and not members:
        raise DataError(
            f"{shard}: none of its {len(skipped)} members, as {skipped[0]!r}, is a file that is "
            "named key.suffix"
        )
    keys, suffixes, first = _grouped([member.name for member in members], shard)
    if len(kinds := set(suffixes)) > _MOST_SUFFIXES:
        raise DataError(
            f"{shard}: {len(kinds)} members are named differently behind their key, over "
            f"{_MOST_SUFFIXES}; name them key.suffix"
        )
    _write(shard, members, keys, suffixes, first)
    return len(keys)


def _write(
    shard: str, members: list[Member], keys: list[str], suffixes: list[str], first: list[int]
) -> None:
    payload = _payload(members, keys, suffixes, first, shard)
    header = _HEADER.pack(
        _MAGIC,
        file_size(shard),
        len(keys),
        len(members),
        len("\0".join(keys).encode()),
        len("\0".join(sorted(set(suffixes))).encode()),
        blake2b(payload, digest_size=16).digest(),
    )
    write_file(index_path(shard), header + _CRC.pack(zlib.crc32(header)) + payload)


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name, as WebDataset splits it: at the file name's first dot."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name, re.DOTALL)
    return (match[1], match[2].lower()) if match else None


def _is_named(name: str, skipped: list[str]) -> bool:
    """Whether a member belongs to a sample; the others are remembered."""
    named = split_name(name) is not None
    skipped += [] if named else [name]
    return named


def _grouped(names: list[str], shard: str) -> tuple[list[str], list[str], list[int]]:
    """Keys in order, the suffix of every member, and each key's first member."""
    rows: dict[str, set[str]] = {}
    suffixes: list[str] = []
    first: list[int] = []
    last = None
    for row, name in enumerate(names):
        key, suffix = cast(tuple[str, str], split_name(name))
        if key != last and key in rows:
            raise DataError(
                f"{shard}: key {key!r} comes again after {last!r}; all members of a sample must "
                "follow each other (tar --sort=name writes them so)"
            )
        if suffix in rows.setdefault(key, set()):
            raise DataError(f"{shard}: key {key!r} has two members {suffix!r}")
        if key != last:
            first.append(row)
        rows[key].add(suffix)
        suffixes.append(suffix)
        last = key
    return list(rows), suffixes, [*first, len(names)]


def _payload(
    members: list[Member], keys: list[str], suffixes: list[str], first: list[int], shard: str
) -> bytes:
    names = sorted(set(suffixes))
    rank = {name: row for row, name in enumerate(names)}
    columns = {
        "suffix": [rank[name] for name in suffixes],
        **{name: [getattr(m, name) for m in members] for name, _ in _MEMBER_COLUMNS[:-1]},
    }
    ids = np.array([sample_id(shard, key) for key in keys], dtype="<i8")
    if len(set(ids.tolist())) < len(ids):
        raise DataError(f"{shard}: two of its {len(keys)} keys hash to one 63-bit id; rename one")
    parts = [ids, np.array(first, dtype="<i8")]
    parts += [np.array(columns[name], dtype=kind) for name, kind in _MEMBER_COLUMNS]
    text = "\0".join(keys).encode() + "\0".join(names).encode()
    return b"".join(part.tobytes() for part in parts) + text


def read_summary(data: bytes, *, path: str) -> IndexSummary:
    """Parse and check the first HEADER_BYTES of an index."""
    header, stored = data[: _HEADER.size], data[_HEADER.size : HEADER_BYTES]
    if len(data) < HEADER_BYTES or not header.startswith(_MAGIC):
        raise DataError(f"{path} is no shard index; build it with: python tools/index.py SHARDS")
    if _CRC.unpack(stored)[0] != zlib.crc32(header):
        raise DataError(
            f"{path} is damaged: header crc32 expected {_CRC.unpack(stored)[0]:08x}, "
            f"found {zlib.crc32(header):08x}; build it again: python tools/index.py SHARDS"
        )
    return IndexSummary(*_HEADER.unpack(header)[1:])


def read_index(shard: str, data: bytes | None = None) -> ShardIndex:
    """Read the index of a shard (or parse `data`, its bytes) and check its checksum."""
    path = index_path(shard)
    data = read_file(path) if data is None else data
    summary, payload = read_summary(data, path=path), data[HEADER_BYTES:]
    if blake2b(payload, digest_size=16).digest() != summary.digest:
        raise DataError(
            f"{path} is damaged: its {len(payload)} bytes do not match their checksum; build it "
            "again: python tools/index.py SHARDS"
        )
    return _parsed(shard, summary, payload)


def _parsed(shard: str, summary: IndexSummary, payload: bytes) -> ShardIndex:
    index = _columns_of(summary, payload)
    if index is None or _contradicts_itself(index, summary):
        raise DataError(
            f"{index_path(shard)} contradicts itself, as no index does that this program has "
            "written; build it again: python tools/index.py SHARDS"
        )
    # The id contains the shard's name: a shard that was renamed gets new ones.
    if index.keys and int(index.ids[0]) != sample_id(shard, index.keys[0]):
        ids = np.array([sample_id(shard, key) for key in index.keys], dtype=np.int64)
        return index._replace(ids=ids)
    return index


def _contradicts_itself(index: ShardIndex, summary: IndexSummary) -> bool:
    """Whether some column points where nothing is; its sums may be right all the same."""
    return (
        len(index.keys) != summary.num_samples
        or int(index.first[0]) != 0
        or int(index.first[-1]) != summary.num_members
        or bool((np.diff(index.first) <= 0).any())
        or bool((index.offset < 0).any() or (index.size < 0).any())
        or bool((index.suffix >= len(index.suffixes)).any())
    )


def _columns_of(summary: IndexSummary, payload: bytes) -> ShardIndex | None:
    """The columns as they stand there; None where their lengths are not those of the header."""
    per_sample, per_member = 16, sum(np.dtype(kind).itemsize for _, kind in _MEMBER_COLUMNS)
    texts = summary.keys_bytes + summary.suffixes_bytes
    rows = summary.num_samples * per_sample + summary.num_members * per_member
    if rows + 8 + texts != len(payload):
        return None
    columns: dict[str, NDArray[np.generic]] = {}
    start = 0
    heads = (("ids", "<i8", summary.num_samples), ("first", "<i8", summary.num_samples + 1))
    tails = ((name, kind, summary.num_members) for name, kind in _MEMBER_COLUMNS)
    for name, kind, count in (*heads, *tails):
        columns[name] = np.frombuffer(payload, dtype=kind, count=count, offset=start)
        start += columns[name].nbytes
    try:
        keys = payload[start : start + summary.keys_bytes].decode().split("\0")
        suffixes = payload[start + summary.keys_bytes :].decode().split("\0")
    except UnicodeDecodeError:
        return None
    keys = keys if summary.num_samples else []
    return ShardIndex(summary.shard_bytes, keys, suffixes=suffixes, **columns)  # type: ignore[arg-type]
