"""Compute a frozen teacher's vectors of captions once: a store that training joins by sample id.

python tools/embed.py --data 'shards/train-{000..013}.tar' --out cache/embeddings/minilm
Any launcher spreads the shards over its processes: torchrun --nproc-per-node 4 tools/embed.py ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.utils.logging import disable_progress_bar

from trainer.comm import Comm
from trainer.config import CaptionConfig
from trainer.data.embed import Teacher, agreed, embed
from trainer.data.embeddings import EmbeddingStore
from trainer.data.teacher import DEFAULT_CACHE, SentenceTeacher, load_minilm
from trainer.errors import TrainerError


def main() -> int:
    arguments = _parser().parse_args()
    disable_progress_bar()
    comm = Comm.from_environment()
    done = embed(
        arguments.data,
        arguments.out,
        teacher=_teacher(arguments, comm),
        comm=comm,
        report=lambda line: print(line, flush=True),
    )
    if comm.is_main:
        store = EmbeddingStore.open(arguments.out)
        verb = "nothing to do, already there:" if done.already_done else "done:"
        print(f"{verb} {len(store)} vectors of {store.dim} dimensions in {arguments.out}")
        if done.skipped:
            print(f"{done.skipped} samples have no caption and got no vector")
        if done.checked:
            print(f"{done.checked} samples computed again: they agree")
    return 0


def _teacher(arguments: argparse.Namespace, comm: Comm) -> Teacher:
    captions = CaptionConfig(fields=tuple(arguments.fields))
    if arguments.teacher != "minilm":
        folder = Path(arguments.teacher)
        return SentenceTeacher.load(folder, name=folder.name, device=comm.device, captions=captions)
    if comm.is_main:  # one rank fetches, the others find it in the cache
        agreed(comm, lambda: load_minilm(cache=arguments.cache))
    else:
        agreed(comm, lambda: None)
    return load_minilm(cache=arguments.cache, device=comm.device, captions=captions)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="shards: braces, globs and :: lists")
    parser.add_argument("--teacher", default="minilm", help="minilm, or a folder of transformers")
    parser.add_argument("--out", type=Path, required=True, help="folder of the store")
    parser.add_argument("--fields", nargs="+", default=["txt"], help="caption: txt or json keys")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TrainerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
