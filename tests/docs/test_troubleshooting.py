"""No sentence ends a program that the page does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.programs.troubleshooting_page import first_words, messages, troubleshooting_page

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


@pytest.mark.heavy
def test_every_message_of_the_code_stands_in_the_page():
    written = " ".join(PAGE.read_text().split())
    found = list(messages())
    assert len(found) > 200, "the search finds the code's messages"
    missing = [m.text for m in found if first_words(m.text) not in written]
    assert missing == [], "run: python tools/pages.py"
    assert PAGE.read_text() == troubleshooting_page(), "run: python tools/pages.py"


def test_the_words_by_which_a_message_is_looked_up_are_its_own():
    assert first_words("... is not YAML: ...") == "is not YAML:"
    assert first_words("a short one") == "a short one"
