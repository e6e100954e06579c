"""Tags by a pair's own prompts: thresholds have the asked precision, and counts follow them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.curation.corpus import pair, questions, write_corpus
from tests.models.small import WORDS
from trainer.comm import Comm
from trainer.concepts import Bank, Counts
from trainer.curation.languages import Languages
from trainer.curation.scan import scan
from trainer.curation.tagger import (
    Tagger,
    calibrate,
    class_vectors,
    read_thresholds,
    save_thresholds,
)
from trainer.errors import ConfigError, DataError

BANK = Bank.of_names(WORDS[:5])


def test_thresholds_have_the_asked_precision_and_the_lowest_such_is_taken(tmp_path):
    draw = torch.Generator().manual_seed(0)
    classes = normalize(torch.randn(5, 16, generator=draw), dim=1)
    labels = torch.arange(400) % 4  # nothing shows the fifth
    noise = torch.randn(400, 16, generator=draw) / 3
    images = normalize(classes[labels] + noise, dim=1)
    shows = torch.nn.functional.one_hot(labels, 5).bool().numpy()
    found = calibrate(images, labels.numpy(), classes, precision=0.9)
    assert np.isinf(found[4])
    scores = (images @ classes.T).numpy()
    for concept in range(4):
        tagged = scores[:, concept] >= found[concept]
        assert shows[tagged, concept].mean() >= 0.9
        lower = scores[:, concept][scores[:, concept] < found[concept]]
        for threshold in np.sort(lower)[::-1]:
            assert shows[scores[:, concept] >= threshold, concept].mean() < 0.9
    save_thresholds(tmp_path / "t.json", BANK, found, {"templates": ["{}"]})
    again, templates = read_thresholds(tmp_path / "t.json", BANK)
    assert (again.tolist(), templates) == (found.tolist(), ["{}"])
    with pytest.raises(DataError, match="has no threshold of 1 concepts"):
        read_thresholds(tmp_path / "t.json", Bank.of_names(WORDS[:6]))


@pytest.mark.heavy
def test_a_higher_threshold_tags_no_more_and_joint_counts_are_under_both(tmp_path):
    spec = write_corpus(tmp_path / "data")
    classes = class_vectors(BANK.names, ["{}"], pair().text_vectors)
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(5))
    before = np.full(5, 10**9)
    for level in (-1.0, -0.1, 0.0, 0.1, 1.1):
        tagger = Tagger(classes, np.full(5, level))
        ask = questions()._replace(tagger=tagger)
        out = tmp_path / str(level)
        totals = scan(spec, out, ask, Comm.solo())
        counts, _ = Counts.open(out / "concepts" / "counts.safetensors")
        assert (counts.image <= before).all()
        assert (counts.joint <= np.minimum(counts.any_text, counts.image)).all()
        before = counts.image
        figures = totals["concepts"]
        assert figures["tagged"] == 18
        if level == -1.0:
            assert figures["misaligned"] == 0
        if level == 1.1:
            assert figures["misaligned"] == 18
            assert figures["misaligned_of_both_share"] is None
    assert json.loads((out / "scan.json").read_text())["concepts"] == figures


def test_languages_are_told_by_a_package_or_refused_in_a_sentence():
    try:
        import py3langid  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install py3langid"):
            Languages(wanted=True)
        return
    languages = Languages(wanted=True)
    number = languages.of("Das ist ein Haus, in dem viele Leute wohnen und arbeiten.")
    assert languages.names[number] == "de"
    assert languages.of("") == 0
