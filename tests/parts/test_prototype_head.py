"""A head divided over ranks beside one whole table (invariants 7, 9 to 13, 16, 17 and 27)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.parts.head_cases import (
    CASES,
    OPTIONS,
    SEED,
    STEPS,
    batch_of,
    config_of,
    count_of,
    dense_steps,
    new_head,
    own_negatives_on_one_table,
    rank_mean_on_one_table,
    results,
    sharded_steps,
    share_of,
    take_step,
    whole_state,
)
from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.losses.learned_prototypes import prototype_statistics
from trainer.losses.multilabel import multilabel_loss
from trainer.parts import row_ranges
from trainer.parts.sampling import sampled_ids

WORLD_SIZES = (1, 2, 3, 4)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_a_whole_table(name, world_size):
    """Losses, rows, and W times the features' gradient, over unequal batches and shards."""
    expected = dense_steps(name)
    for rank in results(world_size):
        found = rank[name]
        assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
        torch.testing.assert_close(found["rows"], expected["rows"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            found["gradients"], expected["gradients"] * world_size, rtol=1e-3, atol=1e-6
        )
        moved = (found["rows"] - found["start"]).abs().max()
        assert moved > 1e-3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_loss_that_is_the_mean_of_own_samples_moves_rows_the_same_over_any_ranks(world_size):
    """What the contract for recipes promises, for a loss that knows nothing of the head; also
    where the ranks share the table in groups."""
    expected = rank_mean_on_one_table()
    for rank in results(world_size):
        for name in ("rank mean", "rank mean in groups"):
            torch.testing.assert_close(rank[name]["rows"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_labels_with_negatives_of_their_own_move_rows_as_on_one_table(world_size):
    """One leaf holds what all columns need; their draws differ from each other."""
    expected = own_negatives_on_one_table()
    for rank in results(world_size):
        found = rank["own negatives"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
        torch.testing.assert_close(found["rows"], expected["rows"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ranges_cover_the_table_and_it_starts_the_same(name):
    expected = results(1)[0][name]["start"]
    for world_size in WORLD_SIZES:
        ranks = results(world_size)
        ends = [0]
        for rank in ranks:
            first, last = rank[name]["range"]
            assert first == ends[-1]
            ends.append(last)
            assert torch.equal(rank[name]["start"], expected)
        assert ends[-1] == count_of(name)
    assert len(expected.unique(dim=0)) == len(expected)


def test_active_rows_are_the_sample_and_all_positives():
    for name in ("sampled", "union", "all rows", "positives only", "no negatives"):
        config, count = config_of(name), count_of(name)
        head = new_head(Comm.solo(), config, count)
        for step in range(6):
            _, labels = batch_of(step, count)
            active = head.active(labels, step)
            how = {"rate": config.sample_rate, "sampling": config.sampling, "seed": SEED}
            sampled = set(sampled_ids(0, count, step=step, **how).tolist())
            positives = set(labels[labels >= 0].tolist())
            negatives = sampled | positives if config.union_positives else sampled
            assert active.ids[: active.num_negatives].tolist() == sorted(negatives)
            assert active.ids[active.num_negatives :].tolist() == sorted(positives - negatives)
            for position in active.positions(labels)[labels >= 0].tolist():
                assert position >= 0
            assert torch.equal(active.rows.detach(), head.rows[active.ids])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_figures_are_counts_over_all_ranks(world_size):
    for name in ("sampled", "union", "fewer rows than ranks"):
        config, count = config_of(name), count_of(name)
        for rank in results(world_size):
            for step, figures in enumerate(rank[name]["figures"]):
                _, labels = batch_of(step, count)
                how = {"rate": config.sample_rate, "sampling": "rows", "seed": SEED}
                sampled = set(sampled_ids(0, count, step=step, **how).tolist())
                touched = sampled | set(labels[labels >= 0].tolist())
                negatives = touched if config.union_positives else sampled
                assert figures["active_rows"] == len(negatives)
                assert figures["touched_rows"] == len(touched)
                assert figures["head_gradient_norm"] > 0


def test_gradients_are_tangent_and_shorter_for_longer_rows():
    gradients = []
    for factor in (1.0, 4.0):
        head = new_head(Comm.solo(), config_of("sampled"), 17)
        head.rows.mul_(factor)
        features, labels = batch_of(0, 17)
        active = head.active(labels, 0)
        statistics = prototype_statistics(
            *(features.float(), labels, active, head.comm, OPTIONS.logits)
        )
        multilabel_loss(statistics, OPTIONS).loss.backward()
        gradient = active.rows.grad
        size = gradient.norm(dim=1) * active.rows.norm(dim=1)
        assert ((gradient * active.rows).sum(1).abs() < 1e-5 * size.max()).all()
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1] * 4, rtol=1e-4, atol=1e-5)


def test_an_untouched_step_and_a_refused_one_change_nothing():
    head = new_head(Comm.solo(), config_of("sampled", optimizer="adamw"), 17)
    features, labels = batch_of(0, 17)
    take_step(head, features, labels, torch.ones(7, dtype=torch.bool), 0)
    before = {name: value.clone() for name, value in head._fields().items()}
    active = head.active(labels, 0)
    before["rows"] = head.rows.clone()
    active.rows.sum().backward()
    assert head.gradients_finite()
    head.after_step(0, applied=False, learning_rate_factor=1.0)
    head.after_step(0, applied=True, learning_rate_factor=1.0)
    with torch.no_grad():
        head.active(labels, 0)
    assert head.gradients_finite()
    head.after_step(0, applied=True, learning_rate_factor=1.0)
    for name in ("rows", "exp_avg", "exp_avg_sq", "steps"):
        assert torch.equal(before[name], head._fields()[name]), name


def test_offload_changes_no_bit():
    for optimizer in ("adamw", "sgd"):
        one = sharded_steps(Comm.solo(), "sampled", optimizer=optimizer)
        other = sharded_steps(Comm.solo(), "offload", optimizer=optimizer)
        assert torch.equal(one["rows"], other["rows"])


@pytest.mark.parametrize(("world_size", "group_size"), [(2, 1), (4, 2)])
def test_groups_with_copies_of_the_table_average_their_gradients(world_size, group_size):
    """The objective is the mean over groups, each comparing its own samples with the sample."""
    ranks = run_ranks(grouped_steps, world_size, group_size)
    expected = dense_steps("sampled", num_groups=world_size // group_size)
    for rank in ranks:
        torch.testing.assert_close(rank["rows"], expected["rows"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            rank["gradients"], expected["gradients"] * world_size, rtol=1e-3, atol=1e-6
        )
    names = Counter(name for rank in ranks for name in rank["share"])
    assert set(names.values()) == {1}
    covered = {n for name in names if name.startswith("rows/") for n in range(*bounds(name))}
    assert covered == set(range(17))


def bounds(name: str) -> tuple[int, int]:
    first, last = name.rpartition("/")[2].split("-")
    return int(first), int(last)


def grouped_steps(comm: Comm, group_size: int) -> dict[str, Any]:
    head = new_head(comm, config_of("sampled", group_size=group_size), 17)
    gradients = []
    for step in range(STEPS):
        features, present = share_of(comm, batch_of(step, 17, 8)[0], 0.0)
        labels, _ = share_of(comm, batch_of(step, 17, 8)[1], -1)
        _, gradient = take_step(head, features, labels, present, step)
        gradients.append(comm.gather_rows(gradient))
    share = [name for name, _ in head.state_share()]
    head._optimizer.settle(None)
    rows = head.comm.gather_rows(head.rows)
    return {"rows": rows, "gradients": torch.stack(gradients), "share": share}


def test_a_label_out_of_range_raises_on_every_rank():
    assert run_ranks(label_out_of_range, 2) == ["raised"] * 2


def label_out_of_range(comm: Comm) -> str:
    head = new_head(comm, config_of("sampled"), 17)
    labels = torch.full((2, 3), -1)
    if comm.rank == 1:
        labels[1, 2] = 17
    with pytest.raises(DataError, match="1 labels are not below the number of prototypes, 17"):
        head.active(labels, 0)
    return "raised"


def test_group_sizes_that_do_not_divide_the_ranks_are_refused():
    with pytest.raises(ConfigError, match="group_size 2 does not divide 1 ranks"):
        new_head(Comm.solo(), config_of("sampled", group_size=2), 17)


# -- tables from files --------------------------------------------------------------------------


def test_a_table_from_a_file_keeps_its_directions(tmp_path):
    table = torch.randn(17, 6, dtype=torch.float64)
    path = tmp_path / "centroids.safetensors"
    safetensors.torch.save_file({"centroids": table, "counts": torch.ones(17)}, path)
    for rank in [Comm(rank, 3, torch.device("cpu")) for rank in range(3)]:
        first, last = rank.row_range(17)
        rows = stored(path, first, last)
        directions = torch.nn.functional.normalize(table[first:last]).float()
        torch.testing.assert_close(torch.nn.functional.normalize(rows), directions)
        torch.testing.assert_close(rows.norm(dim=1), torch.full((last - first,), 0.01 * 6**0.5))
    head = new_head(Comm.solo(), config_of("sampled", init=path), 17)
    assert torch.equal(head.rows, stored(path, 0, 17))


def stored(path: Path, first: int, last: int) -> Tensor:
    from trainer.parts.initial_rows import stored_rows

    return stored_rows(path, first, last, shape=(17, 6), deviation=0.01)


def test_files_without_such_a_table_are_refused(tmp_path):
    path = tmp_path / "centroids.safetensors"
    with pytest.raises(ConfigError, match="can't read the prototypes"):
        stored(path, 0, 17)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="can't read the prototypes"):
        stored(path, 0, 17)
    safetensors.torch.save_file({"other": torch.ones(16, 6)}, path)
    with pytest.raises(ConfigError, match="0 tables of 17 x 6"):
        stored(path, 0, 17)
    safetensors.torch.save_file({"zero": torch.zeros(17, 6)}, path)
    with pytest.raises(ConfigError, match="has no direction"):
        stored(path, 0, 17)


# -- checkpoints --------------------------------------------------------------------------------

ADAMW = {"optimizer": "adamw", "learning_rate": 0.003, "weight_decay": 0.1}


def steps_of(comm: Comm, head: Any, steps: range) -> None:
    for step in steps:
        features, present = share_of(comm, batch_of(step, 17)[0], 0.5)
        labels, _ = share_of(comm, batch_of(step, 17)[1], -1)
        take_step(head, features, labels, present, step)


def uninterrupted(comm: Comm, changes: dict[str, Any]) -> dict[str, Tensor]:
    head = new_head(comm, config_of("sampled", **changes), 17)
    steps_of(comm, head, range(8))
    return whole_state(head)


def save_in_the_middle(comm: Comm, folder: Path, changes: dict[str, Any]) -> dict[str, Tensor]:
    head = new_head(comm, config_of("sampled", **changes), 17)
    steps_of(comm, head, range(5))
    pieces = list(row_ranges.row_pieces(head._fields(), first=head.row_range[0], piece_bytes=48))
    share = [*pieces, *[(n, v) for n, v in head.state_share() if "/" not in n]]
    Checkpointer(folder, comm).save(5, {"parts": iter(share)}, {}, {})
    steps_of(comm, head, range(5, 8))
    return whole_state(head)


class Counted(Mapping[str, Tensor]):
    """Which tensors of a checkpoint are read."""

    def __init__(self, whole: Mapping[str, Tensor]) -> None:
        self.whole, self.read = whole, []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)


def load_and_go_on(comm: Comm, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """With another seed: the sampler goes on with the checkpoint's."""
    restored = Checkpointer(folder, comm).latest()
    assert restored is not None
    counted = Counted(restored.lazily("parts"))
    head = new_head(comm, config_of("sampled", **changes), 17, seed=SEED + 1)
    head.load_state_dict(counted)
    steps_of(comm, head, range(5, 8))
    return {"read": counted.read, "range": head.row_range, **whole_state(head)}


@pytest.mark.parametrize(
    "changes", [ADAMW, {"momentum": 0.9}, ADAMW | {"dense": True}], ids=["adamw", "sgd", "dense"]
)
def test_saved_at_four_ranks_goes_on_at_any_number(tmp_path, changes):
    saved = run_ranks(save_in_the_middle, 4, tmp_path, changes)[0]
    expected = uninterrupted(Comm.solo(), changes)
    compare(saved, expected)
    compare(load_and_go_on(Comm.solo(), tmp_path, changes), expected)
    for rank in run_ranks(load_and_go_on, 3, tmp_path, changes):
        compare(rank, expected)
        first, last = rank["range"]
        for name in rank["read"]:
            if "/" in name:
                begin, end = bounds(name)
                assert begin < last
                assert end > first
    for rank in run_ranks(load_and_go_on, 4, tmp_path, changes):
        assert all(torch.equal(rank[name], value) for name, value in saved.items())


def compare(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        if value.dtype == torch.int32:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_checkpoint_of_another_head_is_refused():
    head = new_head(Comm.solo(), config_of("sampled"), 17)
    state = dict(head.state_share())
    with pytest.raises(CheckpointError, match="17 prototypes of 6 numbers, this one 16 of 6"):
        new_head(Comm.solo(), config_of("sampled"), 16).load_state_dict(state)
    with pytest.raises(CheckpointError, match="0 of the 17 rows of exp_avg"):
        new_head(Comm.solo(), config_of("sampled", **ADAMW), 17).load_state_dict(state)
    state["rows/0000000000-0000000017"] = torch.zeros(17, 5)
    with pytest.raises(CheckpointError, match="another head"):
        head.load_state_dict(state)
