"""Count concepts in captions, and relate their frequency to accuracy.

  python tools/concepts.py study --run runs/quickstart --out runs/concepts
  python tools/concepts.py bank --data SHARDS --target concept --out bank.jsonl
  python tools/concepts.py count --data SHARDS --bank bank.jsonl --out counts --captions en=txt
  python tools/concepts.py balance --counts counts --threshold 20000
  python tools/concepts.py report --table table.csv --out report

Any launcher spreads the shards: torchrun --nproc-per-node 8 tools/concepts.py count ...
A count that was killed goes on where it was, to the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.comm import Comm
from trainer.command import parser_of, run_command, said_once
from trainer.concepts import Bank
from trainer.concepts.balance import tail_share, thresholds_of_languages
from trainer.concepts.count import Captions, count_shards, pairs_of, told_captions
from trainer.concepts.counts import FREQUENCIES
from trainer.concepts.tags import Tags
from trainer.concepts.trend import RESAMPLES, trend
from trainer.errors import ConfigError
from trainer.evals.long_tail import counts_of
from trainer.programs.concepts import (
    class_bank,
    format_report,
    read_table,
    study_run,
    write_report,
)


def main() -> None:
    arguments = _parser().parse_args()
    comm = Comm.from_environment()
    say = said_once(comm)
    if arguments.task == "bank":
        bank = _bank(arguments)
        bank.save(arguments.out)
        say(f"{len(bank)} concepts in {', '.join(bank.languages)}: {arguments.out}")
    elif arguments.task == "count":
        bank = Bank.open(arguments.bank)
        tags = Tags(arguments.tags, bank, arguments.tag_threshold) if arguments.tags else None
        counts = count_shards(
            arguments.data, bank, _captions(arguments), arguments.out, comm, tags=tags, say=say
        )
        say(json.dumps(counts.figures(), indent=1))
    elif arguments.task == "balance":
        say(json.dumps(_balance(arguments), indent=1))
    elif arguments.task == "report":
        table = read_table(arguments.table)
        figures = {
            "source": {"frequency": "of the table", "table": str(arguments.table)},
            **trend(table, seed=arguments.seed, resamples=arguments.resamples),
        }
        if comm.is_main:
            write_report(table, figures, arguments.out)
        say(format_report(figures))
    else:
        say(format_report(_study(arguments, comm, say)))
        say(f"report.html, report.json, table.csv and trend.png are in {arguments.out}")


def _study(arguments: argparse.Namespace, comm: Comm, say: Any) -> dict[str, Any]:
    return study_run(
        arguments.run,
        arguments.out,
        comm,
        frequency=arguments.frequency,
        seed=arguments.seed,
        resamples=arguments.resamples,
        captions=_captions(arguments),
        tags=arguments.tags,
        threshold=arguments.tag_threshold,
        overrides=arguments.overrides,
        say=say,
    )


def _bank(arguments: argparse.Namespace) -> Bank:
    forms: dict[str, list[str]] = {}
    for language, field in pairs_of(arguments.forms, "--forms"):
        forms.setdefault(language, []).append(field)
    if not forms:
        return class_bank(arguments.data, arguments.target)
    return Bank.of_shards(arguments.data, arguments.target, forms)


def _balance(arguments: argparse.Namespace) -> dict[str, Any]:
    _, counts = counts_of(arguments.counts)
    by_language = dict(zip(counts.languages, counts.text, strict=True))
    first = arguments.first or ("en" if "en" in by_language else counts.languages[0])
    if first not in by_language:
        raise ConfigError(f"nothing was counted in {first!r}, only {', '.join(by_language)}")
    found = thresholds_of_languages(by_language, first=first, threshold=arguments.threshold)
    return {
        language: {"threshold": value, "tail_share": tail_share(by_language[language], value)}
        for language, value in found.items()
    }


def _captions(arguments: argparse.Namespace) -> Captions:
    return told_captions(arguments.captions, arguments.lemmas, arguments.engine)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, is_launched=True)
    tasks = parser.add_subparsers(dest="task", required=True)
    study = tasks.add_parser("study", help="count, evaluate and report for a run")
    study.add_argument("--run", type=Path, required=True, metavar="WORKDIR")
    study.add_argument("--frequency", choices=FREQUENCIES, default="text")
    study.add_argument("overrides", nargs="*", help="key=value, for folders that have moved")
    bank = tasks.add_parser("bank", help="the classes of shards as a bank")
    bank.add_argument("--target", required=True, metavar="KEY", help="json key of the name")
    bank.add_argument(
        *("--forms",), nargs="*", default=[], metavar="LANGUAGE=FIELD", help="as en=alias"
    )
    count = tasks.add_parser("count", help="how often captions and images have each concept")
    count.add_argument("--bank", type=Path, required=True)
    balance = tasks.add_parser("balance", help="thresholds that flatten the head, by language")
    balance.add_argument("--counts", type=Path, required=True, metavar="FOLDER")
    balance.add_argument("--threshold", type=float, required=True, help="of the first language")
    balance.add_argument("--first", metavar="LANGUAGE", help="en where it was counted")
    report = tasks.add_parser("report", help="figures of a table of your own")
    report.add_argument(
        "--table", type=Path, required=True, help="CSV: dataset,concept,frequency,right,samples"
    )
    for task in (bank, count):
        task.add_argument("--data", required=True, metavar="SHARDS")
    for task in (study, count):
        task.add_argument("--captions", nargs="+", default=["en=txt"], metavar="LANGUAGE=FIELD")
        task.add_argument("--lemmas", nargs="*", default=[], metavar="LANGUAGE=SOURCE")
        task.add_argument("--engine", choices=["trie", "ahocorasick"], default="trie")
        task.add_argument("--tags", type=Path, help="lines of JSON that a tagger wrote")
        task.add_argument("--tag-threshold", type=float, default=0.0)
    for task in (study, report):
        task.add_argument("--seed", type=int, default=0)
        task.add_argument("--resamples", type=int, default=RESAMPLES)
    for task in (study, bank, count, report):
        task.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    run_command(main)
