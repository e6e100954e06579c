"""Small shards of real pictures, and towers that look at them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.data.tars import write_tar
from tests.models.small import LENGTH, WORDS, small_config, word_tokenizer
from trainer.comm import Comm
from trainer.concepts import Bank
from trainer.curation.languages import Languages
from trainer.curation.pair import Pair
from trainer.curation.scan import Questions
from trainer.data.index import write_index
from trainer.data.pixels import Pixels
from trainer.models.two_tower import build_two_tower

SIZES = (7, 5, 9)
BAD = {(0, 2): "no image", (1, 3): "damaged", (2, 4): "no caption"}
"""What is wrong with which sample of which shard."""


def picture(number: int, *, side: int = 48, shift: int = 0) -> bytes:
    """Blobs that no other number has; `shift` brightens the whole."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 200, (6, 6, 3), np.uint8)).resize((side, side + 8))
    values = np.asarray(coarse).astype(int) + shift
    file = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_corpus(folder: Path) -> str:
    """Three shards with three bad samples; pictures 0 and 20 are nearly equal."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(SIZES):
        samples = {}
        for row in range(size):
            data = picture(0, shift=3) if number == 20 else picture(number)
            words = f"{WORDS[number % 5]} and {WORDS[number % 7 + 10]}"
            fields = {"png": data, "txt": words.encode()}
            if BAD.get((shard, row)) == "no image":
                fields["png"] = data[:60]
            if BAD.get((shard, row)) == "no caption":
                del fields["txt"]
            samples[f"{number:03d}"] = fields
            number += 1
        write_index(write_tar(folder / f"{shard:03d}.tar", samples))
    _damage(folder / "001.tar", row=3)
    return f"{folder}/{{000..{len(SIZES) - 1:03d}}}.tar"


def write_outside(path: Path, *, count: int = 20) -> str:
    """A shard of pictures that no other one has."""
    samples = {f"{n:03d}": {"png": picture(1000 + n), "json": b"{}"} for n in range(count)}
    write_index(write_tar(path, samples))
    return str(path)


def _damage(path: Path, *, row: int) -> None:
    """Flip a byte of a member's content; the index stays as it was."""
    from trainer.data.index import read_index

    index = read_index(str(path))
    data = bytearray(path.read_bytes())
    data[int(index.offset[int(index.first[row])]) + 40] ^= 255
    path.write_bytes(data)


def pair(device: torch.device | str = "cpu", *, rows: int = 4) -> Pair:
    tokenizer = word_tokenizer()
    model = build_two_tower(small_config(), tokenizer, Comm.solo(), seed=3).eval()
    return Pair(
        model,
        Pixels(32),
        tokenizer,
        name="small",
        model_hash="of seed 3",
        settings="small",
        length=LENGTH,
        dim=24,
        device=torch.device(device),
        rows=rows,
    )


def questions(*, texts: bool = True) -> Questions:
    bank = Bank.of_names(WORDS[:5])
    return Questions(pair(), Languages(wanted=False), bank, keep_texts=texts)
