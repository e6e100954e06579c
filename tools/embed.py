"""Compute a frozen teacher's vectors once: a store that training joins by sample id.

  python tools/embed.py --teachers
  python tools/embed.py --data 'shards/train-{000..013}.tar' --out cache/embeddings/minilm
  python tools/embed.py --teacher smollm2 --data SHARDS --out STORE fields='[txt, "long,txt"]'
  python tools/embed.py --teacher llm.yaml --plan
  python tools/embed.py --teacher smollm2 --data SHARDS --out STORE --verify
  python tools/embed.py --teacher runs/quickstart kind=image --views 4 --data SHARDS --out STORE
  python tools/embed.py --teacher smollm2 --class-names RUN.yaml --out STORE   (for zero_shot)

Any launcher spreads the shards over its processes: torchrun --nproc-per-node 4 tools/embed.py ...
A teacher larger than a card is dealt to the processes by `sharded=true`, or laid over the devices
of one process by `spread=true`.
A build that was killed goes on where it was, on any number of ranks, to the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.utils.logging import disable_progress_bar

from trainer.bench.table import format_rows
from trainer.comm import Comm
from trainer.command import parser_of, run_command
from trainer.config import load_run
from trainer.data.texts import TextSet
from trainer.errors import ConfigError
from trainer.programs.embed import (
    class_prompts,
    fit_components,
    list_teachers,
    open_teacher,
    project_store,
    stored_as,
    with_views,
)
from trainer.store import EmbeddingStore
from trainer.store.size import plan_rows
from trainer.teachers.existing_vectors import VectorFiles
from trainer.teachers.fill import Embedded, Teacher, embed, verify
from trainer.teachers.pinned import DEFAULT_CACHE
from trainer.teachers.spec import read_spec


def main() -> None:
    parser = _parser()
    arguments = parser.parse_intermixed_args()
    disable_progress_bar()
    if arguments.teachers:
        print(format_rows(list_teachers(arguments.cache)))
        return
    comm = Comm.from_environment()
    if arguments.fit_pca:
        _fit(arguments, comm)
    elif arguments.plan:
        rows = plan_rows(_teacher(arguments, comm).identity, component_dims=arguments.dims)
        _say(comm, format_rows(rows))
    elif arguments.class_names and (arguments.data or arguments.project or arguments.import_files):
        raise ConfigError("--class-names stands alone: no --data, --project or --import-files")
    elif not ((arguments.data or arguments.class_names) and arguments.out):
        raise ConfigError("give --data SHARDS and --out FOLDER (or --teachers, --plan)")
    elif arguments.verify:
        teacher = _teacher(arguments, comm)
        count = verify(_samples(arguments), arguments.out, teacher=teacher, comm=comm)
        _say(comm, f"{arguments.out}: whole, and {count} samples computed again agree")
    else:
        _report(_embed(arguments, comm), arguments.out, comm)


def _embed(arguments: argparse.Namespace, comm: Comm) -> Embedded:
    if arguments.project:
        return project_store(
            arguments.data,
            arguments.project,
            arguments.out,
            arguments.dims,
            comm,
            dtype=arguments.dtype,
            report=_line,
        )
    teacher = _teacher(arguments, comm)
    return embed(
        _samples(arguments),
        arguments.out,
        teacher=teacher,
        comm=comm,
        workers=arguments.workers,
        report=_line,
    )


def _samples(arguments: argparse.Namespace) -> str | TextSet:
    if arguments.class_names:
        return class_prompts(load_run(arguments.class_names))
    return str(arguments.data)


def _teacher(arguments: argparse.Namespace, comm: Comm) -> Teacher:
    if arguments.import_files:
        vectors, dim = arguments.shape
        folder = arguments.import_files
        teacher: Teacher = VectorFiles(folder, name=folder.name, vectors=vectors, dim=dim)
    else:
        spec = read_spec(arguments.teacher, arguments.settings)
        teacher = open_teacher(spec, comm, cache=arguments.cache)
        if note := getattr(teacher, "note", ""):
            _say(comm, note)
        teacher = with_views(teacher, arguments.views) if arguments.views else teacher
    return stored_as(teacher, dtype=arguments.dtype, pca=arguments.pca)


def _fit(arguments: argparse.Namespace, comm: Comm) -> None:
    if not arguments.out:
        raise ConfigError("give --out FILE.safetensors for the components")
    pca = fit_components(arguments.fit_pca, arguments.out, arguments.dims, comm)
    kept = f"{len(pca.directions)} of {len(pca.mean)} components"
    _say(comm, f"{arguments.out}: {kept} keep {pca.kept_share:.1%} of the variance")


def _report(done: Embedded, out: Path, comm: Comm) -> None:
    store = EmbeddingStore.open(out)
    verb = "nothing to do, already there:" if done.already_done else "done:"
    size = f"{len(store)} samples x {store.num_vectors} vectors of {store.dim} dimensions"
    _say(comm, f"{verb} {size} in {out}, {store.identity.row_bytes} bytes per sample")
    if done.skipped:
        _say(comm, f"{done.skipped} samples have nothing that the teacher reads; no vector")
    if done.checked:
        _say(comm, f"{done.checked} samples computed again agree")


def _say(comm: Comm, text: str) -> None:
    if comm.is_main:
        _line(text)


def _line(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, is_launched=True)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes of the teacher")
    parser.add_argument("--teacher", default="minilm", help="pinned name, folder, workdir or YAML")
    parser.add_argument("--data", help="shards: braces, globs and :: lists")
    parser.add_argument(
        "--class-names", type=Path, metavar="RUN.yaml", help="prompts of its zero_shot evaluations"
    )
    parser.add_argument("--out", type=Path, help="folder of the store")
    parser.add_argument("--dtype", choices=["float16", "int8"], default="float16")
    parser.add_argument("--views", type=int, default=0, help="random ones beside the whole image")
    parser.add_argument("--pca", type=Path, metavar="FILE", help="components to project on")
    parser.add_argument("--fit-pca", type=Path, metavar="STORE", help="write components to --out")
    parser.add_argument(
        "--project", type=Path, metavar="STORE", help="fit, and write its rows anew"
    )
    parser.add_argument("--dims", type=int, default=256, help="components that are kept")
    parser.add_argument("--import-files", type=Path, metavar="FOLDER", help="of <key>.pth tensors")
    parser.add_argument("--shape", type=int, nargs=2, default=(11, 5120), help="of each such file")
    parser.add_argument("--teachers", action="store_true", help="list the pinned teachers")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes a rank that decode images ahead"
    )
    parser.add_argument("--plan", action="store_true", help="bytes per sample and per corpus")
    parser.add_argument("--verify", action="store_true", help="compare the store with the teacher")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    return parser


if __name__ == "__main__":
    run_command(main)
