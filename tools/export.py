"""Write a run's newest weights for other programs, and compare what those make of them.

Examples:
  python tools/export.py runs/quickstart
  python tools/export.py runs/mine --out models/mine --open-clip --onnx
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.utils.logging import disable_progress_bar

from trainer.comm import Comm
from trainer.command import parser_of, run_command
from trainer.config import Weights
from trainer.errors import TrainerError
from trainer.evals.table import format_table
from trainer.export.card_facts import (
    figures_section,
    front_matter,
    origin_section,
    readable_by_others,
    stated_licences,
)
from trainer.export.equality import WHAT, compare_forms
from trainer.export.onnx_files import refuse_missing_packages
from trainer.export.transformers_folder import Exported, export_model
from trainer.long_work import tell
from trainer.programs.workdir import Trained, logged_results, open_workdir
from trainer.store.header import HEADER, Identity, read_header


def main() -> None:
    arguments = _parser().parse_args()
    disable_progress_bar()
    if arguments.onnx:
        refuse_missing_packages()
    workdir = arguments.workdir.expanduser()
    tell(f"reading the newest checkpoint in {workdir}")
    trained = open_workdir(workdir, Comm.solo(), arguments.overrides, weights=arguments.weights)
    exported = export_model(
        trained.model,
        trained.tokenizer,
        arguments.out.expanduser() if arguments.out else workdir / "export",
        data_licence=arguments.data_licence or stated_licences(trained.run.data.train),
        texts=_texts(trained.run.recipe),
        open_clip=arguments.open_clip,
        onnx=arguments.onnx,
    )
    forms = ("open_clip",) * arguments.open_clip + ("onnx",) * arguments.onnx
    _complete_card(exported, trained, workdir, forms)
    readable_by_others(exported.folder)
    reason = f" ({exported.why_apart})" if exported.why_apart else ""
    which = "" if arguments.weights == "trained" else f", {arguments.weights} weights"
    step = f"step {trained.restored.step}{which}"
    print(f"{step} -> {exported.folder}: {exported.loads_as}{reason}")
    if exported.beside:
        print(exported.beside)
    tell(f"comparing what each form gives: {WHAT}")
    for compared in compare_forms(
        trained.model, trained.tokenizer, exported.folder, loads_as=exported.loads_as
    ):
        print(compared)


def _complete_card(
    exported: Exported, trained: Trained, workdir: Path, forms: tuple[str, ...]
) -> None:
    """Front matter above, figures and origin below what the model itself tells."""
    step, card = trained.restored.step, exported.folder / "README.md"
    try:
        results = logged_results(workdir)
        table = format_table(results) if results else ""
    except (TrainerError, OSError):
        table = ""
    card.write_text(
        front_matter(exported.loads_as, forms=forms)
        + card.read_text()
        + figures_section(table, step=step)
        + origin_section(workdir, step=step)
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("workdir", type=Path, help="of a run: the folder that has checkpoints/")
    parser.add_argument("overrides", nargs="*", help="key=value, for folders that have moved")
    parser.add_argument("--out", type=Path, help="WORKDIR/export where not given")
    parser.add_argument("--weights", choices=get_args(Weights), default="trained")
    parser.add_argument("--open-clip", action="store_true", help="as open_clip loads it, too")
    parser.add_argument("--onnx", action="store_true", help="a graph of each tower, too")
    parser.add_argument(
        "--data-licence", help="a sentence for the model card, instead of what the samples state"
    )
    return parser


def _texts(recipe: Any) -> Identity | None:
    """Which vectors the run learned from, where it did and they are still there."""
    store = getattr(recipe, "store", None)
    header = None if store is None else read_header(Path(store) / HEADER)
    return None if header is None else header.identity


if __name__ == "__main__":
    run_command(main)
