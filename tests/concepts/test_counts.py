"""Counts are sums: any order, any partition, and what each total stands for."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trainer.concepts import Counts
from trainer.concepts.matcher import Hits
from trainer.errors import DataError

CONCEPTS, LANGUAGES = 7, ("de", "en")


def drawn_samples(count):
    draw = random.Random(3)

    def some():
        return tuple(sorted(draw.sample(range(CONCEPTS), draw.randint(0, 3))))

    samples = []
    for _ in range(count):
        hits = []
        for _ in LANGUAGES:
            phrase = some()
            bag = tuple(sorted({*phrase, *some()}))
            hits.append(Hits(phrase, bag) if draw.random() < 0.8 else None)
        samples.append((hits, some() if draw.random() < 0.7 else None))
    return samples


def counted(samples):
    counts = Counts.none(source="here", languages=LANGUAGES, num_concepts=CONCEPTS)
    for hits, tags in samples:
        counts.add_sample(hits, tags)
    return counts


def equal(a, b):
    return all(
        np.array_equal(x, y) for (_, x), (_, y) in zip(a._arrays(), b._arrays(), strict=True)
    )


def test_any_partition_in_any_order_adds_up_to_the_same():
    samples = drawn_samples(200)
    whole = counted(samples)
    draw = random.Random(4)
    for parts in (1, 2, 5, 200):
        draw.shuffle(samples)
        shards = [counted(samples[start::parts]) for start in range(parts)]
        draw.shuffle(shards)
        none = Counts.none(source="here", languages=LANGUAGES, num_concepts=CONCEPTS)
        assert equal(sum(shards, none), whole)


def test_every_number_is_what_its_name_says():
    samples = drawn_samples(150)
    counts = counted(samples)
    for concept in range(CONCEPTS):
        named = [{c for found in hits if found for c in found.phrase} for hits, _ in samples]
        seen = [set(tags or ()) for _, tags in samples]
        assert counts.any_text[concept] == sum(concept in words for words in named)
        assert counts.image[concept] == sum(concept in tags for tags in seen)
        assert counts.joint[concept] == sum(
            concept in words & tags for words, tags in zip(named, seen, strict=True)
        )
        for place, _ in enumerate(LANGUAGES):
            each = [hits[place] for hits, _ in samples if hits[place] is not None]
            assert counts.text[place, concept] == sum(concept in hit.phrase for hit in each)
            assert counts.bag[place, concept] == sum(concept in hit.bag for hit in each)
    assert (counts.joint <= np.minimum(counts.any_text, counts.image)).all()
    assert (counts.bag >= counts.text).all()
    tagged = [(words, set(tags)) for words, (_, tags) in zip(named, samples, strict=True)
              if tags is not None]  # fmt: skip
    figures = counts.figures()
    assert figures["tagged"] == len(tagged)
    assert figures["misaligned"] == sum(not words & tags for words, tags in tagged)
    both = [(words, tags) for words, tags in tagged if words and tags]
    assert figures["both_have_concepts"] == len(both)
    assert figures["misaligned_of_both_share"] == sum(not w & t for w, t in both) / len(both)


def test_shuffled_captions_are_more_misaligned():
    pairs = [([Hits((n % CONCEPTS,), (n % CONCEPTS,)), None], (n % CONCEPTS,)) for n in range(70)]
    moved = [(pairs[n - 1][0], tags) for n, (_, tags) in enumerate(pairs)]
    assert counted(pairs).figures()["misaligned"] == 0
    assert counted(moved).figures()["misaligned"] == 70


def test_counts_come_back_from_a_file_and_equal_counts_are_equal_bytes(tmp_path):
    counts = counted(drawn_samples(30))
    counts.save(tmp_path / "a", shard="x", index="y")
    counts.save(tmp_path / "b", index="y", shard="x")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again, about = Counts.open(tmp_path / "a")
    assert about == {"shard": "x", "index": "y"}
    assert equal(again, counts)
    with pytest.raises(DataError, match="different banks"):
        again + Counts.none(source="elsewhere", languages=LANGUAGES, num_concepts=CONCEPTS)


def test_no_image_frequency_without_tags():
    counts = counted([([Hits((1,), (1,)), None], None)])
    assert counts.frequency("text").tolist() == [0, 1, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match="no image was tagged"):
        counts.frequency("joint")
    with pytest.raises(DataError, match="no frequency 'words'"):
        counts.frequency("words")


@pytest.mark.parametrize("content", [b"", b"no counts at all", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "counts").write_bytes(content)
    with pytest.raises(DataError, match="holds no counts"):
        Counts.open(tmp_path / "counts")
