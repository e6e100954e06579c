"""Every key of a run's `data` section changes what is read, or how; none is parsed and ignored."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from tests.data.streams import open_stream, tokenizer, write_shards
from tests.data.tars import write_tar
from trainer.config import DataConfig
from trainer.data.generated import write_generated
from trainer.data.index import write_index
from trainer.data.selection import write_selection
from trainer.data.shards import ShardSet
from trainer.data.tokenize import tokenize
from trainer.errors import ConfigError, DataError

OFF = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "jitter_probability": 0.0,
    "gray_probability": 0.0,
    "blur_probability": 0.0,
}
TEXTS = ("captions.", "noise.")
"""Keys that change texts and no pictures."""
WEB = {"reader": "webdataset", "epoch_samples": 20}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reader": ({}, WEB),
    "window_shards": ({"window_shards": 1}, {"window_shards": 3}),
    "window_groups": ({"window_shards": 1}, {"window_shards": 1, "window_groups": 2}),
    "weights": ({}, {"weights": {"a": 2.5}}),
    "background": ({}, {"background": (9, 99, 200)}),
    "images": ({}, {"images": ("mask.png",)}),
    "captions.fields": ({}, {"captions": {"fields": ("alt",)}}),
    "captions.weights": (
        {"captions": {"fields": ("txt", "alt"), "weights": (1, 0)}},
        {"captions": {"fields": ("txt", "alt"), "weights": (0, 1)}},
    ),
    "captions.combine": (
        {"captions": {"fields": ("txt", "alt"), "weights": (1, 0)}},
        {"captions": {"fields": ("txt", "alt"), "combine": "concat"}},
    ),
    "noise.share": ({}, {"noise": {"share": 1.0}}),
    "noise.group_shards": (
        {"noise": {"share": 1.0, "group_shards": 1}},
        {"noise": {"share": 1.0, "group_shards": 3}},
    ),
    "noise.seed": ({"noise": {"share": 0.5}}, {"noise": {"share": 0.5, "seed": 1}}),
    "augment.crop_scale": ({}, {"augment": OFF | {"crop_scale": (0.2, 0.3)}}),
    "augment.crop_ratio": ({}, {"augment": OFF | {"crop_ratio": (2.0, 2.0)}}),
    "augment.flip": ({}, {"augment": OFF | {"flip": 1.0}}),
    "augment.jitter_probability": ({}, {"augment": OFF | {"jitter_probability": 1.0}}),
    "augment.jitter": (
        {"augment": OFF | {"jitter_probability": 1.0}},
        {"augment": OFF | {"jitter_probability": 1.0, "jitter": (0.1, 0.1, 0.1, 0.1)}},
    ),
    "augment.gray_probability": ({}, {"augment": OFF | {"gray_probability": 1.0}}),
    "augment.solarize_probability": ({}, {"augment": OFF | {"solarize_probability": 1.0}}),
    "augment.blur_probability": (
        {},
        {"augment": OFF | {"blur_probability": 1.0, "blur_sigma": (60.0, 60.0)}},
    ),
    "augment.blur_sigma": (
        {"augment": OFF | {"blur_probability": 1.0, "blur_sigma": (30.0, 30.0)}},
        {"augment": OFF | {"blur_probability": 1.0, "blur_sigma": (90.0, 90.0)}},
    ),
}


def picture(number: int, side: int = 24) -> bytes:
    """Red and clear, with structure."""
    image = Image.linear_gradient("L").resize((side, side)).rotate(37 * number)
    whole = Image.merge("RGBA", (image, image.rotate(90), Image.new("L", image.size, 9), image))
    file = io.BytesIO()
    whole.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty samples in five shards, one of them with a large picture."""
    folder = tmp_path_factory.mktemp("every")
    for shard in range(5):
        samples = {
            f"{shard}{n}": {
                "png": picture(shard * 4 + n, 60 if shard == n == 0 else 24),
                "mask.png": picture(n + 50),
                "txt": f"sample {shard} {n}".encode(),
                "json": json.dumps({"alt": f"other words {n}"}).encode(),
            }
            for n in range(4)
        }
        write_index(write_tar(folder / f"{shard}.tar", samples))
    return f"a={folder}/{{0..2}}.tar::b={folder}/{{3..4}}.tar"


def opened(spec: str, **config: Any) -> Any:
    return open_stream(spec, global_batch=20, **{"augment": OFF, **config})


def keys_of(section: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, f"{before}{name}.")
        else:
            yield before + name


def test_every_key_has_a_proof() -> None:
    assert set(keys_of(DataConfig)) == CHANGES.keys() | PROOFS.keys()


@pytest.mark.heavy
@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_the_batches(spec: str, key: str) -> None:
    before, after = ({"augment": OFF, **config} for config in CHANGES[key])
    batches = []
    for config in (before, after, after):
        stream = opened(spec, **config)
        (batch,) = stream.take()
        stream.close()
        batches.append((batch.images, batch.tokens, batch.sample_id))
    first, second, again = batches
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
    differs = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    expected = (
        [True, True, True]
        if key in ("reader", "window_shards", "window_groups", "weights")
        else [not key.startswith(TEXTS), key.startswith(TEXTS), False]
    )
    assert differs == expected


@pytest.mark.heavy
@pytest.mark.parametrize(
    "key",
    [
        *("train", "allow_pipe", "epoch_samples", "workers", "cache_mib", "shard_cache"),
        *("max_pixels", "bad_sample_budget", "select", "captions.generated"),
    ],
)
def test_a_key_changes_how_it_is_read_or_what_is_refused(
    spec: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PROOFS[key](spec, tmp_path, monkeypatch)


def train(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_shards(tmp_path, [20])
    ids = [set(opened(each).take()[0].sample_id.tolist()) for each in (spec, other)]
    assert not ids[0] & ids[1]


def allow_pipe(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"pipe:cat {spec.split('::')[0].removeprefix('a=').replace('{0..2}', '0')}"
    with pytest.raises(ConfigError, match="allow_pipe"):
        opened(command, **WEB)
    opened(command, **WEB, allow_pipe=True).take()


def epoch_samples(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(spec, reader="webdataset", epoch_samples=7).epoch_size == 7
    with pytest.raises(ValueError, match="epoch_samples is not read where reader is indexed"):
        opened(spec, epoch_samples=7)


def workers(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = opened(spec, workers=1)
    before = len(multiprocessing.active_children())
    stream.take()
    assert len(multiprocessing.active_children()) == before + 1
    stream.close()


def cache_mib(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, really = [0], Image.open

    def counting(*arguments: Any, **options: Any) -> Image.Image:
        count[0] += 1
        return really(*arguments, **options)

    monkeypatch.setattr(Image, "open", counting)
    for mebibytes, expected in ((0, 40), (1, 20)):
        count[0] = 0
        stream = opened(spec, cache_mib=mebibytes)
        stream.take()
        stream.take()
        assert count[0] == expected


def max_pixels(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, rejected in ((3600, 0), (3599, 1)):
        stream = opened(spec, max_pixels=most)
        stream.take()
        assert stream.ledger.num_rejected == rejected


def bad_sample_budget(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for budget, fails in ((0.5, False), (0.04, True)):  # one of twenty is too large
        stream = opened(spec, max_pixels=3599, bad_sample_budget=budget)
        for _ in range(4):
            stream.take()
        if fails:
            with pytest.raises(DataError, match="bad_sample_budget"):
                stream.take()
        else:
            stream.take()


def select(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet.open(spec)
    shares = {name: np.array([1.0, 0.0, 0.0, 1.0]) for name in shards.names}
    write_selection(tmp_path / "selection", shards, shares, {})
    stream = opened(spec, select=tmp_path / "selection")
    assert stream.epoch_size == 10
    with pytest.raises(ValueError, match="select is not read where reader is webdataset"):
        opened(spec, select=tmp_path / "selection", **WEB)


def generated(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ShardSet.open(spec).ids.tolist()
    write_generated(tmp_path, {i: f"sample {n}" for n, i in enumerate(ids)}, {}, {})
    fields = {"fields": ("generated",), "generated": tmp_path}
    tokens = {
        i: row.tolist()
        for batch in opened(spec, captions=fields).take()
        for i, row in zip(batch.sample_id.tolist(), batch.tokens, strict=True)
    }
    words = [f"sample {ids.index(i)}" for i in tokens]
    expected, _ = tokenize(tokenizer(), words, length=8)
    assert list(tokens.values()) == expected.tolist()
    with pytest.raises(ValueError, match="go together"):
        opened(spec, captions={"generated": tmp_path})


def shard_cache(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/data/test_shard_cache.py` has what it promises."""
    folder = tmp_path / "cache"
    far = f"{spec.split('::')[0].replace('a=', 'file://')}"
    cached = opened(far, shard_cache={"folder": folder, "gib": 1})
    (batch,) = cached.take()
    assert torch.equal(batch.images, opened(far).take()[0].images)
    assert len(list(folder.glob("*.tar"))) == 3


PROOFS: dict[str, Callable[[str, Path, pytest.MonkeyPatch], None]] = {
    "train": train,
    "allow_pipe": allow_pipe,
    "epoch_samples": epoch_samples,
    "workers": workers,
    "cache_mib": cache_mib,
    "shard_cache": shard_cache,
    "max_pixels": max_pixels,
    "bad_sample_budget": bad_sample_budget,
    "select": select,
    "captions.generated": generated,
}
