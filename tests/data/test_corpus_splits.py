"""Splits: what a test may show is never in training, whatever the vendors draw."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.corpus.pairs import Pair, fraction
from trainer.data.corpus.splits import (
    NEAR_SUBGROUPS,
    TRAIN_VENDORS,
    assign_splits,
    choose_held_out,
    is_training,
    is_unseen,
)

VENDORS = ("google", "twemoji", "openmoji")


def emoji(vendor: str, concept: int, tone: bool, look: str) -> Pair:
    """A drawing without pixels of its own: `look` stands for what is seen."""
    subgroup = "clothing" if concept % 7 == 0 else "tool"
    facts = {"subgroup": subgroup, "tone": ["dark"] if tone else []}
    key = f"{concept:x}{'-1f3ff' if tone else ''}"
    return Pair("emoji", vendor, key, f"{concept:x}", b"", look, "", facts)


def icon(vendor: str, name: str, look: str) -> Pair:
    facts = {"subgroup": None, "tone": []}
    return Pair("icon", vendor, name, f"icon:{name}", b"", look, "", facts)


LOOKS = st.integers(0, 30)  # few, so that drawings often coincide
EMOJI = st.tuples(st.sampled_from(VENDORS), st.integers(0, 60), st.booleans())
ICON = st.tuples(st.sampled_from(["mdi", "heroicons"]), st.integers(0, 40))


@st.composite
def corpora(draw: st.DrawFn) -> list[Pair]:
    drawings = draw(st.dictionaries(EMOJI, st.one_of(st.none(), LOOKS), max_size=80))
    icons = draw(st.dictionaries(ICON, st.one_of(st.none(), LOOKS), max_size=30))
    pairs = [
        emoji(*key, str(key) if look is None else f"shared {look}")
        for key, look in drawings.items()
    ]
    pairs += [
        icon(vendor, f"name {name}", f"{vendor} {name}" if look is None else f"shared {look}")
        for (vendor, name), look in icons.items()
    ]
    return pairs


@pytest.mark.heavy
@settings(max_examples=200, deadline=None)
@given(corpora())
def test_no_test_repeats_what_trains(pairs: list[Pair]) -> None:
    dropped: Counter[str] = Counter()
    splits = assign_splits(pairs, dropped)
    trained = [pair for name, own in splits.items() if is_training(name) for pair in own]
    tested = [pair for name, own in splits.items() if not is_training(name) for pair in own]
    assert len(trained) + len(tested) + dropped.total() == len(pairs)
    assert len({(p.vendor, p.key) for p in trained + tested}) == len(trained) + len(tested)
    assert not {pair.pixels for pair in trained} & {pair.pixels for pair in tested}
    assert not {"openmoji", "heroicons"} & {pair.vendor for pair in trained}
    assert not any(pair.toned for pair in tested)
    for pair in trained:
        assert pair.facts["subgroup"] not in NEAR_SUBGROUPS
        assert pair.domain == "icon" or not is_unseen(pair.concept)


@pytest.mark.heavy
@settings(max_examples=200, deadline=None)
@given(corpora())
def test_held_out_drawings_are_known_by_another_one(pairs: list[Pair]) -> None:
    splits = assign_splits(pairs, Counter())
    vendors = defaultdict(set)
    for pair in splits.get("train", []):
        assert not pair.toned
        vendors[pair.concept].add(pair.vendor)
    for pair in splits.get("val", []):
        assert vendors[pair.concept] == set(TRAIN_VENDORS) - {pair.vendor}
        toned = splits.get("train-tone", [])
        assert (pair.vendor, pair.concept) not in {(p.vendor, p.concept) for p in toned}
    for pair in splits.get("test-unseen-vendor", []):
        assert pair.vendor == "openmoji"
        assert vendors[pair.concept]
    for name in ("test-unseen-concepts", "ood-near"):
        assert not {pair.concept for pair in splits.get(name, [])} & set(vendors)
    icons = {pair.concept for pair in splits.get("train-icon", [])}
    assert not icons & {pair.concept for pair in splits.get("val-icon", [])}


@settings(max_examples=50, deadline=None)
@given(corpora(), st.randoms(use_true_random=False))
def test_the_order_of_reading_changes_nothing(pairs: list[Pair], shuffle: random.Random) -> None:
    mixed = list(pairs)
    shuffle.shuffle(mixed)
    assert assign_splits(mixed, Counter()) == assign_splits(pairs, Counter())


def test_shares_are_near_what_they_should_be() -> None:
    pairs = [
        emoji(vendor, concept, False, f"{vendor} {concept}")
        for vendor in VENDORS
        for concept in range(3000)
    ]
    splits = assign_splits(pairs, Counter())
    trainable = {pair.concept for pair in splits["train"]}
    assert abs(len(trainable) / (3000 * 6 / 7) - 0.9) < 0.02
    assert abs(len(splits["val"]) / len(trainable) - 0.135) < 0.02
    by_vendor = Counter(pair.vendor for pair in splits["val"])
    assert abs(by_vendor["google"] / by_vendor.total() - 0.5) < 0.1


def test_a_flag_with_two_names_is_never_held_out() -> None:
    unique = [emoji(v, c, False, f"{v} {c}") for v in TRAIN_VENDORS for c in range(1, 400)]
    chosen = choose_held_out(unique)
    assert chosen
    vendor, concept = sorted(chosen)[0]
    twin = emoji(vendor, 5000, False, f"{vendor} {int(concept, 16)}")
    assert choose_held_out([*unique, twin]) == chosen - {(vendor, concept)}


def test_fractions_are_fixed_for_ever() -> None:
    assert fraction("unseen concept", "1f34e") == 0.036402006740978265
    values = [fraction("spread", str(number)) for number in range(2000)]
    assert abs(sum(values) / 2000 - 0.5) < 0.03
    assert all(0 <= value < 1 for value in values)
