"""Command lines that launchers start: what their own parsers do to the options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.mark.parametrize("tool", ["cluster.py", "embed.py", "evaluate.py"])
def test_torchrun_hands_every_option_on(tool: str) -> None:
    """It refuses one that could be short for two of its own, even behind the script's name."""
    options = re.findall(r'add_argument\(\s*"(--[\w-]+)"', (TOOLS / tool).read_text())
    assert len(options) >= 3
    for option in options:
        arguments = get_args_parser().parse_args(["--standalone", tool, option, "value"])
        assert arguments.training_script_args == [option, "value"]
