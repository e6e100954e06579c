"""A password or a signature in a URL opens its shards, and is in nothing that a run leaves."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.data.bad_server import serve
from tests.ranks import run_ranks
from tests.test_moved_data import config_of, shards_in
from trainer.addresses import all_without_secrets, lacks_secrets, without_secrets
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.command import run_command
from trainer.config import RunConfig, dump_run, parse_run
from trainer.data.catalogue import Entry, write_catalogue
from trainer.data.ledger import Ledger, Rejected
from trainer.doctor.finding import Finding
from trainer.errors import DataError, TrainerError
from trainer.long_work import Standard

SECRETS = ("hunter2", "topsecret", "AKIAKEY")
SHOWN = {
    "https://ann:hunter2@host/a.tar": "https://...@host/a.tar",
    "https://hunter2@host/a.tar: cut": "https://...@host/a.tar: cut",
    "s3://AKIAKEY:topsecret@bucket/{000..127}.tar": "s3://...@bucket/{000..127}.tar",
    "https://h/a.tar?X-Amz-Signature=topsecret&b=c: truncated": "https://h/a.tar?...: truncated",
    "a=https://h/1.tar?s=topsecret::https://h/2.tar?s=hunter2": (
        "a=https://h/1.tar?...::https://h/2.tar?..."
    ),
    "ClientResponseError(404, url='http://ann:hunter2@h/x?k=topsecret')": (
        "ClientResponseError(404, url='http://...@h/x?...')"
    ),
    "pipe:curl -H 'Authorization: Bearer topsecret' https://h/a.tar": (
        "pipe:curl -H 'Authorization: Bearer ...' https://h/a.tar"
    ),
    "https://h/a.tar?s=topsecret, https://h/b.tar?s=hunter2; 2 of 9": (
        "https://h/a.tar?..., https://h/b.tar?...; 2 of 9"
    ),
    "train 3 of 5? {a: b} x@y.org": "train 3 of 5? {a: b} x@y.org",
    "s3://bucket/dir/icon@2x/a.tar": "s3://bucket/dir/icon@2x/a.tar",
}


@pytest.mark.parametrize(("text", "shown"), SHOWN.items())
def test_what_is_shown_of_an_address(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown
    assert str(TrainerError(text)) == shown
    assert all_without_secrets({"a": [text, 1], "b": {"c": text}}) == {
        "a": [shown, 1],
        "b": {"c": shown},
    }
    assert lacks_secrets(shown) == ("..." in shown and "pipe:" not in shown)


def test_whatever_is_written_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://ann:hunter2@h/a.tar?s=topsecret"
    ledger = Ledger(tmp_path, rank=0, budget=1.0)
    ledger.put(num_read=1, rejected=[Rejected(url, "k", f"{url}: damaged", 0, 0)])
    ledger.close()
    Standard().line(f"opening {url}")
    with pytest.raises(SystemExit):
        run_command(lambda: complain(DataError(f"no shard {url}")))
    hook = sys.excepthook
    try:
        with pytest.raises(RuntimeError):
            run_command(lambda: complain(RuntimeError(f"a bug at {url}")))
        sys.excepthook(RuntimeError, RuntimeError(f"a bug at {url}"), None)
    finally:
        sys.excepthook = hook
    said = "".join(capsys.readouterr()) + (tmp_path / "ledger/rank-0.jsonl").read_text()
    assert said.count("https://...@h/a.tar?...") == 5
    assert not [secret for secret in SECRETS if secret in said]
    assert "hunter2" not in str(Finding("data", f"{url} can't be opened"))


def complain(error: Exception) -> None:
    raise error


def test_a_catalogue_would_pass_it_on_and_is_refused(tmp_path: Path) -> None:
    entry = Entry("https://ann:hunter2@h/a.tar", "", b"", "", None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="which a catalogue would pass on"):
        write_catalogue(str(tmp_path / "a.catalogue"), [entry])


def test_an_address_out_of_a_run_file_is_asked_for_again() -> None:
    from trainer.data.remote import expand_sets

    for url in ("https://...@h/a.tar", "a=https://h/{0..3}.tar?..."):
        with pytest.raises(DataError, match="keeps no passwords and signatures; give the whole"):
            expand_sets(url)


def starts(comm: Comm, configs: list[RunConfig], said: Path) -> list[str]:
    from trainer.loop import train

    ends = []
    with said.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        for config in configs:
            try:
                ends.append(f"step {train(config).progress.step}")
            except TrainerError as error:
                ends.append(str(error))
    return ends


def test_no_file_of_a_run_holds_a_password_or_a_signature(tmp_path: Path) -> None:
    """With a bad sample, a start anew under another signature, and an end by a mistake."""
    here = shards_in(tmp_path / "here")
    damaged = (here / "8.tar").read_bytes().replace(b"\x89PNG", b"\x89PNH", 1)
    (here / "8.tar").write_bytes(damaged)
    with serve(here) as server:
        place = server.url.removeprefix("http://")

        def config(signature: str, *more: str) -> RunConfig:
            spec = f"http://ann:hunter2@{place}/{{8..11}}.tar?X-Amz-Signature={signature}"
            return config_of(tmp_path / "w", spec, "data.bad_sample_budget=0.5", *more)

        configs = [
            config("topsecret1", "steps=4"),
            config("topsecret2", "steps=8"),
            config("topsecret3", "steps=9", "data.window_shards=3"),
        ]
        (tmp_path / "w").mkdir()
        (ends,) = run_ranks(starts, 1, configs, tmp_path / "w" / "said.txt", timeout_seconds=300)
        assert server.count["with a password"] > 20
    assert ends[:2] == ["step 4", "step 8"]
    assert "window_shards: 8 -> 3" in ends[2]
    files = [path for path in (tmp_path / "w").rglob("*") if path.is_file()]
    assert {"run.yaml", "environment.json", "rank-0.jsonl", "log.txt", "said.txt"} <= {
        path.name for path in files
    }
    for path in files:
        assert not [s for s in SECRETS if s.encode() in path.read_bytes()], path
    assert f"http://...@{place}/8.tar?..." in (tmp_path / "w/run/ledger/rank-0.jsonl").read_text()
    restored = Checkpointer(tmp_path / "w/run/checkpoints", Comm.solo()).latest()
    assert restored is not None
    kept = parse_run(restored.texts["run.yaml"])
    assert kept.data.train == f"http://...@{place}/{{8..11}}.tar?..."
    assert parse_run(dump_run(configs[0])) == configs[0]
