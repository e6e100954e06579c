"""Write a run's newest weights for transformers: python tools/export.py WORKDIR [--out FOLDER]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.utils.logging import disable_progress_bar

from trainer.comm import Comm
from trainer.command import run_command
from trainer.export import export_model
from trainer.workdir import open_workdir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path, help="of a run: the folder that has checkpoints/")
    parser.add_argument("--out", type=Path, help="WORKDIR/export where not given")
    parser.add_argument("--data-licence", help="a sentence for the model card")
    arguments = parser.parse_args()
    disable_progress_bar()
    trained = open_workdir(arguments.workdir, Comm.solo())
    exported = export_model(
        trained.model,
        trained.tokenizer,
        arguments.out or arguments.workdir / "export",
        data_licence=arguments.data_licence,
    )
    reason = f" ({exported.why_not_clip})" if exported.why_not_clip else ""
    print(f"step {trained.restored.step} -> {exported.folder}: {exported.loads_as}{reason}")


if __name__ == "__main__":
    run_command(main)
