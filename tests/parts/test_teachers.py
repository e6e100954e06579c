"""External teachers: what is clustered, what is kept, and what an episode makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.fixtures.vectors import write_vectors
from tests.ranks import run_ranks
from tests.recipes.test_protoclip import built, config_in, encoder
from trainer.cluster.translate import group_means
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.parts.episode import Term
from trainer.parts.teacher import TeacherConfig, Teachers, load_teachers
from trainer.parts.teacher_digests import TeacherDigests
from trainer.parts.teacher_points import teacher_points
from trainer.store import EmbeddingStore
from trainer.types import Batch, Features, Progress

VECTORS, DIM = 3, 6


def store_in(folder: Path, seed: int = 0) -> tuple[RunConfig, EmbeddingStore]:
    config = config_in(folder)
    name = folder / f"store-{seed}"
    return config, write_vectors(name, config.data.train, vectors=VECTORS, dim=DIM, seed=seed)


def teacher(folder: Path, **changes: object) -> TeacherConfig:
    values = {"name": "t", "store": folder / "store-0", "clusters": 4}
    return TeacherConfig.model_validate(values | changes)


def everything(store: EmbeddingStore) -> tuple[Tensor, Tensor]:
    ids = torch.from_numpy(store.ids.copy())
    return ids, normalize(store.vectors(ids).double(), dim=-1)


def assert_nearest(labels: Tensor, points: Tensor, centroids: Tensor) -> None:
    """At the fixed point: every label is the nearest centroid, every centroid its points' mean."""
    distances = torch.cdist(points, centroids.double())
    own = distances.gather(1, labels[:, None])[:, 0]
    assert (own <= distances.amin(1) + 1e-6).all()
    means = torch.stack([points[labels == k].mean(0) for k in range(len(centroids))])
    torch.testing.assert_close(means, centroids.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["raw", "centred", "components"])
def test_points_are_the_mean_of_unit_vectors_in_their_frame(tmp_path: Path, kind: str) -> None:
    """By numpy: mean of the chosen vectors, length one, centred, principal components."""
    _, store = store_in(tmp_path)
    kept = 2 if kind == "components" else None
    points = teacher_points(store, [0, 2], Comm.solo(), centre=kind == "centred", pca=kept)
    _, vectors = everything(store)
    expected = normalize(vectors[:, [0, 2]].mean(1), dim=-1).numpy()
    if kind != "raw":
        expected = expected - expected.mean(0)
    found = points.rows(0, len(points)).double()
    if kind == "components":
        left, scales, _ = np.linalg.svd(expected, full_matrices=False)
        expected = (left * scales)[:, :2]
        expected *= np.sign((expected * found.numpy()).sum(0))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


@pytest.mark.heavy
def test_pooled_and_each_facet(tmp_path: Path) -> None:
    config, store = store_in(tmp_path)
    ids, vectors = everything(store)
    settings = {"centre": False, "iterations": 100}
    pooled = teacher(tmp_path, **settings)
    each = teacher(tmp_path, name="f", facets="each", vectors=[0, 2], weight=3.0, **settings)
    groups, digests = load_teachers([pooled, each], Comm.solo(), workdir=config.workdir)
    assert list(groups) == ["t", "f-0", "f-2"]
    assert [group.weight for group in groups.values()] == [1.0, 1.5, 1.5]
    assert digests["t"] != digests["f"]
    mean = normalize(vectors.mean(1), dim=-1)
    for name, points in {"t": mean, "f-0": vectors[:, 0], "f-2": vectors[:, 2]}.items():
        assert_nearest(groups[name].labels.of(ids), points, groups[name].centroids)
    assert (groups["t"].labels.of(torch.tensor([123456789])) == -1).all()


def found_by(comm: Comm, config: RunConfig, teachers: list[TeacherConfig]) -> dict[str, Tensor]:
    """Labels and gathered centroids; a workdir for each number of ranks."""
    workdir = config.workdir / f"{comm.world_size}"
    groups, _ = load_teachers(teachers, comm, workdir=workdir)
    again, _ = load_teachers(teachers, comm, workdir=workdir)
    result = {}
    for name, group in groups.items():
        result[name] = group.labels.labels
        result[f"{name} centroids"] = comm.gather_rows(group.centroids)
        assert torch.equal(again[name].labels.labels, group.labels.labels)
    return result


def test_any_number_of_ranks_finds_the_same_groups(tmp_path: Path) -> None:
    config, _ = store_in(tmp_path)
    teachers = [teacher(tmp_path), teacher(tmp_path, name="p", pca=3, facets="each")]
    alone = found_by(Comm.solo(), config, teachers)
    for rank in run_ranks(found_by, 3, config, teachers, timeout_seconds=200):
        for name, value in alone.items():
            torch.testing.assert_close(rank[name], value, atol=1e-6, rtol=0)


def test_what_was_found_is_kept_and_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    config, _ = store_in(tmp_path)
    _, other = store_in(tmp_path, seed=1)
    load_teachers([teacher(tmp_path)], Comm.solo(), workdir=config.workdir)
    labels = config.workdir / "teachers" / "t" / "t" / "labels.npy"
    before = labels.stat().st_mtime_ns
    kept = load_teachers([teacher(tmp_path, weight=2.0)], Comm.solo(), workdir=config.workdir)
    assert labels.stat().st_mtime_ns == before
    assert kept.groups["t"].weight == 2.0
    for changes in ({"store": other.folder}, {"clusters": 5}, {"centre": False}, {"vectors": [1]}):
        with pytest.raises(CheckpointError, match="groups of another teacher t"):
            load_teachers([teacher(tmp_path, **changes)], Comm.solo(), workdir=config.workdir)


def test_a_checkpoint_with_another_teacher_is_refused(tmp_path: Path) -> None:
    config, _ = store_in(tmp_path)
    entry = f"recipe.teachers=[{{name: t, store: {tmp_path}/store-0, clusters: 4}}]"
    recipe, _ = built(config_in(tmp_path, entry), Comm.solo())
    state = recipe.parts["teachers"].state_share()
    recipe.parts["teachers"].load_state_dict(state)
    with pytest.raises(CheckpointError, match="the vectors of teacher t are not those"):
        TeacherDigests({"t": "ab" * 32}, Comm.solo()).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"teacher u are not those .*none then"):
        TeacherDigests(
            recipe.parts["teachers"].digests | {"u": "cd" * 32}, Comm.solo()
        ).load_state_dict(state)
    assert "teachers" not in built(config, Comm.solo())[0].parts


def test_mistakes_in_one_sentence(tmp_path: Path) -> None:
    config, _ = store_in(tmp_path)
    for changes, says in (
        ({"clusters": 99}, "99 clusters for 36 training samples .* use at most 3"),
        ({"vectors": [3]}, "vectors has 3, but .* has vectors 0 to 2"),
        ({"pca": 7}, "pca is 7, but .* 36 samples of 6 numbers"),
        ({"name": "image"}, "named image; rename one"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_teachers([teacher(tmp_path, **changes)], Comm.solo(), workdir=config.workdir)


def episode(folder: Path, entry: str) -> tuple[object, Features, Batch, Tensor, Tensor]:
    """A recipe in its first episode; a batch of it; ids and image features of the extraction."""
    config = config_in(folder, f"recipe.teachers=[{entry}]")
    recipe, stream = built(config, Comm.solo())
    encode = encoder(recipe)
    recipe.begin_phase(Progress(), encode, stream)
    views = list(stream.view(0, 36, purpose="extract"))
    rows = torch.cat([encode(b).image_projected[b.sample_id >= 0] for b in views])
    ids = torch.cat([b.sample_id[b.sample_id >= 0] for b in views])
    stream.seek(0)
    (batch,) = stream.take()
    return recipe, encode(batch), batch, ids, rows


@pytest.mark.heavy
@pytest.mark.parametrize("temperature", [-1.0, 0.05])
def test_a_teacher_s_term_is_the_papers(tmp_path: Path, temperature: float) -> None:
    """The image term in float64 by the paper's formula: own groups' means, hard or soft targets."""
    store_in(tmp_path)
    entry = (
        f"{{name: t, store: {tmp_path}/store-0, clusters: 4, weight: 0.6, students: [image], "
        f"target_temperature: {temperature}}}"
    )
    recipe, features, batch, ids, rows = episode(tmp_path, entry)
    losses = recipe.losses(features, batch, 0)
    assert losses.weights["image_from_t"] == pytest.approx(0.3)
    assert "text_from_t" not in losses
    group = recipe.teachers["t"]
    table = group_means(rows.double(), group.labels.of(ids), num_groups=4, comm=Comm.solo()).rows
    own = group.labels.of(batch.sample_id)
    targets = torch.nn.functional.one_hot(own, 4).double()
    if temperature > 0:
        centroids = group.centroids.double()
        targets = (centroids[own] @ centroids.T / temperature).softmax(1)
    logits = features.prototype_scale.double() * features.image_projected.double() @ table.T
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    assert float(losses["image_from_t"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.heavy
def test_groups_that_an_episode_lacks_are_masked_and_unknown_samples_left_out(
    tmp_path: Path,
) -> None:
    """An episode of a third of the corpus: many groups have nobody in it."""
    store_in(tmp_path)
    entry = f"{{name: t, store: {tmp_path}/store-0, clusters: 30, facets: each, vectors: [0]}}"
    recipe, stream = built(
        config_in(tmp_path, f"recipe.teachers=[{entry}]", "recipe.episode_samples=12"),
        Comm.solo(),
    )
    figures = recipe.begin_phase(Progress(), encoder(recipe), stream)
    table = recipe.episode.tables[Term("image", "t-0")]
    present = recipe.teachers["t-0"].labels.of(
        torch.cat([b.sample_id for b in stream.view(0, 12, purpose="extract")])
    )
    assert table.valid.nonzero()[:, 0].tolist() == sorted(set(present.tolist()))
    assert not table.valid.all()
    assert figures["t-0_unknown_rate"] == 0.0
    assert 0.0 <= figures["nmi_image_t-0"] <= 1.0
    stream.seek(0)
    (batch,) = stream.take()
    features = encoder(recipe)(batch)
    known = recipe.losses(features, batch, 0)["image_from_t-0"]
    strangers = batch._replace(sample_id=batch.sample_id.clone())
    strangers.sample_id[0] = 1
    assert torch.isfinite(recipe.losses(features, strangers, 0)["image_from_t-0"])
    nobody = batch._replace(sample_id=torch.arange(len(batch.sample_id)) + 1)
    assert float(recipe.losses(features, nobody, 0)["image_from_t-0"]) == 0.0
    assert float(known) > 0


def test_only_the_training_samples_shape_the_groups(tmp_path: Path) -> None:
    config, store = store_in(tmp_path)
    ids, vectors = everything(store)
    settings = teacher(tmp_path, centre=False, iterations=100, vectors=[1])
    found = load_teachers([settings], Comm.solo(), workdir=config.workdir, corpus=ids[::2])
    group = found.groups["t"]
    assert (group.labels.of(ids[1::2].contiguous()) == -1).all()
    assert_nearest(group.labels.of(ids[::2].contiguous()), vectors[::2, 1], group.centroids)
    with pytest.raises(CheckpointError, match="another teacher"):
        load_teachers([settings], Comm.solo(), workdir=config.workdir, corpus=ids[:30])


def test_a_teacher_is_its_vectors(tmp_path: Path) -> None:
    """Two stores of the same vectors are one teacher; scaling all vectors changes no label."""
    config, _ = store_in(tmp_path)
    first: Teachers = load_teachers([teacher(tmp_path)], Comm.solo(), workdir=tmp_path / "a")
    write_vectors(tmp_path / "copy", config.data.train, vectors=VECTORS, dim=DIM)
    copy = teacher(tmp_path, store=tmp_path / "copy")
    second = load_teachers([copy], Comm.solo(), workdir=tmp_path / "a")
    assert first.digests == second.digests
