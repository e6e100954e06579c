"""Write a run's newest weights for transformers: python tools/export.py WORKDIR [--out FOLDER]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.checkpoint import Checkpointer
from trainer.comm import Comm
from trainer.config import parse_run
from trainer.errors import CheckpointError, TrainerError
from trainer.export import export_model, rebuild_model
from trainer.run import tokenizer_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path, help="of a run: the folder that has checkpoints/")
    parser.add_argument("--out", type=Path, help="WORKDIR/export where not given")
    parser.add_argument("--data-licence", help="a sentence for the model card")
    arguments = parser.parse_args()
    comm = Comm.solo()
    restored = Checkpointer(arguments.workdir / "checkpoints", comm).latest()
    if restored is None:
        raise CheckpointError(f"{arguments.workdir}/checkpoints holds no checkpoint to export")
    workdir = [f"workdir={arguments.workdir}"]
    run = parse_run(restored.texts["run.yaml"], workdir, source=f"{restored.folder}/run.yaml")
    tokenizer = tokenizer_of(run, comm)
    model = rebuild_model(run, dict(restored.tensors("weights")), tokenizer)
    out = arguments.out or arguments.workdir / "export"
    exported = export_model(model, tokenizer, out, data_licence=arguments.data_licence)
    kind = "CLIPModel" if exported.is_clip else f"towers apart ({exported.why_not_clip})"
    print(f"step {restored.step} -> {exported.folder}: {kind}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
