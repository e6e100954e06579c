"""The tokenizer of a run: given, or trained on its captions once and kept with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm, agreed
from trainer.config import DataConfig
from trainer.data.captions import choose_caption
from trainer.data.decode import BadSample
from trainer.data.generated import GeneratedCaptions
from trainer.data.shards import DamagedSample, RawSample, ShardSet
from trainer.data.tokenize import load_tokenizer, save_tokenizer, train_tokenizer
from trainer.errors import DataError
from trainer.hashing import key_of, permutation
from trainer.long_work import counted

MOST_CAPTIONS = 200_000
_TIMES = 4


def tokenizer_for(
    path: str | None,
    data: DataConfig,
    comm: Comm,
    *,
    folder: Path,
    vocabulary: int,
    length: int,
    seed: int,
) -> PreTrainedTokenizerFast:
    """Load `path`; where that is None, train on the corpus and keep the result in `folder`.

    Rank 0 trains, on at most 200,000 captions drawn by hash; a later start finds the same one.
    """
    if path is not None:
        return load_tokenizer(path)

    def train_and_keep() -> None:
        found = captions_of(data, seed=seed, most=MOST_CAPTIONS)
        captions = counted(found, "reading for a tokenizer", total=None, unit="captions")
        keep_tokenizer(train_tokenizer(captions, vocab_size=vocabulary, length=length), folder)

    lacking = comm.is_main and not (folder / "tokenizer.json").exists()
    agreed(comm, train_and_keep if lacking else lambda: None)
    return load_tokenizer(str(folder))


def keep_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it beside `folder` and rename: half a tokenizer would be taken for one."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_tokenizer(tokenizer, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except Exception as error:  # a plain Exception is what tokenizers says of a full disk
        raise DataError(f"can't keep the tokenizer in {folder}: {error}") from error


def captions_of(data: DataConfig, *, seed: int, most: int) -> Iterator[str]:
    """One caption of each sample that has one, `most` samples at most.

    Without an index these are the first ones of shards in an order drawn by the seed.
    """
    read = _streamed if data.reader == "webdataset" else _indexed
    count = captions = 0
    folder = data.captions.generated
    generated = None if folder is None else GeneratedCaptions(folder)
    for sample in read(data, seed=seed, most=most):
        count += 1
        with suppress(BadSample):
            yield choose_caption(
                sample.fields
                if generated is None
                else generated.added(sample.fields, sample.sample_id),
                sample_id=sample.sample_id,
                epoch=0,
                seed=seed,
                config=data.captions,
            )
            captions += 1
    if not count:
        raise DataError(f"{data.train} holds no sample; there is nothing to learn words from")
    if not captions:
        raise DataError(
            f"none of {count} samples has a caption in {', '.join(data.captions.fields)}; the last "
            f"has the members {', '.join(sorted(sample.fields))}; set data.captions.fields to one "
            "of them, or to a key of its json"
        )


def _streamed(data: DataConfig, *, seed: int, most: int) -> Iterator[RawSample]:
    from trainer.data.web_reader import read_once  # webdataset is imported where it is wanted

    return islice(read_once(data, seed=seed), most)


def _drawn(shards: ShardSet, most: int, key: int) -> Int64[Tensor, " drawn"]:
    """Ascending samples, `most` at most, out of as few shards as hold four times as many.

    A permutation of all samples would cost memory for each, and a look at the index of each shard.
    """
    order = permutation(len(shards.shards), key_of(key, "shards"))
    sizes = torch.tensor(shards.sizes)
    enough = int((sizes[order].cumsum(0) < _TIMES * most).sum()) + 1
    starts = sizes.cumsum(0) - sizes
    some = [starts[row] + torch.arange(shards.sizes[row]) for row in order[:enough].tolist()]
    samples = torch.cat([torch.empty(0, dtype=torch.int64), *some])
    return samples[permutation(len(samples), key)[:most]].sort().values


def _indexed(data: DataConfig, *, seed: int, most: int) -> Iterator[RawSample]:
    shards = ShardSet.open(data.train)
    for index in _drawn(shards, most, key_of(seed, "vocabulary")).tolist():
        with suppress(DamagedSample):
            yield shards.read(index)
