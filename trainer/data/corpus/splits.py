"""Which pair trains and which one tests. Every choice is a hash of names: nothing is drawn.

train                    emoji of Google and Twemoji, no skin tone
train-tone               the same vendors' drawings that differ from another one by skin tone
train-icon               five icon sets
val                      one vendor's drawing of a concept that `train` has from the other vendor
val-icon                 icon names that `train-icon` doesn't have
test-unseen-vendor       OpenMoji's drawings of concepts in `train`
test-unseen-concepts     a tenth of the concepts, by all three vendors
ood-near                 nine whole subgroups, by all three vendors
ood-far-icon-heroicons   an icon set that never trains

Tests hold no skin tones: they would repeat one drawing up to twenty-five times.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from trainer.data.corpus.pairs import Pair, fraction

TRAIN_VENDORS = ("google", "twemoji")
TEST_VENDOR = "openmoji"
FAR_ICON_VENDOR = "heroicons"
NEAR_SUBGROUPS = frozenset(
    {
        "animal-bug",
        "clothing",
        "food-sweet",
        "hand-fingers-closed",
        "musical-instrument",
        "plant-flower",
        "sky-and-weather",
        "time",
        "transport-water",
    }
)
UNSEEN_CONCEPTS = 0.10
UNSEEN_ICON_NAMES = 0.05
HELD_OUT_CONCEPTS = 0.135
"""Share of the concepts drawn by both vendors that give one drawing to `val`; about 205."""


def is_unseen(concept: str) -> bool:
    """Whether the concept is one of those that no training split has."""
    return fraction("unseen concept", concept) < UNSEEN_CONCEPTS


def is_trainable(pair: Pair) -> bool:
    """Whether an emoji's concept may be trained on."""
    return pair.facts["subgroup"] not in NEAR_SUBGROUPS and not is_unseen(pair.concept)


def choose_held_out(pairs: Iterable[Pair]) -> set[tuple[str, str]]:
    """(vendor, concept) of the drawings for `val`.

    A concept qualifies when each training vendor has a drawing of it, the two differ, and no
    other concept looks like either (a few flags are one picture with two names).
    """
    drawings: dict[str, dict[str, str]] = defaultdict(dict)
    looks: Counter[str] = Counter()
    for pair in pairs:
        if pair.domain == "emoji" and pair.vendor in TRAIN_VENDORS:
            looks[pair.pixels] += 1
            if is_trainable(pair) and not pair.toned:
                drawings[pair.concept][pair.vendor] = pair.pixels
    return {
        (TRAIN_VENDORS[fraction("held-out vendor", concept) < 0.5], concept)
        for concept, by_vendor in drawings.items()
        if len(by_vendor) == len(TRAIN_VENDORS)
        and all(looks[pixels] == 1 for pixels in by_vendor.values())
        and fraction("held out", concept) < HELD_OUT_CONCEPTS
    }


def split_of(pair: Pair, held_out: set[tuple[str, str]], trained: set[str]) -> str | None:
    """The split of one pair, or None for a pair that no split may have.

    `trained` are the concepts that `train` has.
    """
    if pair.domain == "icon":
        return _icon_split(pair)
    if pair.toned:
        # a toned drawing of a held-out one would show the model what it's tested on
        trains = pair.vendor in TRAIN_VENDORS and is_trainable(pair)
        return "train-tone" if trains and (pair.vendor, pair.concept) not in held_out else None
    if pair.facts["subgroup"] in NEAR_SUBGROUPS:
        return "ood-near"
    if is_unseen(pair.concept):
        return "test-unseen-concepts"
    if pair.vendor == TEST_VENDOR:
        return "test-unseen-vendor" if pair.concept in trained else None
    return "val" if (pair.vendor, pair.concept) in held_out else "train"


def _icon_split(pair: Pair) -> str:
    if pair.vendor == FAR_ICON_VENDOR:
        return "ood-far-icon-heroicons"
    unseen = fraction("unseen icon name", pair.concept) < UNSEEN_ICON_NAMES
    return "val-icon" if unseen else "train-icon"


def assign_splits(pairs: Sequence[Pair], dropped: Counter[str]) -> dict[str, list[Pair]]:
    """Pairs by split, each in a mixed order; no test shows a picture that trains elsewhere."""
    held_out = choose_held_out(pairs)
    trained = {
        pair.concept
        for pair in pairs
        if pair.domain == "emoji"
        and pair.vendor in TRAIN_VENDORS
        and not pair.toned
        and is_trainable(pair)
    }
    splits: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if split := split_of(pair, held_out, trained):
            splits[split].append(pair)
        else:
            dropped[f"{pair.vendor}: fits no split"] += 1
    _drop_leaks(splits, dropped)
    return {split: _mixed(splits[split]) for split in sorted(splits)}


def is_training(split: str) -> bool:
    return split.startswith("train")


def _drop_leaks(splits: dict[str, list[Pair]], dropped: Counter[str]) -> None:
    seen = {p.pixels for split, pairs in splits.items() if is_training(split) for p in pairs}
    for split, pairs in splits.items():
        if not is_training(split):
            splits[split] = [pair for pair in pairs if pair.pixels not in seen]
            if leaks := len(pairs) - len(splits[split]):
                dropped[f"{split}: same pixels as a training picture"] += leaks


def _mixed(pairs: Sequence[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: fraction("order", pair.vendor, pair.key))
