"""An image tower against a sharded head: by the formulas, over ranks, stopped, and poisoned."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.test_loop import final_state, logged, run_once
from trainer.comm import Comm
from trainer.config import RunConfig, micro_batches, parse_run
from trainer.data.index import write_index
from trainer.data.labels import ClusterLabels
from trainer.data.remote import expand_shards
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.losses.margin import coordinate_subset
from trainer.parts.sampling import BLOCK, rate_with_negatives
from trainer.recipe import load_recipe
from trainer.run import context_of, refuse_text_evals, stream_of, tokenizer_of
from trainer.types import Batch, Losses, Progress

RUN = """
workdir: {folder}/run
steps: 8
global_batch: 12
deepspeed: ds_configs/zero3.json
recipe:
  name: mlcd
  model:
    image_size: 32
    patch_size: 16
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
  classes: [concept_id, subgroup, group]
  figures_every: 1
  head: {{sample_rate: 0.5, learning_rate: 0.01}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003, warmup_steps: 2}}
evals:
  - {{name: knn, label: neighbours, train: "{spec}", data: "{other}", target: subgroup}}
  - {{name: linear_probe, label: probe, train: "{spec}", data: "{other}", target: subgroup}}
log_every: 1 steps
save_every: 2 steps
"""
WHOLE = ("recipe.head.sample_rate=1.0", "recipe.margin_size=0.0")


def shards_without_captions(folder: Path) -> str:
    """Real drawings with json, and no `txt` member anywhere."""
    spec = write_shards(folder / "captioned", count=60, per_shard=20)
    (folder / "shards").mkdir()
    for path in map(Path, expand_shards(spec)):
        target = folder / "shards" / path.name
        with tarfile.open(path) as source, tarfile.open(target, "w") as shard:
            for member in source:
                if not member.name.endswith(".txt"):
                    shard.addfile(member, source.extractfile(member))
        write_index(str(target))
    return str(folder / "shards" / "emoji-{000000..000001}.tar")


def config_in(folder: Path, *overrides: str) -> RunConfig:
    spec = shards_without_captions(folder)
    other = folder / "shards" / "emoji-000002.tar"
    return parse_run(RUN.format(folder=folder, spec=spec, other=other), overrides)


def changed(config: RunConfig, *overrides: str) -> RunConfig:
    from trainer.config import dump_run

    return parse_run(dump_run(config), overrides)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> RunConfig:
    return config_in(tmp_path_factory.mktemp("mlcd"))


def built(config: RunConfig, comm: Comm):
    micro_batch, _ = micro_batches(
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        world_size=comm.world_size,
    )
    tokenizer = tokenizer_of(config, comm)
    assert tokenizer is None
    recipe = load_recipe(config.recipe, context_of(config, comm, tokenizer))
    return recipe, stream_of(config, comm, tokenizer, micro_batch=micro_batch)


def one_loss(config: RunConfig, step: int = 0) -> tuple[Losses, Tensor, Tensor, Tensor]:
    """Losses of a step, and what they are of: features, labels and the whole table, in float64."""
    recipe, stream = built(config, Comm.solo())
    (batch,) = stream.take()
    features = recipe.model(batch)
    losses = recipe.losses(features, batch, step)
    term = recipe.term
    labels = term.labels.top(batch.sample_id)
    rows = features.image if features.image_projected is None else features.image_projected
    return losses.detach(), rows.detach().double(), labels, term.head.rows.double()


# -- by the formulas --------------------------------------------------------------------------


@pytest.mark.heavy
def test_mlcd_is_the_paper_s_formula_over_all_other_prototypes(base):
    losses, rows, labels, table = one_loss(changed(base, *WHOLE, "recipe.margin_size=0.3"))
    assert labels.shape == (12, 3)
    cosines = normalize(rows) @ normalize(table).T
    positive, negative, pull, push = [], [], [], []
    for row, own in zip(cosines, labels, strict=True):
        others = torch.ones(len(row), dtype=torch.bool)
        others[own] = False
        pull.append(torch.log1p(torch.exp(-64 * (row[own] - 0.3)).sum()))
        push.append(torch.log1p(torch.exp(64 * row[others]).sum()))
        positive.append(row[own].mean())
        negative.append(row[others].mean())
    expected = {
        "mlcd": torch.stack(pull).mean() + torch.stack(push).mean(),
        "positive_term": torch.stack(pull).mean(),
        "negative_term": torch.stack(push).mean(),
        "positive_cosine": torch.stack(positive).mean(),
        "negative_cosine": torch.stack(negative).mean(),
        "active_rows": torch.tensor(float(len(table))),
        "labelled": torch.tensor(1.0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, losses["mlcd"])
    rarely = changed(base, "recipe.figures_every=2")
    assert "negative_cosine" not in one_loss(rarely, step=0)[0]
    assert "negative_cosine" in one_loss(rarely, step=1)[0]


@pytest.mark.heavy
def test_one_label_is_plain_softmax_cross_entropy_for_three_losses(base):
    """pfc_ce, slots and mlc agree where there is one label; mlcd adds what the paper says."""
    values = {}
    for loss in ("pfc_ce", "slots", "mlc", "mlcd"):
        options = (f"recipe.loss={loss}", "recipe.classes=[subgroup]", "recipe.labels_per_sample=1")
        losses, rows, labels, table = one_loss(changed(base, *WHOLE, *options))
        logits = 64 * normalize(rows) @ normalize(table).T
        values[loss] = float(losses[loss])
        plain = cross_entropy(logits, labels[:, 0])
        if loss != "mlcd":
            torch.testing.assert_close(losses[loss].double(), plain, rtol=1e-5, atol=1e-5)
    own = logits.gather(1, labels)[:, 0]
    others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
    added = torch.log((1 + (-own).exp()) * (1 + others.exp()) / (1 + (others - own).exp()))
    assert values["mlcd"] == pytest.approx(values["mlc"] + float(added.mean()), rel=1e-5)


def renamed(config: RunConfig, name: str, dropped: str, *overrides: str) -> RunConfig:
    """The same run under another recipe's name, without a key that says what the name says."""
    import yaml

    from trainer.config import dump_run

    values = yaml.safe_load(dump_run(config))
    values["recipe"]["name"] = name
    for key in (dropped, "tokens", "momentum_copy", "overuse", "known_groups"):  # of mlcd alone
        values["recipe"].pop(key, None)
    return parse_run(yaml.safe_dump(values), overrides)


@pytest.mark.heavy
def test_partial_fc_unicom_and_rice_are_what_the_old_spelling_computes(base):
    """To the last bit; and both tell their parts by the same names, so a checkpoint goes on."""
    one = ("recipe.classes=[subgroup]", "recipe.labels_per_sample=1")
    union = "recipe.head.union_positives=true"
    for name, old in {
        "partial_fc": ("recipe.loss=pfc_ce", union),
        "unicom": ("recipe.loss=pfc_ce", union, "recipe.margin=angular", "recipe.features_kept=5"),
        "rice": (),
    }.items():
        expected = changed(base, *one, *old)
        ours = renamed(expected, name, "loss")
        values, ours_values = one_loss(expected)[0], one_loss(ours)[0]
        assert dict(values.items()).keys() == dict(ours_values.items()).keys()
        assert torch.equal(values.total, ours_values.total)
        parts, ours_parts = (built(each, Comm.solo())[0].parts for each in (expected, ours))
        assert parts.keys() == ours_parts.keys()


@pytest.mark.heavy
def test_partial_fc_s_rule_is_on_wherever_its_loss_is_and_unicom_names_its_missing_key(base):
    """Also where only other keys of the head are given, and off for those who say so."""
    one = ("recipe.classes=[subgroup]", "recipe.labels_per_sample=1")
    unsaid = "recipe.head={learning_rate: 0.01}"
    old = changed(base, *one, "recipe.loss=pfc_ce", unsaid)
    for config in (old, renamed(old, "partial_fc", "loss")):
        assert built(config, Comm.solo())[0].parts["head"].config.union_positives is True
        off = changed(config, "recipe.head.union_positives=false")
        assert built(off, Comm.solo())[0].parts["head"].config.union_positives is False
    assert built(base, Comm.solo())[0].parts["head"].config.union_positives is False
    with pytest.raises(ConfigError, match="features_kept"):
        renamed(changed(old, "recipe.features_kept=5"), "unicom", "features_kept")


@pytest.mark.heavy
@pytest.mark.parametrize("sampling", ["rows", "blocks"])
def test_a_small_share_of_few_rows_still_has_negatives_in_every_step_and_says_so(base, sampling):
    from trainer.run import loading_notes

    ids = torch.as_tensor(ShardSet.open(base.data.train).ids)
    folder = base.workdir / f"seven_{sampling}"
    ClusterLabels(ids, (torch.arange(len(ids)) % 7)[:, None]).save(folder)
    few = changed(
        base,
        *("recipe.classes=[]", f"recipe.labels={folder}", "recipe.labels_per_sample=1"),
        f"recipe.head={{sample_rate: 0.1, logq: true, sampling: {sampling}}}",
    )
    for loss in ("mlcd", "slots", "pfc_ce"):
        config = changed(few, f"recipe.loss={loss}")
        recipe, _ = built(config, Comm.solo())
        for step in range(30):
            active = recipe.term.head.active(torch.zeros(4, 1, dtype=torch.int64), step)
            assert active.num_negatives == 7
            assert active.bias is None  # every row is drawn for certain
        (note,) = loading_notes(config, recipe)
        assert "0.1 of 7 prototypes" in note
    many = changed(few, "recipe.num_prototypes=100_000")
    recipe, _ = built(many, Comm.solo())
    assert loading_notes(many, recipe) == []
    assert recipe.head.config.sample_rate == 0.1


@given(
    rate=st.floats(1e-6, 1.0),
    count=st.integers(1, 2000),
    labels=st.integers(1, 8),
    sampling=st.sampled_from(["rows", "blocks"]),
)
def test_hardly_any_step_of_any_small_table_is_without_negatives(rate, count, labels, sampling):
    """By the chance that a sample's own rows are all that is drawn; and a rate is never lowered."""
    raised = rate_with_negatives(rate, count, labels=labels, sampling=sampling)
    assert rate <= raised <= 1
    units = -(-count // BLOCK) if sampling == "blocks" else count
    own = 0 if sampling == "blocks" else min(labels, units)
    assert raised == 1 or (1 - raised) ** (units - own) < 1e-6
    assert rate_with_negatives(0.0, count, labels=labels, sampling=sampling) == 0


@pytest.mark.heavy
def test_the_margin_is_taken_from_positives_alone_and_the_filter_from_negatives(base):
    one = ("recipe.loss=pfc_ce", "recipe.classes=[subgroup]", "recipe.head.sample_rate=1.0")
    _, rows, labels, table = one_loss(changed(base, *one))
    cosines = normalize(rows) @ normalize(table).T
    own = torch.zeros_like(cosines, dtype=torch.bool).scatter(1, labels, True)
    angular = torch.cos(cosines.arccos() + 0.5)
    filtered = torch.where(~own & (cosines > 0.1), 0.0, cosines)
    assert bool((filtered != cosines).any())
    cases = {
        ("recipe.margin_size=0.4",): torch.where(own, cosines - 0.4, cosines),
        ("recipe.margin=angular", "recipe.margin_size=0.5"): torch.where(own, angular, cosines),
        ("recipe.margin=straight_through", "recipe.margin_size=0.5"): torch.where(
            own, angular, cosines
        ),
        ("recipe.margin_size=0.0", "recipe.ceiling=0.1"): filtered,
    }
    for overrides, expected in cases.items():
        losses, *_ = one_loss(changed(base, *one, *overrides))
        value = cross_entropy(64 * expected, labels[:, 0])
        torch.testing.assert_close(losses["pfc_ce"].double(), value, rtol=1e-5, atol=1e-5)


def test_a_subset_of_features_is_compared_as_directions_of_its_own_and_drawn_by_step(base):
    config = changed(
        base, *WHOLE, "recipe.loss=pfc_ce", "recipe.classes=[subgroup]", "recipe.features_kept=5"
    )
    from trainer.hashing import key_of

    seen = set()
    for step in (0, 1):
        losses, rows, labels, table = one_loss(config, step)
        kept = coordinate_subset(16, 5, key_of(config.seed, "coordinates", step))
        seen.add(tuple(kept.tolist()))
        logits = 64 * normalize(rows[:, kept]) @ normalize(table[:, kept]).T
        value = cross_entropy(logits, labels[:, 0])
        torch.testing.assert_close(losses["pfc_ce"].double(), value, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2


def test_a_large_scale_takes_the_other_pass_and_says_the_same(base):
    """Above 80 there is no fixed reference for sums: the two-pass form with a running maximum."""
    one = ("recipe.loss=pfc_ce", "recipe.classes=[subgroup]", "recipe.scale=100.0")
    losses, rows, labels, table = one_loss(changed(base, *WHOLE, *one))
    value = cross_entropy(100 * normalize(rows) @ normalize(table).T, labels[:, 0])
    torch.testing.assert_close(losses["pfc_ce"].double(), value, rtol=1e-5, atol=1e-5)


def test_a_model_with_a_head_compares_the_head_s_output(base):
    config = changed(base, *WHOLE, "recipe.model.head={hidden: 24, dim: 8, norm: layer}")
    losses, rows, _, table = one_loss(config)
    assert rows.shape[1] == table.shape[1] == 8
    assert torch.isfinite(losses.total)


# -- labels -----------------------------------------------------------------------------------


def test_stored_labels_are_joined_by_sample_id_nearest_first_or_drawn(base, tmp_path):
    ids = torch.as_tensor(ShardSet.open(base.data.train).ids)
    drawn = torch.randint(0, 30, (len(ids), 4), generator=torch.Generator().manual_seed(0))
    drawn[0, 2:] = -1
    drawn[1] = -1
    ClusterLabels(ids, drawn).save(tmp_path / "labels")
    stored = ("recipe.classes=[]", f"recipe.labels={tmp_path}/labels")
    by_id = dict(zip(ids.tolist(), drawn.tolist(), strict=True))

    recipe, _ = built(changed(base, *stored, "recipe.labels_per_sample=2"), Comm.solo())
    assert recipe.head.num_prototypes == drawn.max() + 1
    assert recipe.term._chosen(ids, 0).tolist() == [by_id[i][:2] for i in ids.tolist()]

    random = changed(base, *stored, "recipe.labels_per_sample=2", "recipe.label_choice=random")
    recipe, _ = built(random, Comm.solo())
    chosen = torch.stack([recipe.term._chosen(ids, step) for step in range(40)])
    assert torch.equal(chosen[3], recipe.term._chosen(ids, 3))
    assert chosen[:, 1].eq(-1).all()
    assert set(chosen[:, 0].flatten().tolist()) == set(by_id[int(ids[0])][:2])
    for row, sample in enumerate(ids.tolist()[2:], start=2):
        assert set(chosen[:, row].flatten().tolist()) == set(by_id[sample])

    losses, *_ = one_loss(changed(base, *stored, "recipe.head.sample_rate=0.0"))
    assert float(losses["active_rows"]) == 0
    with pytest.raises(ConfigError, match=r"labels_per_sample is 5, but .* has 4 a sample"):
        built(changed(base, *stored, "recipe.labels_per_sample=5"), Comm.solo())
    ClusterLabels(ids + 1, drawn).save(tmp_path / "others")
    with pytest.raises(DataError, match="none of 40 samples"):
        built(changed(base, "recipe.classes=[]", f"recipe.labels={tmp_path}/others"), Comm.solo())


def test_mistakes_are_named_before_anything_is_trained(base):
    for overrides, message in [
        (["recipe.labels=somewhere"], "either `labels`"),
        (["recipe.classes=[]"], "either `labels`"),
        (["recipe.loss=pfc_ce", "recipe.labels_per_sample=2"], "labels_per_sample=1"),
        (["recipe.model.text={}"], "recipe.model.text"),
        (["recipe.loss=mlc", "recipe.head.sample_rate=0"], "mlc is then always zero"),
        (
            [
                *("recipe.loss=pfc_ce", "recipe.labels_per_sample=1"),
                *("recipe.head.sample_rate=0", "recipe.head.union_positives=false"),
            ],
            "pfc_ce is then always zero",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            changed(base, *overrides)
    ids = torch.as_tensor(ShardSet.open(base.data.train).ids)
    ClusterLabels(ids, torch.zeros(len(ids), 1, dtype=torch.int64)).save(base.workdir / "same")
    same = ("recipe.classes=[]", f"recipe.labels={base.workdir}/same")
    with pytest.raises(ConfigError, match="1 prototype gives images nothing"):
        built(changed(base, *same, "recipe.labels_per_sample=1"), Comm.solo())
    with pytest.raises(ConfigError, match="json key 'nothing'"):
        built(changed(base, "recipe.classes=[nothing]"), Comm.solo())
    evals = "evals=[{name: retrieval, label: pairs, data: x.tar}]"
    with pytest.raises(ConfigError, match="evaluation pairs: retrieval compares images with texts"):
        refuse_text_evals(changed(base, evals))


# -- over ranks -------------------------------------------------------------------------------


def poison_nothing(recipe, batches: list[Batch], comm: Comm) -> None:
    pass


def poison_a_pixel(recipe, batches: list[Batch], comm: Comm) -> None:
    if comm.rank == comm.world_size - 1:
        batches[0].images[1, 0, 0, 0] = float("nan")


def poison_a_prototype(recipe, batches: list[Batch], comm: Comm) -> None:
    """Only the gradient of one rank's rows: what the engine itself would not see."""
    if comm.rank == 0:
        head = recipe.head
        original = head.gradients_finite

        def spoilt() -> bool:
            head._touched.leaf.grad[0, 0] = float("inf")
            del head.gradients_finite
            return original()

        head.gradients_finite = spoilt


def steps_of(comm: Comm, configs: list[RunConfig]) -> list[dict]:
    """Three steps of each run; in the first one poisoned steps, which must change nothing."""
    from trainer.engine.zero import Engine
    from trainer.running.steps import train_step

    results = []
    for number, config in enumerate(configs):
        recipe, stream = built(config, comm)
        engine = Engine(
            recipe.model, config.optim, comm, deepspeed_config=config.deepspeed, micro_batch=1
        )
        progress, losses, moved, applied_all = Progress(), [], [], []
        plan = [poison_nothing] * 3
        if number == 0:
            plan[1:1] = [poison_a_pixel, poison_a_prototype]
        for poison in plan:
            before = state_of(engine, recipe)
            batches = stream.take()
            poison(recipe, batches, comm)
            values, applied = train_step(engine, recipe, batches, progress, config)
            after = state_of(engine, recipe)
            applied_all.append(applied)
            if poison is poison_nothing:
                losses.append({name: float(value) for name, value in values.items()})
            else:
                moved += [name for name in before if not torch.equal(before[name], after[name])]
            progress = progress.advance(samples=12, applied=applied)
            stream.seek(12 * progress.step)
        results.append(
            {"losses": losses, "moved": moved, "applied": applied_all, "rows": recipe.head.rows}
            | {"weights": engine.gathered_weights()}
        )
    return results


def state_of(engine, recipe) -> dict[str, Tensor]:
    """Rows pay the decay they owe when they are looked at, step or no step: here all of it."""
    recipe.head._optimizer.settle(None)
    share = {name: value.clone() for name, value in recipe.head.state_share()}
    return engine.weights_share() | engine.moments_share() | share


def test_ranks_and_micro_batches_change_nothing_and_poison_moves_nothing(base):
    """Losses, towers and head rows of W = 1, 2 and of six micro-batches are the same steps."""
    configs = [
        base,
        changed(base, "micro_batch=2"),
        changed(base, "recipe.loss=slots", "recipe.features_kept=7", "recipe.head.sample_rate=0.2"),
        changed(base, "recipe.head.group_size=1"),
    ]
    alone = run_ranks(steps_of, 1, configs, timeout_seconds=200)[0]
    pair = run_ranks(steps_of, 2, configs, timeout_seconds=200)
    for index, config in enumerate(configs):
        expected, ranks = alone[index], [rank[index] for rank in pair]
        for ours in (expected, *ranks):
            assert ours["moved"] == []
            assert ours["applied"] == (
                [True, False, False, True, True] if index == 0 else [True] * 3
            )
        for name, value in expected["weights"].items():
            torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-4, atol=1e-4)
        # In groups of one every rank has the table, and its losses are of its own samples.
        alone_in_group = config.recipe.head.group_size == 1
        rows = [rank["rows"] for rank in ranks]
        for table in rows if alone_in_group else [torch.cat(rows)]:
            torch.testing.assert_close(table, expected["rows"], rtol=1e-3, atol=2e-5)
        for step, values in enumerate(expected["losses"]):
            for rank in ranks:
                for name, value in values.items():
                    if name != "labelled" and not alone_in_group:
                        assert rank["losses"][step][name] == pytest.approx(
                            value, rel=1e-3, abs=1e-5
                        )
    one, split = alone[0]["rows"], alone[1]["rows"]
    torch.testing.assert_close(split, one, rtol=1e-3, atol=2e-5)


def test_a_stopped_run_goes_on_to_the_same_bytes_and_evaluates_without_texts(tmp_path):
    """Weights, moments, head rows with theirs, every logged number; ZeRO-3 on two ranks."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, stopped = config_in(tmp_path / "whole"), config_in(tmp_path / "stopped")
    run_ranks(run_once, 2, whole, None, timeout_seconds=300)
    first = run_ranks(run_once, 2, stopped, 4, timeout_seconds=300)
    assert not first[0]["finished"]
    run_ranks(run_once, 2, stopped, None, timeout_seconds=300)

    expected, actual = final_state(whole), final_state(stopped)
    assert any(name.startswith("parts/head/exp_avg_sq/") for name in expected)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    lines = logged(whole, "metrics.jsonl")
    assert logged(stopped, "metrics.jsonl") == lines
    assert {"mlcd", "positive_term", "negative_term", "positive_cosine"} <= lines[0][
        "values"
    ].keys()
    assert {"negative_cosine", "active_rows", "labelled"} <= lines[0]["values"].keys()
    events = logged(whole, "events.jsonl")
    assert logged(stopped, "events.jsonl") == events
    assert [event["event"] for event in events] == ["neighbours", "probe"]
    assert not (whole.workdir / "tokenizer").exists()
    exported_as_transformers_reads_it(whole)


def exported_as_transformers_reads_it(config: RunConfig) -> None:
    from transformers import CLIPVisionModelWithProjection

    from trainer.export.transformers_folder import export_model
    from trainer.programs.workdir import open_workdir

    trained = open_workdir(config.workdir, Comm.solo())
    export_model(trained.model, trained.tokenizer, config.workdir / "export")
    theirs = CLIPVisionModelWithProjection.from_pretrained(config.workdir / "export").eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = trained.model(Batch(images, None, None, torch.arange(2))).image
        rows = normalize(theirs(images).image_embeds)
    torch.testing.assert_close(rows, ours, rtol=0, atol=1e-6)
