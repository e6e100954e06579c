"""ProtoCLIP's episodes: what is drawn, clustered, translated and looked up."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from trainer.cluster.translate import group_means
from trainer.comm import Comm
from trainer.config import RunConfig, micro_batches, parse_run
from trainer.errors import ConfigError
from trainer.recipe import load_recipe
from trainer.run import context_of, stream_of, tokenizer_of
from trainer.types import Batch, Features, Progress

RUN = """
workdir: {folder}/run
steps: 12
global_batch: 12
recipe:
  name: {name}
  model:
    image_size: 32
    patch_size: 16
    text_length: 8
    vocabulary: 300
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
    text: {{width: 32, layers: 1, heads: 2}}
{extra}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003}}
"""
EPISODES = """
  episode_samples: 36
  clusters: 5
  warmup_episodes: 0
"""


def config_in(folder: Path, *overrides: str, name: str = "protoclip") -> RunConfig:
    spec = write_shards(folder / "shards", count=36, per_shard=12)
    extra = EPISODES if name == "protoclip" else ""
    return parse_run(RUN.format(folder=folder, spec=spec, name=name, extra=extra), overrides)


def built(config: RunConfig, comm: Comm):
    micro_batch, _ = micro_batches(
        global_batch=config.global_batch, micro_batch=None, world_size=comm.world_size
    )
    tokenizer = tokenizer_of(config, comm)
    recipe = load_recipe(config.recipe, context_of(config, comm, tokenizer))
    return recipe, stream_of(config, comm, tokenizer, micro_batch=micro_batch)


def encoder(recipe):
    @torch.no_grad()
    def encode(batch: Batch) -> Features:
        recipe.model.eval()
        features = recipe.model(batch)
        recipe.model.train()
        return features

    return encode


def id_code(sample_id: Tensor) -> Tensor:
    """A direction that names the sample: the id's bits as signs."""
    bits = (sample_id[:, None] >> torch.arange(62)) & 1
    return torch.nn.functional.normalize(bits.float() * 2 - 1, dim=1)


def by_id(batch: Batch) -> Features:
    code = id_code(batch.sample_id)
    return Features(code, code, code, code, *(torch.tensor(10.0),) * 3)


def episode_by_id(comm: Comm, config: RunConfig) -> dict:
    """An episode whose features are the ids themselves, then the labels that training looks up."""
    recipe, stream = built(config, comm)
    if comm.is_main:
        torch.rand(1000)  # a draw on one rank alone, which once misaligned the labels
    figures = recipe.begin_phase(Progress(), by_id, stream)
    extracted = {
        int(i)
        for batch in stream.view(0, 36, purpose="extract")
        for i in batch.sample_id[batch.sample_id >= 0]
    }
    stream.seek(0)
    rows = [(b.sample_id, id_code(b.sample_id)) for _ in range(3) for b in stream.take()]
    ids = torch.cat([row[0] for row in rows])
    codes = torch.cat([row[1] for row in rows])
    centroids = recipe.episode.centroids["image"]
    nearest = torch.cdist(codes.double(), centroids.double()).argmin(dim=1)
    return {
        "found": recipe.episode.labels["image"].of(ids),
        "nearest": nearest,
        "trained": ids,
        "extracted": extracted,
        "figures": {k: v for k, v in figures.items() if not k.startswith("seconds")},
    }


def test_labels_are_those_of_the_sample_and_both_passes_see_the_same_ids(tmp_path):
    config = config_in(tmp_path)
    by_world = {1: [episode_by_id(Comm.solo(), config)]}
    by_world[3] = run_ranks(episode_by_id, 3, config, timeout_seconds=200)
    for ranks in by_world.values():
        for rank in ranks:
            assert torch.equal(rank["found"], rank["nearest"])
        trained = torch.cat([rank["trained"] for rank in ranks])
        assert len(set(trained.tolist())) == 36
        assert set(trained.tolist()) == set().union(*(rank["extracted"] for rank in ranks))
    assert by_world[1][0]["figures"] == pytest.approx(
        by_world[3][0]["figures"], abs=1e-5, nan_ok=True
    )


def test_translating_a_space_by_its_own_labels_gives_its_centroids(tmp_path):
    config = config_in(tmp_path, "recipe.kmeans_iterations=100")
    recipe, stream = built(config, Comm.solo())
    encode = encoder(recipe)
    recipe.begin_phase(Progress(), encode, stream)
    batches = list(stream.view(0, 36, purpose="extract"))
    rows = torch.cat([encode(b).image_projected[b.sample_id >= 0] for b in batches])
    ids = torch.cat([b.sample_id[b.sample_id >= 0] for b in batches])
    labels = recipe.episode.labels["image"].of(ids)
    means = group_means(rows, labels, num_groups=5, comm=Comm.solo())
    torch.testing.assert_close(means.rows, recipe.episode.centroids["image"], rtol=0, atol=1e-4)


@pytest.mark.heavy
def test_a_term_is_the_paper_s_and_every_switch_changes_it(tmp_path):
    """The image term in float64 by the paper's formula; each parity switch moves some term."""
    terms = {}
    switches = [
        "recipe.back_translation=true",
        "recipe.back_translation=false",
        "recipe.target_temperature=-1",
        "recipe.target_entropy=0.7",
        "recipe.unit_centroids=true",
        "recipe.unit_tables=true",
        "recipe.spherical=true",
    ]
    for switch in switches:
        recipe, stream = built(config_in(tmp_path, switch), Comm.solo())
        encode = encoder(recipe)
        recipe.begin_phase(Progress(), encode, stream)
        stream.seek(0)
        (batch,) = stream.take()
        features = encode(batch)
        losses = recipe.losses(features, batch, 0)
        terms[switch] = (float(losses["image_from_text"]), float(losses["text_from_image"]))
        if switch == switches[0]:
            assert losses.weights == {"clip": 1.0, "image_from_text": 0.5, "text_from_image": 0.5}
            assert terms[switch][0] == pytest.approx(_by_hand(recipe, stream, features, batch))
    lengths = recipe.episode.centroids["image"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    # Here the groups are the same, so scaling in k-means or afterwards makes the same targets.
    assert terms.pop("recipe.spherical=true") == pytest.approx(terms["recipe.unit_centroids=true"])
    for one, other in itertools.combinations(terms.values(), 2):
        assert one != pytest.approx(other, rel=1e-5)


def _by_hand(recipe, stream, features: Features, batch: Batch) -> float:
    encode = encoder(recipe)
    views = list(stream.view(0, 36, purpose="extract"))
    images = torch.cat([encode(b).image_projected[b.sample_id >= 0] for b in views]).double()
    ids = torch.cat([b.sample_id[b.sample_id >= 0] for b in views])
    labels = recipe.episode.labels["text"].of(ids)
    table = torch.stack([images[labels == k].mean(dim=0) for k in range(5)])
    centroids = recipe.episode.centroids["text"].double()
    own = recipe.episode.labels["text"].of(batch.sample_id)
    targets = (centroids[own] @ centroids.T / 0.01).softmax(dim=1)
    logits = features.prototype_scale.double() * features.image_projected.double() @ table.T
    return float(-(targets * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_warm_up_and_tail_are_plain_clip_and_the_tail_locks_the_image_tower(tmp_path):
    config = config_in(
        tmp_path, "recipe.warmup_episodes=1", "recipe.locked_tail_episodes=1", "steps=9"
    )
    recipe, stream = built(config, Comm.solo())
    seen = []
    for episode in range(3):
        progress = Progress(step=3 * episode, samples=36 * episode)
        assert recipe.phase_due(progress)
        recipe.begin_phase(progress, encoder(recipe), stream)
        terms = sorted(term.name for term in recipe.episode.tables)
        seen.append((terms, list(recipe.locked_towers(progress))))
    both = ["image_from_text", "text_from_image"]
    assert seen == [([], []), (both, []), ([], ["image"])]
    assert not recipe.phase_due(Progress(step=1, samples=12))


def test_the_state_of_an_episode_comes_back_on_another_number_of_ranks(tmp_path):
    config = config_in(tmp_path)
    (whole,) = [episode_state(Comm.solo(), config)]
    for state in run_ranks(episode_state, 2, config, timeout_seconds=200):
        assert state["saved"].keys() == whole["saved"].keys()
        for name, value in whole["saved"].items():
            torch.testing.assert_close(state["saved"][name], value, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(state["again"][n], v) for n, v in state["saved"].items())


def episode_state(comm: Comm, config: RunConfig) -> dict:
    from trainer.parts.episode import EpisodeTables

    recipe, stream = built(config, comm)
    recipe.begin_phase(Progress(), encoder(recipe), stream)
    saved = recipe.episode.state_dict()
    other = EpisodeTables(comm)
    other.load_state_dict(saved)
    return {"saved": saved, "again": other.state_dict()}


def towers_after_three_steps(comm: Comm, configs: list[RunConfig]) -> list[dict[str, Tensor]]:
    from trainer.engine.zero import Engine
    from trainer.running.steps import train_step

    results = []
    for config in configs:
        recipe, stream = built(config, comm)
        engine = Engine(
            recipe.model, config.optim, comm, deepspeed_config=config.deepspeed, micro_batch=6
        )
        progress = Progress()
        for _ in range(3):
            if recipe.phase_due(progress):
                recipe.begin_phase(progress, engine.encode, stream)
            _, applied = train_step(engine, recipe, stream.take(), progress, config)
            progress = progress.advance(samples=12, applied=applied)
        weights = engine.gathered_weights()
        results.append({n: v for n, v in weights.items() if n.startswith(("image.", "text."))})
    return results


def test_weights_of_zero_are_clip_bit_for_bit(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    clip = config_in(tmp_path / "a", name="clip")
    proto = config_in(tmp_path / "b", "recipe.prototype_weight=0", f"data.train={clip.data.train}")
    plain, weightless = run_ranks(towers_after_three_steps, 2, [clip, proto], timeout_seconds=300)[
        0
    ]
    assert plain.keys() == weightless.keys()
    assert [name for name in plain if not torch.equal(plain[name], weightless[name])] == []


def test_an_entropy_finds_each_modality_s_temperature(tmp_path):
    """What is logged has the entropy that was asked for; the tables are those of that temperature
    when it is given by hand."""
    config = config_in(tmp_path, "recipe.target_entropy=0.7")
    recipe, stream = built(config, Comm.solo())
    figures = recipe.begin_phase(Progress(), encoder(recipe), stream)
    for space, student in (("image", "text"), ("text", "image")):
        assert figures[f"{space}_target_entropy"] == pytest.approx(0.7, abs=1e-3)
        found = figures[f"{space}_target_temperature"]
        other, again = built(config_in(tmp_path, f"recipe.target_temperature={found}"), Comm.solo())
        other.begin_phase(Progress(), encoder(other), again)
        ours, theirs = (
            {term.name: table.targets for term, table in each.episode.tables.items()}
            for each in (recipe, other)
        )
        name = f"{student}_from_{space}"
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["recipe.target_entropy=1", "recipe.target_temperature=1"], "give one of them"),
        (["recipe.target_entropy=1.7"], "5 clusters is below 1.61"),
        (["recipe.target_entropy=1", "recipe.prototype_weight=0"], "prototype_weight is 0"),
    ],
)
def test_an_entropy_that_nothing_could_use_is_refused(tmp_path, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config_in(tmp_path, *overrides)
