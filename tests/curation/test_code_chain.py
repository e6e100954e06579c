"""From a trained codebook to captions, codes, clusters of their bags, and a selection."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.curation.corpus import BAD, SIZES, questions, write_corpus
from tests.curation.test_reduce import bytes_of, selected
from tests.curation.test_scan import files_of
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import parse_run
from trainer.curation.captioner import write_captions
from trainer.curation.code_files import CodeFiles, write_codes
from trainer.curation.policy import Policy
from trainer.curation.scan import scan
from trainer.data.fields import find_image
from trainer.data.generated import GeneratedCaptions
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.loop import train
from trainer.programs.caption import open_captioner
from trainer.programs.reduce import reduce_scan
from trainer.programs.workdir import open_workdir

CODES = 9
RUN = """
workdir: {folder}/run
steps: 2
global_batch: 4
deepspeed: ds_configs/zero0.json
recipe:
  name: codebook
  model: {{image_size: 32, patch_size: 8, embed_dim: 8, image: {{width: 32, layers: 1, heads: 2}}}}
  captions: {{length: 10, vocabulary: 300}}
  codes: {{count: 9}}
  decoder: {{width: 16, layers: 1, heads: 2}}
data: {{train: "{spec}", workers: 0, bad_sample_budget: 0.9}}
optim: {{learning_rate: 0.01, warmup_steps: 0}}
"""
HOW = {"most_tokens": 6, "beams": 2, "rows": 4}


def looked_at(folder: Path) -> tuple[str, Path]:
    """A corpus that was scanned, and a run on it."""
    spec = write_corpus(folder / "data")
    scan(spec, folder / "scan", questions(), Comm.solo())
    train(parse_run(RUN.format(folder=folder, spec=spec)))
    return spec, folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, Path]:
    spec, folder = run_ranks(_made, 1, tmp_path_factory.mktemp("chain"))[0]
    return spec, folder


def _made(comm: Comm, folder: Path) -> tuple[str, Path]:
    return looked_at(folder)


def coded(comm: Comm, spec: str, folder: Path, out: Path) -> None:
    captioner = open_captioner(folder / "run", comm, **HOW)
    write_codes(spec, out / "codes", captioner, comm)
    write_captions(spec, out / "captions", captioner, comm)
    policy = Policy(clusters=3, share=0.5)
    reduce_scan(spec, folder / "scan", out / "reduced", policy, comm, codes=out / "codes")


def codes_in(path: Path) -> dict[int, list[int]]:
    with safe_open(path, framework="np") as file:
        ids, codes = file.get_tensor("ids"), file.get_tensor("codes")
    return dict(zip(ids.tolist(), codes.tolist(), strict=True))


@pytest.mark.heavy
def test_codes_captions_and_the_selection_are_the_same_bytes_on_any_ranks(made, tmp_path):
    spec, folder = made
    run_ranks(coded, 1, spec, folder, tmp_path / "one")
    run_ranks(coded, 2, spec, folder, tmp_path / "two")
    run_ranks(coded, 4, spec, folder, tmp_path / "four")
    one = tmp_path / "one"
    for other in ("two", "four"):
        for name in ("codes", "captions"):
            assert files_of(one / name) == files_of(tmp_path / other / name), name
        mine, theirs = (bytes_of(each / "reduced") for each in (one, tmp_path / other))
        assert mine == theirs
    shards = ShardSet.open(spec)
    found: dict[int, list[int]] = {}
    for name in shards.names:
        found |= codes_in(one / "codes" / f"{name}.safetensors")
    unreadable = sum(reason != "no caption" for reason in BAD.values())
    assert len(found) == sum(SIZES) - unreadable
    _are_the_nearest(found, spec, folder)
    captions = GeneratedCaptions(one / "captions")
    assert captions.header.captions == len(found)
    kept = selected(shards, one / "reduced")
    assert 0 < len(kept) < len(found)
    assert set(kept) <= set(found)


@torch.no_grad()
def _are_the_nearest(found: dict[int, list[int]], spec: str, folder: Path) -> None:
    """By all distances in float64, from weights read out of the checkpoint."""
    trained = open_workdir(folder / "run", Comm.solo())
    image, shards = trained.model.double().image, ShardSet.open(spec)
    from trainer.run import pixels_of

    pixels = pixels_of(trained.run)
    for index in (0, 4, 9, 13, 15):
        sample = shards.read(index)
        data = pixels.decode(find_image(sample.fields, ("png",)), max_pixels=1 << 20)
        patches = image.patches(pixels.normalized(data[None]).double())[0]
        patches = patches / patches.norm(dim=1, keepdim=True)
        rows = image.codebook.rows / image.codebook.rows.norm(dim=1, keepdim=True)
        distances = torch.cdist(patches, rows)
        chosen = distances.gather(1, torch.tensor(found[sample.sample_id])[:, None])[:, 0]
        torch.testing.assert_close(chosen, distances.min(dim=1).values, rtol=0, atol=1e-5)


@pytest.mark.heavy
def test_other_names_of_the_codes_select_the_same_and_other_files_are_refused(made, tmp_path):
    """Bags do not know in which order the codebook is written: relabelled, the k-means' first
    centroids are the same samples, so the clusters are."""
    spec, folder = made
    shards, comm = ShardSet.open(spec), Comm.solo()
    draw = np.random.default_rng(0)
    plain, other = tmp_path / "plain", tmp_path / "other"
    names = draw.permutation(CODES)
    for place in (plain, other):
        place.mkdir()
    for name, digest, size in zip(shards.names, shards.digests, shards.sizes, strict=True):
        ids = shards.ids[sum(shards.sizes[: shards.names.index(name)]) :][:size]
        base = (np.arange(size) % 3)[:, None] * 3 + draw.integers(0, 3, (size, 16))
        about = {"about": json.dumps({"source": digest, "num_codes": CODES})}
        for place, codes in ((plain, base), (other, names[base])):
            arrays = {"ids": np.asarray(ids), "codes": codes.astype(np.int32)}
            save_file(arrays, place / f"{name}.safetensors", metadata=about)
    policy, kept = Policy(clusters=3, share=0.5), []
    for place in (plain, other):
        out = tmp_path / f"reduced-{place.name}"
        reduce_scan(spec, folder / "scan", out, policy, comm, codes=place)
        kept.append(selected(shards, out))
    assert kept[0] == kept[1]
    with pytest.raises(ConfigError, match="give --clusters with them, and no --labels"):
        reduce_scan(spec, folder / "scan", tmp_path / "x", Policy(share=0.5), comm, codes=plain)
    lost = plain / f"{shards.names[1]}.safetensors"
    moved = shutil.move(lost, tmp_path / "aside")
    with pytest.raises(DataError, match=r"write them with tools/caption\.py --codes"):
        CodeFiles(plain, shards)
    about = {"about": '{"source": "x", "num_codes": 9}'}
    save_file({"ids": np.zeros(1, np.int64)}, lost, metadata=about)
    with pytest.raises(DataError, match="changed since"):
        CodeFiles(plain, shards)
    shutil.move(moved, lost)
    assert CodeFiles(plain, shards).identity.dim == CODES
