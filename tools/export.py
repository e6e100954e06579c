"""Write a run's newest weights for transformers: python tools/export.py WORKDIR [--out FOLDER]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.utils.logging import disable_progress_bar

from trainer.comm import Comm
from trainer.command import run_command
from trainer.config import Weights
from trainer.export.transformers_folder import export_model
from trainer.programs.workdir import open_workdir
from trainer.store.header import HEADER, Identity, read_header


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path, help="of a run: the folder that has checkpoints/")
    parser.add_argument("overrides", nargs="*", help="key=value, for folders that have moved")
    parser.add_argument("--out", type=Path, help="WORKDIR/export where not given")
    parser.add_argument("--weights", choices=get_args(Weights), default="trained")
    parser.add_argument("--data-licence", help="a sentence for the model card")
    arguments = parser.parse_args()
    disable_progress_bar()
    workdir = arguments.workdir.expanduser()
    trained = open_workdir(workdir, Comm.solo(), arguments.overrides, weights=arguments.weights)
    exported = export_model(
        trained.model,
        trained.tokenizer,
        arguments.out.expanduser() if arguments.out else workdir / "export",
        data_licence=arguments.data_licence,
        texts=_texts(trained.run.recipe),
    )
    reason = f" ({exported.why_apart})" if exported.why_apart else ""
    which = "" if arguments.weights == "trained" else f", {arguments.weights} weights"
    step = f"step {trained.restored.step}{which}"
    print(f"{step} -> {exported.folder}: {exported.loads_as}{reason}")
    if exported.beside:
        print(exported.beside)


def _texts(recipe: Any) -> Identity | None:
    """Which vectors the run learned from, where it did and they are still there."""
    store = getattr(recipe, "store", None)
    header = None if store is None else read_header(Path(store) / HEADER)
    return None if header is None else header.identity


if __name__ == "__main__":
    run_command(main)
