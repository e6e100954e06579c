"""Pictures of a run: python tools/pictures.py WORKDIR [key=value ...]. Writes WORKDIR/pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import run_command
from trainer.programs.workdir_pictures import inspect_workdir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for folders that have moved")
    arguments = parser.parse_args()
    written = inspect_workdir(arguments.workdir.expanduser(), arguments.overrides)
    for path in written:
        if path is not None:
            print(path)


if __name__ == "__main__":
    run_command(main)
