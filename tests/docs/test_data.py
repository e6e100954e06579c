"""docs/data.md: its run files are read, and its figures are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.data.tars import write_tar
from trainer.config import DataConfig
from trainer.data.index import write_index
from trainer.data.ledger import MIN_READS
from trainer.data.remote import ATTEMPTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()


def test_every_section_that_the_page_shows_is_read() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    read = [DataConfig.model_validate(yaml.safe_load(block)["data"]) for block in blocks]
    assert read[0].captions.weights == (3, 1)
    assert read[1].train == "/data/cc3m/*.tar::s3://bucket/more/{000..099}.tar"
    assert read[2].train.startswith("cc3m=/data/cc3m/{00000..00331}.tar::cc12m=/data/cc12m/part1/")
    assert read[3].weights == {"cc3m": 2.0, "cc12m": 0.5}


@pytest.mark.heavy
def test_an_index_has_the_size_that_the_page_says(tmp_path: Path) -> None:
    samples = {f"{n:09d}": {"jpg": b"j", "txt": b"t", "json": b"{}"} for n in range(10_000)}
    shard = write_tar(tmp_path / "00000.tar", samples)
    write_index(shard)
    size = Path(f"{shard}.index").stat().st_size / len(samples)
    assert "about 120 bytes a sample with three members" in PAGE
    assert abs(size - 120) < 6
    assert "| 407 million (LAION-400M) | 41,000 | 12 TB | 49 GB |" in PAGE  # 120 bytes each


def test_the_page_names_the_numbers_of_the_program() -> None:
    assert f"From {MIN_READS} samples read on" in PAGE
    assert ATTEMPTS == 8
    assert "eight times in all" in PAGE
    data = DataConfig(train="x")
    assert (data.bad_sample_budget, data.window_shards) == (0.01, 8)
    assert "(1 % by\ndefault)" in PAGE
    assert "`data.window_shards` shards, 8 by default" in PAGE
