"""Look at every sample of shards once: vectors, cosine, hashes, size, language, concepts.

  python tools/scan.py --data 'data/open/train-{000000..000002}.tar' --model runs/quickstart \
      --out runs/scan --near-duplicates 4
  torchrun --nproc-per-node 8 tools/scan.py --data SHARDS --model FOLDER --out OUT --bank bank.jsonl
  python tools/scan.py --calibrate thresholds.json --data LABELLED --target concept --model M \
      --bank bank.jsonl
  python tools/scan.py --plan --processes 160 --samples-per-second 40

--model is a run's workdir, or a folder with a pair of towers that transformers saved. A scan that
was killed goes on with the next shard, on any number of processes, to the same bytes. Samples that
can't be used stand in OUT/ledger. Next: tools/reduce.py OUT
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.bench.table import format_rows
from trainer.comm import Comm
from trainer.command import parser_of, run_command, said_once
from trainer.curation.cost import Corpus, cost
from trainer.errors import ConfigError
from trainer.programs.scan import calibrate_from, scan_from


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.plan:
        given = {name: value for name, value in vars(arguments).items() if name in Corpus._fields}
        print(format_rows(cost(Corpus(**{k: v for k, v in given.items() if v is not None}))))
        return
    if arguments.data is None or arguments.model is None:
        raise ConfigError("give --data SHARDS and --model, or --plan")
    comm = Comm.from_environment()
    say = said_once(comm)
    if arguments.calibrate is not None:
        say(json.dumps(calibrate_from(arguments, comm), indent=1))
        say(f"next: --bank {arguments.bank} --tags {arguments.calibrate}")
        return
    if arguments.out is None:
        raise ConfigError("give --out FOLDER")
    say(scan_from(arguments, comm, say=say))
    say(f"scan.md, scan.png and a file a shard are in {arguments.out}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, is_launched=True)
    parser.add_argument("--data", metavar="SHARDS")
    parser.add_argument("--model", metavar="FOLDER", help="a run's workdir, or a pair of towers")
    parser.add_argument("--out", type=Path)
    ask = parser.add_argument_group("what is asked")
    ask.add_argument("--caption", default="txt", metavar="FIELD", help="compared with the image")
    ask.add_argument("--images", nargs="+", default=["png", "jpg", "jpeg", "webp"])
    ask.add_argument("--texts", action="store_true", help="keep the captions' vectors too")
    ask.add_argument("--languages", action="store_true", help="by py3langid")
    ask.add_argument("--bank", type=Path, help="concepts, of tools/concepts.py bank")
    ask.add_argument("--captions", nargs="+", default=["en=txt"], metavar="LANGUAGE=FIELD")
    ask.add_argument("--lemmas", nargs="*", default=[], metavar="LANGUAGE=SOURCE")
    ask.add_argument("--engine", choices=["trie", "ahocorasick"], default="trie")
    ask.add_argument("--tags", type=Path, metavar="FILE", help="thresholds of --calibrate")
    ask.add_argument("--near-duplicates", type=int, metavar="BITS", help="of 64; 4 is near")
    ask.add_argument("--rows", type=int, default=16, help="of one forward pass")
    tags = parser.add_argument_group("thresholds for tags")
    tags.add_argument("--calibrate", type=Path, metavar="FILE", help="write them, and stop")
    tags.add_argument("--target", metavar="KEY", help="json key of the class")
    tags.add_argument("--precision", type=float, default=0.8, help="that tags are to have")
    tags.add_argument("--templates", nargs="+", default=["{}", "a picture of {}"])
    plan = parser.add_argument_group("cost")
    plan.add_argument("--plan", action="store_true", help="say what it will cost, and stop")
    for name in Corpus._fields:
        kind = type(Corpus._field_defaults[name])
        plan.add_argument(f"--{name.replace('_', '-')}", type=kind, help="of a plan")
    return parser


if __name__ == "__main__":
    run_command(main)
