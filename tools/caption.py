"""Write captions of images beside their shards; what stands in the shards is never changed.

  python tools/caption.py --data SHARDS --model models/blip --out captions --select runs/reduced
  python tools/caption.py --data SHARDS --model runs/codebook_quick --codes runs/codes

Then in a run file, for half of the visits, or behind the original:
  data: {captions: {generated: captions, fields: [txt, generated], weights: [0.5, 0.5]}}
  data: {captions: {generated: captions, fields: [txt, generated], combine: concat}}
--model is a folder of any model that transformers loads as image to text, or the workdir of a run
of the recipe codebook, which has codes too. Any launcher spreads the shards. A call that was killed
goes on with the next shard.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.utils.logging import disable_progress_bar

from trainer.comm import Comm
from trainer.command import parser_of, run_command, said_once
from trainer.programs.caption import caption_from


def main() -> None:
    arguments = _parser().parse_args()
    disable_progress_bar()
    comm = Comm.from_environment()
    caption_from(arguments, comm, say=said_once(comm))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, is_launched=True)
    parser.add_argument("--data", required=True, metavar="SHARDS")
    parser.add_argument("--model", type=Path, required=True, help="folder, or a run's workdir")
    parser.add_argument("--out", type=Path, help="captions")
    parser.add_argument("--codes", type=Path, help="codes of all images, for tools/reduce.py")
    parser.add_argument("--select", type=Path, help="folder of tools/reduce.py: only its samples")
    parser.add_argument("--images", nargs="+", default=["png", "jpg", "jpeg", "webp"])
    parser.add_argument("--most-tokens", type=int, default=30, help="of a caption")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="images at a time")
    return parser


if __name__ == "__main__":
    run_command(main)
