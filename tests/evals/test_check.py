"""Mistakes of evaluations are told before the first step, on every rank, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cluster.stores import write_store
from tests.evals.test_sets import png_of, random_pictures, write_set
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.data.texts import text_id
from trainer.errors import ConfigError, TrainerError
from trainer.evals.check import check_evaluations

SOLO = Comm.solo()


@pytest.fixture
def spec(tmp_path: Path) -> str:
    """Forty samples of which one alone has the key `rare`."""
    values = [
        {"concept": i % 3, "long": f"thing {i}", "lang": {"de": "Ding", "fr": "chose"}}
        | ({"rare": "found"} if i == 33 else {})
        for i in range(40)
    ]
    pictures = random_pictures(40, seed=0)
    return write_set(tmp_path / "set.tar", list(zip(map(png_of, pictures), values, strict=True)))


def entry(**values: Any) -> EvalConfig:
    return EvalConfig.model_validate({"label": "mine", "name": "zero_shot", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "concpt"}, r"none of 40 .* a class under 'concpt' \(set target\); .*concept"),
        ({"data": "/nowhere/tset.tar"}, "evaluation mine: no shard /nowhere/tset.tar"),
        ({"train": "/nowhere/x.tar"}, "evaluation mine: no shard /nowhere/x.tar"),
        ({"text_store": "/nowhere"}, "evaluation mine: .*nowhere"),
        ({"name": "retrieval", "caption": "short"}, r"a text under 'short' \(set caption\)"),
        ({"name": "cross_lingual", "languages": ["de", "xx"]}, r"a text under 'lang.xx'"),
        ({"name": "cross_lingual", "caption": "tongue"}, r"texts by language under 'tongue'"),
    ],
)
def test_a_mistake_is_told_with_the_label_and_the_way_out(
    spec: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainerError, match=message) as caught:
        check_evaluations([entry(**({"data": spec} | values))], SOLO, dim=16)
    assert str(caught.value).startswith("evaluation mine: ")
    assert str(caught.value).count("evaluation mine") == 1


def test_what_works_is_let_through_and_every_mistake_is_named(spec: str, tmp_path: Path) -> None:
    other = tmp_path / "other.tar"
    write_set(other, [(png_of(random_pictures(1, seed=1)[0]), {"concept": 1})])
    good = [
        entry(label="a", data=spec, target="rare"),
        entry(label="b", data=spec, train=str(other), name="knn"),
        entry(label="c", data=spec, caption="long", name="retrieval"),
        entry(label="d", data=spec, languages=["de"], name="cross_lingual"),
        entry(label="e", data=spec, name="cross_lingual"),
    ]
    check_evaluations(good, SOLO, dim=16)
    wrong = [entry(label="x", data="/no.tar"), *good, entry(label="y", data="/nor.tar")]
    with pytest.raises(TrainerError, match=r"evaluation x: .*; evaluation y: ") as caught:
        check_evaluations(wrong, SOLO, dim=16)
    assert "evaluation a" not in str(caught.value)
    with pytest.raises(ConfigError, match="several evaluations are labelled a"):
        check_evaluations([good[0], good[0]], SOLO, dim=16)


def test_a_label_that_is_an_event_of_its_own_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"labelled 'episode'.*choose another"):
        check_evaluations([entry(label="episode", data=spec)], SOLO, dim=16)


def test_a_damaged_sample_is_passed_over_and_a_set_of_them_is_refused(
    spec: str, tmp_path: Path
) -> None:
    data = bytearray(Path(spec).read_bytes())
    data[data.index(b"thing 7")] ^= 1
    Path(spec).write_bytes(data)
    check_evaluations([entry(data=spec)], SOLO, dim=16)
    broken = write_set(tmp_path / "broken.tar", [(b"", ["no", "object"])])
    with pytest.raises(TrainerError, match=r"none of the samples of .* can be read"):
        check_evaluations([entry(data=broken)], SOLO, dim=16)


def test_a_store_of_other_texts_or_another_width_is_refused(spec: str, tmp_path: Path) -> None:
    """The right one holds a prompt of a class that the shards have."""
    ids = torch.tensor([text_id(f"a {number}") for number in range(3)])
    for name, dim in (("right", 16), ("wide", 20)):
        write_store(tmp_path / name, torch.eye(3, dim), ids, sizes=[3])
    right, wide = tmp_path / "right", tmp_path / "wide"
    check_evaluations([entry(data=spec, templates=["a {}"], text_store=right)], SOLO, dim=16)
    for values, message in [
        (
            {"templates": ["the {}"], "text_store": right},
            r"a class whose prompts are in .*right \(set templates",
        ),
        ({"text_store": wide}, "wide holds vectors of 20 numbers, the model gives 16"),
        (
            {"name": "retrieval", "text_store": right},
            r"a vector in .*right \(it must be made from these shards\)",
        ),
    ]:
        with pytest.raises(TrainerError, match=message):
            check_evaluations([entry(data=spec, **values)], SOLO, dim=16)


def one_rank_lacks(comm: Comm, good: str) -> str:
    """As where a node has not mounted a disk: the path is the same, the shard is not there."""
    data = good if comm.rank == 0 else "/nowhere/set.tar"
    try:
        check_evaluations([entry(data=data)], comm, dim=16)
    except TrainerError as error:
        return str(error)
    return str(float(comm.sum(torch.ones(()))))


def test_all_ranks_hear_of_what_one_of_them_lacks(spec: str) -> None:
    first, second = run_ranks(one_rank_lacks, 2, spec)
    assert first == second == "rank 1: evaluation mine: no shard /nowhere/set.tar"
