"""One evaluation's lead over another, where both are measured together."""

from __future__ import annotations

import pytest
import yaml

from tests.evals.rank_cases import setting
from tests.fixtures.emoji import write_shards
from trainer.comm import Comm
from trainer.config import EvalConfig, parse_run
from trainer.errors import ConfigError
from trainer.evals import evaluate_all, evaluate_each

SOLO = Comm.solo()
RUN = {"workdir": "w", "steps": 1, "global_batch": 2, "data": {"train": "a.tar"}}
RUN |= {"recipe": {"name": "clip", "model": {"preset": "tiny", "text_length": 8}}}


def test_the_gap_is_the_other_accuracy_less_its_own(tmp_path):
    spec = write_shards(tmp_path / "data", count=60, per_shard=60)
    model, context = setting(SOLO, spec)
    one = EvalConfig(name="zero_shot", label="wide", data=spec, target="group")
    two = EvalConfig(name="zero_shot", label="wag", data=spec, target="name", gap_to="wide")
    found = evaluate_all([one, two], model, context)
    assert found["wag"]["gap"] == found["wide"]["top1"] - found["wag"]["top1"] != 0
    assert "gap" not in found["wide"]
    each = {
        result.config.label: result.figures for result in evaluate_each([one, two], model, context)
    }
    assert each == found


def test_a_gap_to_what_is_not_measured_with_it_is_refused():
    first = {"name": "zero_shot", "label": "wide", "data": "b.tar"}
    second = {"name": "zero_shot", "label": "wag", "data": "c.tar", "gap_to": "wide"}
    assert parse_run(yaml.safe_dump({**RUN, "evals": [first, second]})).evals[1].gap_to == "wide"
    wrong = ([second, first], [second], [{**first, "every": "5 steps"}, second])
    for entries in wrong:
        with pytest.raises(ConfigError, match="stands before it and has the same"):
            parse_run(yaml.safe_dump({**RUN, "evals": entries}))
