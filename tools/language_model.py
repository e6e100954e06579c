"""A very small language model of a corpus's words, for a first run of LexVLA.

python tools/language_model.py 'data/open/train-{000000..000002}.tar' --out cache/words-lm
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import run_command
from trainer.programs.language_model import PROMPT, ModelSize, write_language_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", help="whose captions and keywords are read")
    parser.add_argument("--out", type=Path, required=True, help="a folder for transformers")
    parser.add_argument("--width", type=int, default=ModelSize().width, help="embed_dim of a run")
    parser.add_argument("--steps", type=int, default=ModelSize().steps)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = ModelSize(width=arguments.width, steps=arguments.steps)
    loss = write_language_model(arguments.shards, arguments.out, size, seed=arguments.seed)
    print(f"{arguments.out}: {loss:.2f} nats a token; the run's prompt is {PROMPT!r}")


if __name__ == "__main__":
    run_command(main)
