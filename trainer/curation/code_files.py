"""Codes of images beside their shards, and the bags that are clustered.

FOLDER/<shard>.safetensors    `ids` int64 [n], `codes` int32 [n, patches] of the images of a shard;
                              its metadata is one entry, `about`: JSON with the shard's digest as
                              `source`, and `num_codes`

Any program may write such files; more is not asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from trainer.comm import Comm, agreed
from trainer.curation.captioner import read_pictures
from trainer.curation.code_captioner import CodebookCaptioner
from trainer.curation.codes import bag_of_codes
from trainer.data.decode import BadSample
from trainer.data.shards import RawSample, ShardSet
from trainer.errors import DataError
from trainer.long_work import LongWork
from trainer.store import Identity
from trainer.store.header import write_whole

SUFFIX = ".safetensors"


def write_codes(
    spec: str,
    out: Path,
    captioner: CodebookCaptioner,
    comm: Comm,
    *,
    images: Sequence[str] = ("png", "jpg", "jpeg", "webp"),
) -> None:
    """A file a shard. A call that was killed goes on with the next shard, to the same bytes; an
    image that can't be read has no codes."""
    shards = ShardSet.open(spec)
    agreed(comm, lambda: out.mkdir(parents=True, exist_ok=True))
    own = range(comm.rank, len(shards.shards), comm.world_size)
    about = {**captioner.about_codes, "images": list(images)}
    stamp = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def work() -> None:
        total = sum(shards.sizes[row] for row in own)
        with LongWork("coding", total=total, unit="samples") as progress:
            for row in own:
                path = out / f"{shards.names[row]}{SUFFIX}"
                if not _is_done(path, shards.digests[row], stamp):
                    data = _of_shard(shards, row, captioner, images, stamp)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(path, data)
                progress.done(shards.sizes[row])

    agreed(comm, work)


def _of_shard(
    shards: ShardSet, row: int, captioner: CodebookCaptioner, images: Sequence[str], stamp: str
) -> bytes:
    ids, codes = [], []
    wanted = range(shards.sizes[row])
    for some, pictures in read_pictures(shards, row, wanted, captioner.read, images):
        ids += some
        codes.append(captioner.codes(pictures).to(torch.int32).numpy())
    arrays = {
        "ids": np.array(ids, np.int64),
        "codes": np.concatenate(codes) if codes else np.empty((0, 0), np.int32),
    }
    about = {
        "source": shards.digests[row],
        "num_codes": captioner.num_codes,
        "asked": stamp,
    }
    # One entry: safetensors writes several in an order that differs from process to process.
    return bytes(save(arrays, metadata={"about": json.dumps(about, sort_keys=True)}))


class CodeFiles:
    """The codes of a folder as a teacher: the vector of an image is its bag of codes."""

    chunk: int | None = 1024

    def __init__(self, folder: Path, shards: ShardSet) -> None:
        self.folder = folder
        paths = [folder / f"{name}{SUFFIX}" for name in shards.names]
        self._of_shard = dict(zip(shards.shards, paths, strict=True))
        self._open: tuple[str, dict[int, Tensor]] = ("", {})
        heads = [_metadata(*each) for each in zip(paths, shards.digests, strict=True)]
        counts = {int(head["num_codes"]) for head in heads}
        askers = {head.get("asked", "") for head in heads}
        if len(counts) != 1 or len(askers) != 1:
            raise DataError(f"the files in {folder} are of several codebooks; write them anew")
        self.num_codes, self._asked = counts.pop(), askers.pop()

    @property
    def identity(self) -> Identity:
        return Identity(
            teacher="codes",
            model=self._asked or "not recorded",
            tokenizer=f"{self.num_codes} codes",
            reads="image",
            pooling="bag of codes, unit norm",
            mask="none",
            dim=self.num_codes,
        )

    def read(self, sample: RawSample) -> Int64[Tensor, " patches"]:
        shard = sample.shard
        if self._open[0] != shard:
            self._open = (shard, _codes(self._of_shard[shard]))
        if sample.sample_id not in self._open[1]:
            raise BadSample(f"no codes in {self._of_shard[shard]}")
        return self._open[1][sample.sample_id]

    def encode(self, items: Sequence[Tensor]) -> Float32[Tensor, "items 1 codes"]:
        codes = torch.stack(list(items))
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise DataError(f"{self.folder} has codes outside 0 to {self.num_codes - 1}")
        return bag_of_codes(codes, self.num_codes)[:, None]

    def stand_by(self) -> None:
        """No rank needs another."""


def _codes(path: Path) -> dict[int, Tensor]:
    with safe_open(path, framework="pt") as file:
        ids, codes = file.get_tensor("ids"), file.get_tensor("codes").long()
    return dict(zip(ids.tolist(), codes, strict=True))


def _metadata(path: Path, source: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    except FileNotFoundError:
        raise DataError(f"no codes at {path}; write them with tools/caption.py --codes") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is no file of codes ({error}); delete it") from None
    if not {"source", "num_codes"} <= found.keys():
        raise DataError(f"{path} lacks `source` or `num_codes` in its metadata `about`")
    if found["source"] != source:
        raise DataError(f"{path} is of a shard that has changed since; write its codes anew")
    return found


def _is_done(path: Path, source: str, stamp: str) -> bool:
    if not path.exists():
        return False
    if _metadata(path, source).get("asked") != stamp:
        raise DataError(f"{path} has the codes of another model; give another folder, or delete it")
    return True
