"""Which pair of the large corpus trains and which one tests; the small one's splits stay.

train-more-emoji          emoji by four further vendors
train-more-flag           flags of countries by three
train-more-icon           line and solid icons
train-more-color          icons and clip art in several colours
val-more-icon             the new vendors' drawings of names that no training split has
test-unseen-icon-vendor   Iconoir's drawings of names that other vendors' icons train

No picture of a test trains, and nothing new trains whose name is that of an emoji kept out of
training.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from trainer.data.corpus.emoji_names import EmojiNames
from trainer.data.corpus.pairs import Pair, fraction
from trainer.data.corpus.pictures import pixel_hash, render_svg
from trainer.data.corpus.splits import (
    NEAR_SUBGROUPS,
    UNSEEN_ICON_NAMES,
    is_training,
    is_unseen,
)

TEST_ICON_VENDOR = "iconoir"
_EMPTY = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'


def squeezed(name: str) -> str:
    """Letters and digits alone: how names are compared that vendors space each in their way."""
    return re.sub("[^a-z0-9]", "", name.lower())


def held_out_names(names: EmojiNames) -> frozenset[str]:
    """Names of the emoji that no training split of the small corpus has."""
    found: set[str] = set()
    for key, entry in names.entries.items():
        concept = names.concept_of(key)
        if entry.subgroup in NEAR_SUBGROUPS or is_unseen(concept):
            found |= {squeezed(name) for name in (entry.name, *names.aliases.get(key, []))}
    return frozenset(found)


def assign_more(
    pairs: Sequence[Pair],
    small: Mapping[str, Sequence[Pair]],
    held_out: frozenset[str],
    dropped: Counter[str],
) -> dict[str, list[Pair]]:
    """Splits of the new pairs; those of the small corpus stay what they are."""
    trained = {p.concept for split, of in small.items() if is_training(split) for p in of}
    trained |= {p.concept for p in pairs if _trains(p, held_out)}
    splits: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if split := _split_of(pair, held_out, trained):
            splits[split].append(pair)
        else:
            dropped[f"{pair.vendor}: fits no split"] += 1
    _drop_copies(splits, small, dropped)
    return {
        split: sorted(splits[split], key=lambda pair: fraction("order", pair.vendor, pair.key))
        for split in sorted(splits)
    }


def _trains(pair: Pair, held_out: frozenset[str]) -> bool:
    return str(_split_of(pair, held_out, frozenset())).startswith("train")


def _split_of(pair: Pair, held_out: frozenset[str], trained: Iterable[str]) -> str | None:
    if pair.domain == "emoji":
        kept_out = pair.facts["subgroup"] in NEAR_SUBGROUPS or is_unseen(pair.concept)
        if kept_out:
            return None
        return "train-more-flag" if pair.facts["group"] == "flags" else "train-more-emoji"
    unseen = fraction("unseen icon name", pair.concept) < UNSEEN_ICON_NAMES
    if pair.vendor == TEST_ICON_VENDOR:
        return "test-unseen-icon-vendor" if pair.concept in trained and not unseen else None
    if squeezed(pair.facts["name"]) in held_out:
        return None
    return "val-more-icon" if unseen else f"train-more-{pair.domain}"


def _drop_copies(
    splits: dict[str, list[Pair]], small: Mapping[str, Sequence[Pair]], dropped: Counter[str]
) -> None:
    """Takes out empty pictures, pictures of a test, and a second copy under the same name."""
    empty = pixel_hash(render_svg(_EMPTY))
    tested = {p.pixels for split, of in small.items() if not is_training(split) for p in of}
    seen = {(p.pixels, p.concept) for of in small.values() for p in of}
    for split in sorted(splits, key=lambda name: not is_training(name)):
        kept = []
        for pair in splits[split]:
            if reason := _reason_to_drop(pair, empty, tested, seen):
                dropped[f"{split}: {reason}"] += 1
            else:
                seen.add((pair.pixels, pair.concept))
                kept.append(pair)
        splits[split] = kept
    trained = {p.pixels for split, of in _training(splits, small) for p in of}
    for split in splits:
        if not is_training(split):
            fresh = [pair for pair in splits[split] if pair.pixels not in trained]
            dropped[f"{split}: same pixels as a training picture"] += len(splits[split]) - len(
                fresh
            )
            splits[split] = fresh


def _training(*corpora: Mapping[str, Sequence[Pair]]) -> Iterator[tuple[str, Sequence[Pair]]]:
    return ((split, of) for each in corpora for split, of in each.items() if is_training(split))


def _reason_to_drop(
    pair: Pair, empty: str, tested: set[str], seen: set[tuple[str, str]]
) -> str | None:
    if pair.pixels == empty:
        return "nothing to be seen"
    if pair.pixels in tested:
        return "same pixels as a picture of a test"
    if (pair.pixels, pair.concept) in seen:
        return "the same picture under the same name"
    return None
