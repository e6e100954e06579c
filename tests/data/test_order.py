"""Order and shares against their definitions: exactly once per epoch, whatever the layout."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import Order, Share
from trainer.errors import DataError

sizes_of_shards = st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(sum)


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes_of_shards,
    seed=st.integers(0, 5),
    window=st.integers(1, 25),
    world_size=st.integers(1, 4),
    per_rank=st.integers(1, 7),
)
def test_every_sample_once_per_epoch_over_all_ranks(sizes, seed, window, world_size, per_rank):
    order = Order(sizes, seed=seed, window_shards=window)
    global_batch = world_size * per_rank
    batches = -(-2 * sum(sizes) // global_batch)
    seen: Counter[tuple[int, int]] = Counter()
    for rank in range(world_size):
        share = Share(global_batch, world_size, rank)
        seen.update(order.at(share.position(n)) for n in range(batches * per_rank))
    for epoch in range(2):
        assert all(seen[epoch, index] == 1 for index in range(sum(sizes)))
    assert sum(seen.values()) == batches * global_batch


@settings(max_examples=100, deadline=None)
@given(sizes=sizes_of_shards, window=st.integers(1, 25), seed=st.integers(0, 5))
def test_a_window_of_shards_is_finished_before_the_next_begins(sizes, window, seed):
    order = Order(sizes, seed=seed, window_shards=window)
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    visited = [shard_of[order.at(p)[1]] for p in range(order.epoch_size)]
    rank_of_shard = {shard: n for n, shard in enumerate(order._epoch(0)[0].tolist())}
    windows = [rank_of_shard[shard] // window for shard in visited]
    assert windows == sorted(windows)


@pytest.mark.heavy
@settings(max_examples=100, deadline=None)
@given(
    sizes=sizes_of_shards,
    window=st.integers(1, 6),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 5),
)
def test_groups_of_ranks_read_windows_of_their_own(sizes, window, groups, per_group):
    """Every sample once an epoch; a group reads another's window only when its own is used up."""
    batch = groups * per_group
    order = Order(sizes, seed=3, window_shards=window, groups=groups, global_batch=batch)
    for epoch in range(2):
        begin = epoch * order.epoch_size
        found = [order.at(begin + p)[1] for p in range(order.epoch_size)]
        assert sorted(found) == list(range(sum(sizes)))
        shard_of = np.repeat(np.arange(len(sizes)), sizes)[found]
        place = np.argsort(order._epoch(epoch)[0])[shard_of]  # of the shard in the epoch
        together = place // (window * groups)
        assert (np.diff(together) >= 0).all()
        for number in np.unique(together):
            rows = np.flatnonzero(together == number)
            wanted = (begin + rows) % batch // per_group
            own = place[rows] // window % groups
            for group in range(groups):
                strangers = np.flatnonzero((wanted == group) & (own != group))
                mine = np.flatnonzero((wanted == group) & (own == group))
                assert not len(strangers) or not len(mine) or strangers[0] > mine[-1]


def test_one_group_is_the_order_without_groups_and_a_batch_has_to_divide():
    sizes = [5, 9, 2, 7, 30]
    plain = Order(sizes, seed=1, window_shards=2)
    one = Order(sizes, seed=1, window_shards=2, groups=1, global_batch=12)
    assert [plain.at(p) for p in range(120)] == [one.at(p) for p in range(120)]
    with pytest.raises(DataError, match="window_groups is 5, which does not divide"):
        Order(sizes, seed=1, window_shards=2, groups=5, global_batch=12)


def test_positions_can_be_asked_in_any_order():
    sizes = [3, 0, 17, 50, 1, 9, 0, 22]
    forward = Order(sizes, seed=1, window_shards=2)
    expected = [forward.at(p) for p in range(3 * forward.epoch_size)]
    backward = Order(sizes, seed=1, window_shards=2)
    found = [backward.at(p) for p in reversed(range(3 * backward.epoch_size))]
    assert found == expected[::-1]
    assert max(len(backward._epochs), len(backward._windows)) <= 4


@pytest.mark.heavy
def test_epochs_and_seeds_differ():
    sizes = [40, 40, 40]
    orders = {
        (seed, epoch): tuple(
            Order(sizes, seed=seed, window_shards=2).at(epoch * 120 + p)[1] for p in range(120)
        )
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == len(orders)


@given(
    world_size=st.integers(1, 5),
    per_rank=st.integers(1, 6),
    start=st.integers(0, 100),
    count=st.integers(0, 100),
)
def test_shares_split_any_range(world_size, per_rank, start, count):
    shares = [Share(world_size * per_rank, world_size, rank) for rank in range(world_size)]
    found = []
    for share in shares:
        first, last = share.count_before(start), share.count_before(start + count)
        found.append([share.position(number) for number in range(first, last)])
        owners = {p % share.global_batch // per_rank for p in found[-1]}
        assert owners <= {share.rank}
    assert sorted(p for part in found for p in part) == list(range(start, start + count))
    assert shares[0].rows_padded(start, start + count) == max(map(len, found))


def test_an_epoch_holds_each_sample_as_often_as_its_weight_says():
    """Whole parts exactly, of a fraction its share of a shard, in turns; visits are different."""
    sizes, weights = [12, 8, 0, 5], [2.5, 0.25, 3.0, 1.0]
    order = Order(sizes, seed=4, window_shards=2, weights=weights)
    assert order.epoch_size == 12 * 2 + 6 + 2 + 0 + 5
    shard_of = np.repeat(np.arange(4), sizes)
    total: Counter[int] = Counter()
    visits: set[tuple[int, int]] = set()
    for epoch in range(4):
        places = [order.at(epoch * order.epoch_size + p) for p in range(order.epoch_size)]
        counts = Counter(index for _, index in places)
        by_shard = [[counts[i] for i in np.flatnonzero(shard_of == s)] for s in range(4)]
        assert sorted(by_shard[0]) == [2] * 6 + [3] * 6
        assert sorted(by_shard[1]) == [0] * 6 + [1] * 2
        assert by_shard[3] == [1] * 5
        total += counts
        visits |= set(places)
    assert [total[i] for i in range(12)] == [10] * 12
    assert [total[i] for i in range(12, 20)] == [1] * 8
    assert len(visits) == 4 * order.epoch_size
    plain = Order(sizes, seed=4, window_shards=2)
    ones = Order(sizes, seed=4, window_shards=2, weights=[1.0] * 4)
    assert [plain.at(p) for p in range(100)] == [ones.at(p) for p in range(100)]
