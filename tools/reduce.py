"""Select the samples of a scan to train on: by clusters, scores, concepts, near-duplicates.

  python tools/reduce.py runs/scan --data 'data/open/train-{000000..000002}.tar' \
      --out runs/reduced --clusters 60 share=0.5 alpha=0.5 --run launch/runs/compare_base.yaml
  python tools/reduce.py SCAN --data SHARDS --out OUT --preset tldr-paper
  python tools/reduce.py SCAN --data SHARDS --out OUT rule=balance threshold=20000
  torchrun --nproc-per-node 8 tools/reduce.py SCAN --data SHARDS --out OUT --preset dynamics

Presets: tldr-paper, tldr-repo, dynamics; key=value after them. No shard is copied: train with
data.select=OUT. --write SHARDS copies the selected samples into shards all the same. --run writes
OUT/compare.yaml: the full set, the selection and a random one as large, at the same samples seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.comm import Comm
from trainer.command import parser_of, run_command, said_once
from trainer.curation.policy import PRESETS, read_policy
from trainer.programs.reduce import reduce_scan, table_of, write_comparison, write_shards


def main() -> None:
    arguments = _parser().parse_intermixed_args()
    comm = Comm.from_environment()
    say = said_once(comm)
    given = PRESETS[arguments.preset] if arguments.preset else {}
    if arguments.clusters is not None:
        given = {**given, "clusters": arguments.clusters}
    policy = read_policy(given, arguments.settings)
    out: Path = arguments.out
    figures = reduce_scan(
        *(arguments.data, arguments.scan, out, policy, comm),
        labels=arguments.labels,
        codes=arguments.codes,
        say=say,
    )
    say(table_of(policy, figures))
    if arguments.write is not None:
        say(f"written: {write_shards(arguments.data, out, arguments.write, comm)}")
    if arguments.run is not None:
        path = write_comparison(arguments.run, out, arguments.seeds, comm)
        say(f"next: python tools/compare.py {path}")
    say(f"next: bash launch/local.sh RUN.yaml data.select={out}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, is_launched=True)
    parser.add_argument("scan", type=Path, help="folder of tools/scan.py")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="those that were scanned")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--clusters", type=int, help="of the k-means over image vectors")
    parser.add_argument("--labels", type=Path, help="a clustering of the scan's images/ instead")
    parser.add_argument("--codes", type=Path, help="cluster these of tools/caption.py instead")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="copy the selected samples")
    parser.add_argument("--run", type=Path, metavar="YAML", help="to compare with and without")
    parser.add_argument("--seeds", type=int, default=3, help="of the comparison")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the policy")
    return parser


if __name__ == "__main__":
    run_command(main)
