"""Write captions of images beside their shards; what stands in the shards is never changed.

  python tools/caption.py --data SHARDS --model models/blip --out captions --select runs/reduced

Then in a run file, for half of the visits, or behind the original:
  data: {captions: {generated: captions, fields: [txt, generated], weights: [0.5, 0.5]}}
  data: {captions: {generated: captions, fields: [txt, generated], combine: concat}}
Any launcher spreads the shards. A call that was killed goes on with the next shard.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.utils.logging import disable_progress_bar

from trainer.comm import Comm
from trainer.command import parser_of, run_command, said_once
from trainer.curation.captioner import FolderCaptioner, write_captions


def main() -> None:
    arguments = _parser().parse_args()
    disable_progress_bar()
    comm = Comm.from_environment()
    captioner = FolderCaptioner(
        arguments.model,
        comm.device,
        most_tokens=arguments.most_tokens,
        beams=arguments.beams,
        rows=arguments.rows,
    )
    say = said_once(comm)
    write_captions(
        arguments.data,
        arguments.out,
        captioner,
        comm,
        select=arguments.select,
        images=arguments.images,
        say=say,
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, is_launched=True)
    parser.add_argument("--data", required=True, metavar="SHARDS")
    parser.add_argument("--model", type=Path, required=True, help="folder, image to text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--select", type=Path, help="folder of tools/reduce.py: only its samples")
    parser.add_argument("--images", nargs="+", default=["png", "jpg", "jpeg", "webp"])
    parser.add_argument("--most-tokens", type=int, default=30, help="of a caption")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="images at a time")
    return parser


if __name__ == "__main__":
    run_command(main)
