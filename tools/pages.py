"""Write the pages that are made from the code: configuration, schema, troubleshooting.

Example: python tools/pages.py     (after a key or an error's sentence was added or changed)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import parser_of, run_command
from trainer.programs.configuration_page import configuration_page
from trainer.programs.run_schema import run_schema
from trainer.programs.troubleshooting_page import troubleshooting_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {
    "configuration.md": configuration_page,
    "run.schema.json": run_schema,
    "troubleshooting.md": troubleshooting_page,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder; docs/ by default")
    out = parser.parse_args().out
    for name, page in PAGES.items():
        (out / name).write_text(page())
        print(out / name)


if __name__ == "__main__":
    run_command(main)
