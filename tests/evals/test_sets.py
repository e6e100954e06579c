"""Which samples are used, which answers count, and the pixel floor, each in plain code."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.evals.rank_cases import setting
from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.data.index import write_index
from trainer.errors import ConfigError, DataError
from trainer.evals import evaluate_all
from trainer.evals.features import Share, embed_images
from trainer.evals.floors import pixel_floor
from trainer.evals.labels import answers, class_ids, class_names, with_class
from trainer.evals.retrieval import chances, recalls
from trainer.evals.samples import BLOCK, Record, own_positions, select
from trainer.evals.zero_shot import prompts

SOLO = Comm.solo()


def share_of(*values: dict[str, Any]) -> Share:
    records = [Record(i, value) for i, value in enumerate(values)]
    return Share(torch.zeros(len(records), 2), records)


def write_set(path: Path, samples: list[tuple[bytes, dict[str, Any]]]) -> str:
    """A shard of (png, json) samples."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number, (png, values) in enumerate(samples):
            fields = {"png": png, "txt": b"a name", "json": json.dumps(values).encode()}
            for suffix, data in fields.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    write_index(str(path))
    return str(path)


def png_of(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return data.getvalue()


def random_pictures(count: int, *, seed: int) -> np.ndarray:
    """16 x 16 pictures of 2 x 2 colours."""
    draw = np.random.default_rng(seed)
    squares = draw.integers(0, 256, (count, 2, 2, 3))
    return squares.repeat(8, 1).repeat(8, 2).astype(np.uint8)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    if one.min() == one.max():
        return 0.0
    return float(np.corrcoef(one.flatten(), other.flatten())[0, 1])


@pytest.mark.heavy
def test_the_pixel_floor_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    bank, tests = random_pictures(40, seed=0), random_pictures(30, seed=1)
    bank[20:] = bank[:20]  # every picture twice, under two names: the first one counts
    tests[0] = 7  # no contrast: equally far from everything
    names = [f"class {i % 6}" for i in range(40)]
    asked = [f"class {i % 7}" for i in range(30)]  # the bank has no class 6
    bank_spec = write_set(
        tmp_path / "bank.tar",
        [(png_of(p), {"concept": n}) for p, n in zip(bank, names, strict=True)],
    )
    test_spec = write_set(
        tmp_path / "test.tar",
        [(png_of(p), {"concept": n}) for p, n in zip(tests, asked, strict=True)],
    )
    _, context = setting(SOLO, bank_spec)
    options = {"limit": None, "bank_limit": None, "data": context.data, "comm": SOLO}
    floor = pixel_floor(test_spec, bank_spec, target="concept", **options)

    hits, hits5 = {}, []
    for picture, name in zip(tests, asked, strict=True):
        likeness = [correlation(picture, other) for other in bank]
        order = sorted(range(40), key=lambda row: (-likeness[row], row))[:5]
        hits.setdefault(name, []).append(names[order[0]] == name)
        hits5.append(name in [names[row] for row in order])
    assert floor["pixel_1nn"] == 100 * sum(map(sum, hits.values())) / 30
    assert floor["pixel_5nn"] == 100 * sum(hits5) / 30
    means = [100 * sum(h) / len(h) for h in hits.values()]
    assert floor["pixel_1nn_mean_per_class"] == pytest.approx(sum(means) / 7)
    assert pixel_floor(test_spec, bank_spec, target="concept", **options) is floor
    # A training set without such classes has no floor to offer.
    bare = write_set(tmp_path / "bare.tar", [(png_of(bank[0]), {})])
    assert pixel_floor(test_spec, bare, target="concept", **options) == {}


def test_one_picture_of_two_names_is_right_under_both() -> None:
    share = share_of(
        {"concept": "b", "pix": "1"},
        {"concept": "a", "pix": "1"},
        {"concept": "c", "pix": "2"},
        {"concept": "c"},
        {"concept": "d"},
    )
    names = class_names(share, "concept", SOLO)
    assert names == ["a", "b", "c", "d"]
    assert class_ids(share, "concept", names).tolist() == [1, 0, 2, 2, 3]
    found = answers(share, "concept", names, SOLO)
    assert found.tolist() == [[1, 0], [0, 1], [2, -1], [2, -1], [3, -1]]


def test_samples_without_a_class_are_left_out() -> None:
    values = [{"k": 3}, {}, {"k": None}, {"k": ""}, {"k": []}, {"k": ["x", "y"]}, {"k": {"a": 1}}]
    share = with_class(share_of(*values), "k", spec="s", comm=SOLO)
    assert class_names(share, "k", SOLO) == ["3", "x and y"]
    with pytest.raises(DataError, match="no sample of s has a class under 'colour'"):
        with_class(share, "colour", spec="s", comm=SOLO)


def test_a_collapsed_model_scores_no_better_than_chance() -> None:
    same = torch.ones(20, 4)
    concepts = [frozenset({str(i)}) for i in range(20)]
    found = recalls(same, same, concepts, concepts, cutoffs=(1, 5), comm=SOLO)
    assert found == {1: 5.0, 5: 25.0}
    assert chances(concepts, concepts, cutoffs=(1, 5)) == pytest.approx(found)


def test_a_limit_chooses_by_id_alone() -> None:
    ids = torch.randint(2**62, (500,), generator=torch.Generator().manual_seed(0))
    chosen = select(ids, 40)
    assert len(chosen) == 40
    assert torch.equal(chosen, chosen.sort()[0])
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert set(ids[shuffled][select(ids[shuffled], 40)].tolist()) == set(ids[chosen].tolist())
    assert set(select(ids, 39).tolist()) < set(chosen.tolist())
    assert select(ids, 500).tolist() == select(ids, None).tolist() == list(range(500))


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1, 5 * BLOCK - 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_blocks_cover_everything_once_and_evenly(count: int, world_size: int) -> None:
    ranks = [Comm(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    parts = [own_positions(count, comm) for comm in ranks]
    assert len({part.shape for part in parts}) == 1
    stacked = torch.cat(parts).flatten()
    assert stacked[stacked >= 0].tolist() == list(range(count))
    alone = [row.tolist() for row in own_positions(count, SOLO)]
    real = [row.tolist() for row in torch.cat(parts) if row.max() >= 0]
    assert real == alone


def test_unusable_samples_are_left_out_within_the_budget(tmp_path: Path) -> None:
    pictures = random_pictures(10, seed=2)
    samples = [(png_of(picture), {"concept": str(i % 3)}) for i, picture in enumerate(pictures)]
    samples[4] = (b"no picture", {"concept": "1"})
    spec = write_set(tmp_path / "set.tar", samples)
    model, context = setting(SOLO, spec, budget=0.1)
    share = embed_images(spec, model, context)
    expected = [str(i % 3) for i in range(10) if i != 4]
    assert [record.values["concept"] for record in share.records] == expected
    good = write_set(tmp_path / "good.tar", samples[:4] + samples[5:])
    assert torch.equal(share.features, embed_images(good, model, context).features)
    strict = context._replace(data=context.data.model_copy(update={"bad_sample_budget": 0.05}))
    with pytest.raises(DataError, match=r"1 of 10 samples.*budget of 5.00%.*0004"):
        embed_images(spec, model, strict)


def test_a_flipped_bit_is_one_sample_of_the_budget(tmp_path: Path) -> None:
    pictures = random_pictures(10, seed=2)
    samples = [(png_of(picture), {"concept": f"nr {i}"}) for i, picture in enumerate(pictures)]
    spec = write_set(tmp_path / "set.tar", samples)
    data = Path(spec).read_bytes()
    Path(spec).write_bytes(data.replace(b"nr 7", b"Nr 7"))
    model, context = setting(SOLO, spec, budget=0.1)
    share = embed_images(spec, model, context)
    expected = [f"nr {i}" for i in range(10) if i != 7]
    assert [record.values["concept"] for record in share.records] == expected
    strict = context._replace(data=context.data.model_copy(update={"bad_sample_budget": 0.05}))
    with pytest.raises(DataError, match=r"1 of 10 samples.*budget of 5.00%.*crc32"):
        embed_images(spec, model, strict)


def test_usual_mistakes_are_one_sentence(tmp_path: Path) -> None:
    spec = write_set(
        tmp_path / "set.tar", [(png_of(random_pictures(1, seed=0)[0]), {"concept": 1})]
    )
    model, context = setting(SOLO, spec)
    with pytest.raises(ValidationError, match="needs `train`"):
        EvalConfig(name="knn", label="k", data=spec)
    with pytest.raises(ValidationError, match="same shards"):
        EvalConfig(name="linear_probe", label="p", data=spec, train=spec)
    one = EvalConfig(name="retrieval", label="r", data=spec)
    with pytest.raises(ConfigError, match="several evaluations are labelled r"):
        evaluate_all([one, one], model, context)
    with pytest.raises(ConfigError, match=r"no \{\} for the class name"):
        prompts(["a"], ["{}", "a picture"])
    assert prompts(["a", "{b}"], ["{}", "one {}"]) == ["a", "one a", "{b}", "one {b}"]
