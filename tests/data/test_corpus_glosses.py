"""Definitions: the sense that fits the picture, from a small dictionary in WordNet's format."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from trainer.data.corpus.emoji_names import Entry
from trainer.data.corpus.glosses import Glosses, long_text

DATA = """\
  1 A licence stands here.
00000100 05 n 02 bat 0 chiropteran 0 001 @ 00000900 n 0000 | nocturnal mouselike mammal with wings
00000200 06 n 01 bat 0 000 | a club used for hitting a ball in various games
00000300 18 n 02 Ball 0 Lucille_Ball 0 000 | United States comedienne (1911-1989)
00000400 06 n 02 ball 0 globe 0 000 | round object that is hit or thrown; "the ball flew"
00000500 18 n 01 monger 0 000 | an offensive word for somebody
00000600 13 n 01 red_berry 0 000 | fruit one
00000700 20 n 01 berry 0 000 | any of numerous small and pulpy edible fruits
00000800 15 n 01 Chad 0 000 | a landlocked desert republic
00000900 05 n 01 mammal 0 001 @ 00001000 n 0000 | any warm-blooded vertebrate
00001000 05 n 01 animal 0 000 | a living organism
"""
INDEX = """\
  1 A licence stands here.
bat n 2 1 @ 2 1 00000200 00000100
ball n 2 0 2 1 00000300 00000400
monger n 1 0 1 1 00000500
red_berry n 1 0 1 1 00000600
berry n 1 0 1 1 00000700
chad n 1 0 1 1 00000800
"""


@pytest.fixture(scope="module")
def glosses(tmp_path_factory: pytest.TempPathFactory) -> Glosses:
    path: Path = tmp_path_factory.mktemp("wordnet") / "source.tar.gz"
    lines = DATA.splitlines(keepends=True)
    parts = {"data.noun1": lines[:5], "data.noun2": lines[5:], "index.noun": [INDEX]}
    with tarfile.open(path, "w:gz") as tar:
        for name, text in parts.items():
            member = tarfile.TarInfo(f"package-1/package/wordnet/dict/{name}")
            data = "".join(text).encode("latin-1")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Glosses.read(path)


def test_every_sense_is_read(glosses: Glosses) -> None:
    assert len(glosses) == 10


def test_the_subgroup_decides_between_senses(glosses: Glosses) -> None:
    animal = glosses.find(Entry("bat", "animals-and-nature", "animal-mammal"), [], [])
    thing = glosses.find(Entry("bat", "objects", "tool"), [], [])
    assert animal is not None
    assert thing is not None
    assert animal.text == "nocturnal mouselike mammal with wings"
    assert (animal.match, animal.synonyms, animal.kinds) == (
        "full",
        ["chiropteran"],
        ["mammal", "animal"],
    )
    assert thing.text == "a club used for hitting a ball in various games"


def test_keywords_decide_where_several_senses_are_allowed(glosses: Glosses) -> None:
    entry = Entry("man bouncing ball", "activities", "sport")
    found = glosses.find(entry, [], ["thrown"])
    assert found is not None
    assert (found.lemma, found.match, found.example) == ("ball", "head", "the ball flew")


def test_a_common_noun_is_never_somebody_of_that_name(glosses: Glosses) -> None:
    assert glosses.find(Entry("person bouncing ball", "people-and-body", "person"), [], []) is None


def test_a_flag_is_looked_up_by_its_country(glosses: Glosses) -> None:
    found = glosses.find(Entry("flag: Chad", "flags", "country-flag"), [], [])
    assert found is not None
    assert (found.lemma, found.match) == ("Chad", "full")


def test_slurs_are_never_attached(glosses: Glosses) -> None:
    assert glosses.find(Entry("monger", "people-and-body", "person-role"), [], []) is None


@pytest.mark.parametrize("group", ["smileys-and-emotion", "symbols", "component"])
def test_phrases_and_signs_get_no_definition(glosses: Glosses, group: str) -> None:
    assert glosses.find(Entry("bat", group, "any"), ["bat"], ["bat"]) is None


@pytest.mark.parametrize(
    ("name", "lemma", "match"),
    [
        ("red berry", "red berry", "full"),
        ("green berries", "berry", "head"),
        ("berry in a bat", "berry", "head"),
    ],
)
def test_the_longest_known_part_of_a_name_is_taken(
    glosses: Glosses, name: str, lemma: str, match: str
) -> None:
    found = glosses.find(Entry(name, "food-and-drink", "food-fruit"), [], [])
    assert found is not None
    assert (found.lemma, found.match) == (lemma, match)


def test_long_captions_hold_every_fact(glosses: Glosses) -> None:
    entry = Entry("bat", "animals-and-nature", "animal-mammal")
    text = long_text(entry, glosses.find(entry, [], []), ["night", "wing"])
    for part in ("bat", "nocturnal mouselike", "chiropteran", "mammal", "night, wing", "animal"):
        assert part in text
    assert long_text(entry, None, []) == (
        "A picture of bat. It is found under animal mammal in animals and nature."
    )
