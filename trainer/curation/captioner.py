"""Captions that a model writes of images: any that transformers loads as image to text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from trainer.comm import Comm, agreed
from trainer.data.decode import BadSample
from trainer.data.fields import find_image
from trainer.data.generated import write_parts
from trainer.data.pixels import folder_pixels
from trainer.data.selection import read_shares
from trainer.data.shards import DamagedSample, ShardSet
from trainer.data.tokenize import load_tokenizer
from trainer.errors import ConfigError, DataError
from trainer.long_work import LongWork
from trainer.models.folder import first_line
from trainer.store.header import write_whole
from trainer.teachers.spec import weights_hash

PARTS = "parts"
_MAX_PIXELS = 25_000_000
_CHUNK = 64


class Captioner(Protocol):
    """Writes a text of every image, each by itself."""

    @property
    def about(self) -> dict[str, object]:
        """Everything that decides what it writes."""
        ...

    def read(self, data: bytes) -> Tensor:
        """The bytes of an image file as the model takes them; BadSample where they are none."""
        ...

    def write(self, images: Sequence[Tensor]) -> list[str]: ...


class FolderCaptioner:
    """A model in a folder, written greedily or by beams: the same text whenever it is asked."""

    def __init__(
        self, folder: Path, device: torch.device, *, most_tokens: int, beams: int, rows: int
    ) -> None:
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{folder} holds no model that turns images into text: {first_line(error)}"
            ) from None
        pixels = folder_pixels(folder, unsaid=None)
        if pixels is None:
            raise ConfigError(
                f"{folder} lacks a preprocessor_config.json; save the model's image processor there"
            )
        self.model, self.pixels = model.to(device).eval().requires_grad_(False), pixels
        self.tokenizer, self.device = load_tokenizer(str(folder)), device
        self.most_tokens, self.beams, self.rows = most_tokens, beams, rows
        self._hash, self._name = weights_hash(folder), folder.name

    @property
    def about(self) -> dict[str, object]:
        return {
            "model": self._name,
            "weights": self._hash,
            "pixels": self.pixels.text,
            "most_tokens": self.most_tokens,
            "beams": self.beams,
        }

    def read(self, data: bytes) -> Tensor:
        return self.pixels.decode(data, max_pixels=_MAX_PIXELS)

    @torch.inference_mode()
    def write(self, images: Sequence[Tensor]) -> list[str]:
        texts: list[str] = []
        for first in range(0, len(images), self.rows):
            block = torch.stack(list(images[first : first + self.rows])).to(self.device)
            ids = self.model.generate(
                pixel_values=self._normalized(block),
                max_new_tokens=self.most_tokens,
                num_beams=self.beams,
                do_sample=False,
            )
            found = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts += [" ".join(text.split()) for text in found]
        return texts

    def _normalized(self, images: Tensor) -> Tensor:
        kind = next(self.model.parameters()).dtype
        return self.pixels.normalized(images).to(kind)


def write_captions(
    spec: str,
    out: Path,
    captioner: Captioner,
    comm: Comm,
    *,
    select: Path | None = None,
    images: Sequence[str] = ("png", "jpg", "jpeg", "webp"),
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Captions of all samples, or of those that a selection may hold; how many there are.

    A file a shard, then one map by sample id. A call that was killed goes on with the next shard,
    to the same bytes. A sample whose image can't be read has none.
    """
    shards = ShardSet.open(spec)
    chosen = "" if select is None else hashlib.sha256(_header(select)).hexdigest()
    about = {**captioner.about, "select": chosen, "images": list(images)}
    stamp = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    parts = out / PARTS
    agreed(comm, lambda: parts.mkdir(parents=True, exist_ok=True))
    own = range(comm.rank, len(shards.shards), comm.world_size)

    def work() -> None:
        total = sum(shards.sizes[row] for row in own)
        with LongWork("captioning", total=total, unit="samples") as progress:
            for row in own:
                path = parts / f"{shards.names[row]}.json"
                source = f"{shards.digests[row]} {stamp}"
                if not _is_done(path, source):
                    found = _of_shard(shards, row, captioner, select, images)
                    text = json.dumps({"source": source, "captions": found}, ensure_ascii=False)
                    write_whole(path, text.encode())
                progress.done(shards.sizes[row])

    agreed(comm, work)
    count = [0]

    def merge() -> None:
        files = [parts / f"{name}.json" for name in shards.names]
        digests = dict(zip(shards.names, shards.digests, strict=True))
        count[0] = write_parts(out, [partial(_read_part, path) for path in files], about, digests)

    agreed(comm, merge if comm.is_main else lambda: None)
    say(f"{count[0]} captions of {len(shards)} samples are in {out}")
    return int(comm.broadcast_json(count[0]))


def _of_shard(
    shards: ShardSet,
    row: int,
    captioner: Captioner,
    select: Path | None,
    images: Sequence[str],
) -> dict[str, str]:
    found: dict[str, str] = {}
    shares = None if select is None else read_shares(select, shards.names[row])
    wanted = [n for n in range(shards.sizes[row]) if shares is None or shares[n] > 0]
    for ids, pictures in read_pictures(shards, row, wanted, captioner.read, images):
        texts = captioner.write(pictures)
        found |= {str(i): text for i, text in zip(ids, texts, strict=True)}
    return found


def read_pictures(
    shards: ShardSet,
    row: int,
    wanted: Sequence[int],
    read: Callable[[bytes], Tensor],
    images: Sequence[str],
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Ids and images of a shard's samples, some dozens at a time, without the unreadable."""
    first = sum(shards.sizes[:row])
    for begin in range(0, len(wanted), _CHUNK):
        ids, pictures = [], []
        for number in wanted[begin : begin + _CHUNK]:
            try:
                sample = shards.read(first + number)
                pictures.append(read(find_image(sample.fields, images)))
            except (BadSample, DamagedSample):
                continue
            ids.append(sample.sample_id)
        if pictures:
            yield ids, pictures


def _read_part(path: Path) -> dict[int, str]:
    """Captions of one shard, by sample id."""
    found = json.loads(path.read_text(encoding="utf-8"))["captions"]
    return {int(key): text for key, text in found.items()}


def _is_done(path: Path, source: str) -> bool:
    if not path.exists():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["source"] != source:
        raise DataError(
            f"{path} was written by another model, or of another shard or selection; give another "
            "folder, or delete it"
        )
    return True


def _header(select: Path) -> bytes:
    path = select / "selection.json"
    if not path.exists():
        raise DataError(f"{select} holds no selection; make one with tools/reduce.py")
    return path.read_bytes()
