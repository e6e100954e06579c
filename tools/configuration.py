"""Write docs/configuration.md and docs/run.schema.json from the classes that read a run file.

Example: python tools/configuration.py            (after a key was added or its sentence changed)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import run_command
from trainer.programs.configuration_page import configuration_page
from trainer.programs.run_schema import run_schema

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DOCS, help="folder; docs/ by default")
    out = parser.parse_args().out
    for name, text in (
        ("configuration.md", configuration_page()),
        ("run.schema.json", run_schema()),
    ):
        (out / name).write_text(text)
        print(out / name)


if __name__ == "__main__":
    run_command(main)
