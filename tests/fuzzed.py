"""What reads bytes that others wrote, each with a good example, and a way to sign what was forged.

A target may return, or raise a TrainerError or BadSample of one line; anything else is a crash.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.data.tars import make_samples, write_tar
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import DataConfig, parse_run
from trainer.data import catalogue, index
from trainer.data.captions import choose_caption, field_texts
from trainer.data.decode import BadSample, decode_image
from trainer.data.expanded import expanded
from trainer.data.labels import ClusterLabels
from trainer.data.tar import read_tar, scan_tar
from trainer.errors import TrainerError
from trainer.log.records import read_lines
from trainer.running.spikes import read_left_out
from trainer.store.header import read_header
from trainer.store.shard_file import read_shard_header

CAPTIONS = DataConfig(train="x.tar", captions={"fields": ["a.b", "name"]}).captions
RUN = """
workdir: w
steps: 8
global_batch: 12
recipe: {name: clip, model: {image_size: 32, patch_size: 16, text_length: 8, vocabulary: 300,
  embed_dim: 16, image: {width: 32, layers: 1, heads: 2}, text: {width: 32, layers: 1, heads: 2}}}
data: {train: "a{0..3}.tar"}
evals: [{name: zero_shot, label: names, data: a.tar, target: name}]
"""


class Target(NamedTuple):
    example: bytes
    read: Callable[[bytes], Any]
    signed: Callable[[bytes], bytes] = lambda data: data
    """Makes the sums of forged bytes right again."""


def crash_of(target: Target, data: bytes) -> Exception | None:
    """What is no sentence."""
    try:
        target.read(data)
    except (TrainerError, BadSample) as error:
        return error if "\n" in str(error).strip() or len(str(error)) > 5000 else None
    except Exception as error:
        return error
    return None


def in_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    def reads(data: bytes) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            return read(Path(folder))

    return reads


def _made(write: Callable[[Path], Path]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder)).read_bytes()


def _tar(folder: Path) -> Path:
    return Path(write_tar(folder / "a.tar", make_samples(3), format=tarfile.PAX_FORMAT))


def _long_names(folder: Path) -> Path:
    samples = {f"{'d' * 120}/k{n}": {"txt": b"a"} for n in range(2)}
    kinds = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
    parts = [Path(write_tar(folder / f"{k}.tar", samples, format=k)).read_bytes() for k in kinds]
    (folder / "both.tar").write_bytes(parts[0][:3072] + parts[1])
    return folder / "both.tar"


def _index(folder: Path) -> Path:
    index.write_index(str(_tar(folder)))
    return folder / "a.tar.index"


def _catalogue(folder: Path) -> Path:
    data = _index(folder).read_bytes()
    entry = catalogue.Entry(str(folder / "a.tar"), "s", data, "d", np.arange(3))
    catalogue.write_catalogue(str(folder / "a.catalogue"), [entry])
    return folder / "a.catalogue"


def _sign_tar(data: bytes) -> bytes:
    """The first header's sum is right again."""
    block = bytearray(data[:512].ljust(512, b"\0"))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data[512:]


def _sign_index(data: bytes) -> bytes:
    size = index._HEADER.size
    head, payload = data[: size - 16].ljust(size - 16, b"\0"), data[index.HEADER_BYTES :]
    head += blake2b(payload, digest_size=16).digest()
    return head + struct.pack("<I", zlib.crc32(head)) + payload


def _sign_catalogue(data: bytes) -> bytes:
    size = catalogue._HEADER.size
    if len(data) < size + 4:
        return data
    _, _, start, count, *_ = catalogue._HEADER.unpack(data[:size])
    table = data[start : start + count] if start < len(data) else b""
    head = data[: size - 16] + blake2b(table, digest_size=16).digest()
    return head + struct.pack("<I", zlib.crc32(head)) + data[size + 4 :]


def _read_catalogue(folder: Path) -> None:
    found = catalogue.open_catalogue(str(folder / "a.catalogue"))
    found.ids()
    for row in range(len(found.table.shards)):
        index.read_index("a.tar", found.index_bytes(row))


def _manifest(folder: Path) -> None:
    Checkpointer(folder, Comm.solo()).latest(warn=lambda line: None)


def _with_sum(data: bytes) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        place = folder / "step-00000001"
        line = f"{hashlib.sha256(data).hexdigest()}  manifest.json\n"
        (place / "manifest.sha256").write_text(line)
        (place / "state.json").write_text("{}")
        _manifest(folder)

    return read


def _labels(folder: Path) -> None:
    np.save(folder / "ids.npy", np.arange(4))
    ClusterLabels.open(folder)


def _pictures(kind: str) -> bytes:
    buffer = io.BytesIO()
    gradient = Image.linear_gradient("L").resize((24, 24))
    gradient.convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def _seen(data: bytes) -> None:
    decode_image(data, size=8, background=(0, 0, 0), max_pixels=10**6)


def _caption(data: bytes) -> None:
    field_texts({"json": data}, "name")
    choose_caption({"json": data}, sample_id=1, epoch=0, seed=0, config=CAPTIONS)


def _array(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _tars(data: bytes) -> None:
    list(scan_tar(io.BytesIO(data), shard="a.tar", max_member_bytes=2**20))
    list(read_tar(expanded(io.BytesIO(data)), shard="a.tar", max_member_bytes=2**20))


MANIFEST = json.dumps(
    {
        "format": "protoscale-checkpoint-1",
        "step": 1,
        "world_size": 1,
        "files": [{"name": "state.json", "size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}],
    }
).encode()
IDENTITY = dict.fromkeys(("teacher", "model", "tokenizer", "reads", "pooling"), "a") | {"dim": 3}
STORE = json.dumps({"format": "protoscale-embeddings-2", "identity": IDENTITY, "shards": {}})

TARGETS = {
    "a run file": Target(RUN.encode(), lambda data: parse_run(data.decode(errors="replace"))),
    "a tar": Target(_made(_tar), _tars, _sign_tar),
    "a tar of long names": Target(_made(_long_names), _tars, _sign_tar),
    "an index": Target(_made(_index), lambda data: index.read_index("a.tar", data), _sign_index),
    "a catalogue": Target(
        _made(_catalogue), in_file("a.catalogue", _read_catalogue), _sign_catalogue
    ),
    "a manifest": Target(
        MANIFEST,
        lambda data: in_file("step-00000001/manifest.json", _with_sum(data))(data),
    ),
    "a caption": Target(b'{"name": ["a", "b \\u00e9"], "a": {"b": "c"}, "x": 1e5}', _caption),
    "labels": Target(_array(np.arange(4)), in_file("labels.npy", _labels)),
    "a store": Target(STORE.encode(), in_file("h.json", lambda f: read_header(f / "h.json"))),
    "a part of a store": Target(b"", in_file("a.bin", lambda f: read_shard_header(f / "a.bin"))),
    "metrics": Target(
        b'{"step": 1, "samples": 2}\n', in_file("m.jsonl", lambda f: read_lines(f / "m.jsonl"))
    ),
    "what is left out": Target(
        b'[[4, 72, "why"]]', in_file("left_out.json", lambda f: read_left_out(f, Comm.solo()))
    ),
    "a PNG": Target(_pictures("PNG"), _seen),
    "a JPEG": Target(_pictures("JPEG"), _seen),
    "a WebP": Target(_pictures("WEBP"), _seen),
}
