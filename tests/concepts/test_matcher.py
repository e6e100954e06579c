"""Captions and concepts meet whatever their case, accents, number and script."""

from __future__ import annotations

import importlib.util
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.concepts import Bank, Concept, Lemmas, Matcher, words_of
from trainer.concepts.plurals import singular
from trainer.errors import ConfigError, DataError

ENGLISH = Lemmas("english")
ENGINES = [
    "trie",
    pytest.param(
        "ahocorasick",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("ahocorasick") is None, reason="needs pyahocorasick"
        ),
    ),
]


def matcher(*names: str, engine: str = "trie") -> Matcher:
    return Matcher(Bank.of_names(names), language="en", lemmas=ENGLISH, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("labrador retriever", "Two LABRADOR Retrievers at play"),
        ("Labrador Retriever", "a labrador retriever"),
        ("roses", "a Rose."),
        ("jeans", "blue jean"),
        ("France", "flag of FRANCE"),
        ("café", "CAFE\u0301 in town"),
        ("Straße", "STRASSE at night"),
        ("Boeing 717", "boeing 717-200 on the runway"),
        ("women", "a woman's hat"),
        ("\uff46ull width", "full width"),
        ("t-shirt", "T Shirts"),
        ("knives", "one knife"),
    ],
)
def test_a_concept_is_found_as_a_phrase(name, caption, engine):
    assert matcher(name, engine=engine)(caption) == ((0,), (0,))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("Boeing 717", "a Boeing 747"),
        ("Boeing 717", "a Boeing"),
        ("kite (bird of prey)", "a kite in the sky"),
        ("rose", "roseate spoonbill"),
        ("cat", "concatenate cats-eye".replace("cats", "dogs")),
        ("ear", "year"),
    ],
)
def test_a_concept_of_which_a_word_is_missing_is_not_found(name, caption, engine):
    assert matcher(name, engine=engine)(caption) == ((), ())


def test_a_bag_needs_all_words_in_any_order_and_a_phrase_needs_them_in_a_row():
    find = matcher("red apple", "apple")
    assert find("an apple that is red") == ((1,), (0, 1))
    assert find("a red apple") == ((0, 1), (0, 1))
    assert find("red") == ((), ())


def test_scripts_without_spaces_are_matched_within_a_sentence():
    bank = Bank([Concept("tree", {"ja": ("木",), "th": ("ต้นไม้",)})])
    japanese = Matcher(bank, language="ja", lemmas=Lemmas("none"))
    thai = Matcher(bank, language="th", lemmas=Lemmas("none"))
    assert japanese("大きな木です").phrase == (0,)
    assert thai("ใต้ต้นไม้ใหญ่").phrase == (0,)
    assert japanese("本です").phrase == ()


def test_vowel_signs_belong_to_their_words():
    find = Matcher(
        Bank([Concept("peacock", {"hi": ("मोर",)})]), language="hi", lemmas=Lemmas("none")
    )
    assert find("एक मोर नाच रहा है").phrase == (0,)
    assert find("मार").phrase == ()
    assert words_of("かが", Lemmas("none")) == ("か", "が")


def test_one_form_of_two_concepts_counts_for_both():
    bank = Bank([Concept("a", {"en": ("kite",)}), Concept("b", {"en": ("kites", "red kite")})])
    assert Matcher(bank, language="en", lemmas=ENGLISH)("red kites").phrase == (0, 1)


@pytest.mark.heavy
@given(st.text(min_size=0, max_size=40))
def test_words_do_not_depend_on_case_and_a_second_pass_changes_nothing(text):
    once = words_of(text, ENGLISH)
    assert words_of(" ".join(once), ENGLISH) == once
    assert words_of(text.upper().lower(), ENGLISH) == words_of(text.lower(), ENGLISH)


@given(st.from_regex(r"[a-z]{1,10}(s|es|ses|men|mens|ies)?", fullmatch=True))
def test_a_singular_is_its_own_singular(word):
    assert singular(singular(word)) == singular(word)


@pytest.mark.parametrize(
    "pair",
    ["cat cats", "box boxes", "house houses", "size sizes", "dish dishes", "city cities",
     "cherry cherries", "octopus octopuses", "bus buses", "glass glasses", "woman women",
     "snowman snowmen", "cookie cookies", "leaf leaves", "potato potatoes", "shoe shoes",
     "lens lenses", "watch watches", "horse horses", "bee bees", "tie ties"],
)  # fmt: skip
def test_plural_and_singular_are_one_word(pair):
    one, many = pair.split()
    assert singular(one) == singular(many) == one


@pytest.mark.parametrize("engine", ENGINES)
def test_a_large_bank_finds_what_a_plain_search_finds(engine):
    draw = random.Random(0)
    vocabulary = [f"w{n}x" for n in range(40)]
    names = sorted({" ".join(draw.choices(vocabulary, k=draw.randint(1, 4))) for _ in range(400)})
    find = matcher(*names, engine=engine)
    for _ in range(200):
        words = draw.choices(vocabulary, k=draw.randint(0, 12))
        joined = f" {' '.join(words)} "
        phrases = tuple(i for i, name in enumerate(names) if f" {name} " in joined)
        bags = tuple(i for i, name in enumerate(names) if set(name.split()) <= set(words))
        assert find(" ".join(words)) == (phrases, bags)
        assert set(phrases) <= set(bags)


def test_a_file_of_lemmas_holds_on_both_sides(tmp_path):
    path = tmp_path / "lemmas.tsv"
    path.write_text("Häuser\tHaus\nkatzen\tkatze\n", encoding="utf-8")
    lemmas = Lemmas(str(path))
    bank = Bank([Concept("house", {"de": ("häuser",)})])
    assert Matcher(bank, language="de", lemmas=lemmas)("Das HAUS am Hügel").phrase == (0,)
    path.write_text("a\tb\nb\tc\n")
    with pytest.raises(DataError, match="which has another one itself"):
        Lemmas(str(path))
    path.write_text("a b c\n")
    with pytest.raises(DataError, match="line 1 is not form<TAB>lemma"):
        Lemmas(str(path))
    with pytest.raises(ConfigError, match="can't be read"):
        Lemmas(str(tmp_path / "missing"))


def test_what_can_never_be_found_is_refused():
    with pytest.raises(DataError, match="has no word that could be found"):
        matcher("cat", "¿?")


def test_a_bank_comes_back_as_it_was_saved(tmp_path):
    bank = Bank([Concept("tree", {"en": ("tree", "trees"), "ja": ("木",)}), Concept("x", {})])
    bank.save(tmp_path / "bank.jsonl")
    again = Bank.open(tmp_path / "bank.jsonl")
    assert again.digest == bank.digest
    assert again.languages == ("en", "ja")
    (tmp_path / "names.txt").write_text("cat\n\nred apple\n")
    assert Bank.open(tmp_path / "names.txt").names == ("cat", "red apple")
    (tmp_path / "windows.txt").write_bytes("\ufeffcat\r\n\r\nred\u2028apple\r\n".encode())
    assert Bank.open(tmp_path / "windows.txt").names == ("cat", "red\u2028apple")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cat\ncat\n", "'cat' twice"),
        ("\n", "no concept"),
        ('{"forms": {}}\n', "line 1 is no concept"),
        ('{"name": "a", "forms": {"en": [3]}}\n', "a form is no text"),
        ('{"name": "a", "forms": {"en": "dog"}}\n', "are a list of texts"),
        ('{"name"\n', "line 1 is no concept"),
    ],
)
def test_a_bank_that_makes_no_sense_is_refused(tmp_path, text, reason):
    path = tmp_path / "bank.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        Bank.open(path)
