"""Builds the corpus of real image-text pairs: python tools/make_corpus.py --out data/open

With `--large --out data/large`, from some seventy more vendors; downloads lie in cache/npm."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: its inspect.py would hide Python's own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.data.corpus.build import build_corpus
from trainer.data.corpus.large import build_large
from trainer.data.corpus.wheels import DEFAULT_CACHE
from trainer.errors import TrainerError


def table(manifest: dict[str, Any]) -> str:
    """One line per split: pairs, concepts, megabytes, vendors."""
    lines = [f"{'split':24}{'pairs':>8}{'concepts':>10}{'MB':>7}  vendors"]
    for name, facts in manifest["splits"].items():
        vendors = ", ".join(f"{vendor} {count}" for vendor, count in facts["vendors"].items())
        size = facts["bytes"] / 1e6
        lines.append(f"{name:24}{facts['pairs']:8}{facts['concepts']:10}{size:7.1f}  {vendors}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/open"), help="folder of the corpus")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of downloads")
    parser.add_argument("--no-glosses", action="store_true", help="without WordNet's definitions")
    parser.add_argument("--large", action="store_true", help="with the icon sets of npm")
    options = parser.parse_args()
    if options.large and options.no_glosses:
        parser.error("--large is always built with definitions; leave --no-glosses out")
    try:
        if options.large:
            manifest = build_large(options.out, cache=options.cache, report=print)
        else:
            manifest = build_corpus(
                options.out, cache=options.cache, glosses=not options.no_glosses, report=print
            )
    except (TrainerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
