"""What a stranger has written is shown by TensorBoard as it stands, and is no markup there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of a package inside tensorboard
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

from trainer.log.files import Files
from trainer.types import Progress

HOSTILE = (
    "```\n\n<script>alert(1)</script>\n\n[x](javascript:alert(1)) <img src=x onerror=alert(1)>"
)


def texts(folder: Path) -> list[str]:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    return [e.tensor_proto.string_val[0].decode() for tag in tags for e in events.Tensors(tag)]


def test_a_run_file_with_a_strangers_words_is_code_in_the_page_that_tensorboard_makes(tmp_path):
    (tmp_path / "run.yaml").write_text(f"label: |\n{HOSTILE}\n")
    (tmp_path / "environment.json").write_text(json.dumps([{"command": [HOSTILE]}]))
    files = Files(tmp_path, Progress(), phase_begun=False, tracker=None)
    files.event(Progress(), "evaluation", {"note": HOSTILE}, after_save=False, group="evals")
    files.close()
    found = texts(tmp_path / "tensorboard")
    assert len(found) == 2
    assert all("alert(1)" in text for text in found)
    for page in map(markdown_to_safe_html, found):
        assert "<script" not in page
        assert "<img" not in page
        assert "<a " not in page
        assert page.count("<code>") == page.count("<pre>") == 1
