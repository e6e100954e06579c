"""Folders of zero-shot benchmarks as people have them: `cls`, `classnames.txt`, template files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch

from tests.evals.rank_cases import setting
from tests.evals.test_sets import png_of, random_pictures
from trainer.comm import Comm
from trainer.config import EvalConfig, parse_run
from trainer.data.index import write_index
from trainer.errors import DataError
from trainer.evals import run_eval
from trainer.evals.features import embed_images, embed_texts
from trainer.evals.zero_shot import prompts_of
from trainer.prompt_templates import SETS, read_templates

NAMES = ["water bird", "ant", "crane", "crane"]  # in no order, and one name twice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pictures in `test/0.tar`, a class in six."""
    (tmp_path / "test").mkdir()
    path = tmp_path / "test" / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number, pixels in enumerate(random_pictures(24, seed=3)):
            members = {"cls": str(number % 4).encode(), "png": png_of(pixels)}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    write_index(str(path))
    (tmp_path / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    templates = "# two of them\na picture of {c}\n\n{c} up close\n"
    (tmp_path / "zeroshot_classification_templates.txt").write_text(templates)
    return tmp_path


def evaluation(folder: Path, **changes: object) -> EvalConfig:
    values = {
        "name": "zero_shot",
        "label": "standard",
        "data": str(folder / "test" / "0.tar"),
        "target": "cls",
        "class_names": folder / "classnames.txt",
        "templates": str(folder / "zeroshot_classification_templates.txt"),
    }
    return EvalConfig.model_validate(values | changes)


def test_a_benchmarks_folder_is_read_as_it_is(folder: Path) -> None:
    """Accuracy by plain argmax over the names in the file's order."""
    config = evaluation(folder)
    assert config.templates == ("a picture of {}", "{} up close")
    assert prompts_of(config)[:3] == [
        *("a picture of water bird", "water bird up close", "a picture of ant")
    ]
    model, context = setting(Comm.solo(), config.data)
    figures = run_eval(config, model, context)
    images = embed_images(config.data, model, context).features
    texts = embed_texts(prompts_of(config), model, context).view(4, 2, -1).mean(dim=1)
    scores = images @ torch.nn.functional.normalize(texts, dim=1).T
    right = scores.argmax(dim=1) == torch.arange(24) % 4
    assert figures["top1"] == pytest.approx(100 * float(right.float().mean()))
    assert (figures["classes"], figures["samples"]) == (4, 24)


def test_a_class_that_the_file_does_not_name_is_one_sentence(folder: Path) -> None:
    (folder / "classnames.txt").write_text("only one\n")
    config = evaluation(folder)
    model, context = setting(Comm.solo(), config.data)
    with pytest.raises(DataError, match=r"cls is '1', and .* names the classes 0 to 0"):
        run_eval(config, model, context)
    (folder / "classnames.txt").unlink()
    with pytest.raises(DataError, match="class_names: can't read"):
        run_eval(config, model, context)


def test_templates_by_name_and_their_mistakes(folder: Path) -> None:
    assert read_templates("photos") == SETS["photos"]
    assert all("{}" in each for templates in SETS.values() for each in templates)
    with pytest.raises(ValueError, match="neither a file nor a set of templates; sets: plain"):
        read_templates("fotos")
    empty = folder / "empty.txt"
    empty.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no template"):
        read_templates(str(empty))
    wrong = folder / "wrong.txt"
    wrong.write_text("a picture\n")
    with pytest.raises(ValueError, match="for the class name"):
        evaluation(folder, templates=str(wrong))


def test_a_run_keeps_the_templates_and_not_the_file(folder: Path) -> None:
    from trainer.config import dump_run

    text = f"""
workdir: runs/x
steps: 1
global_batch: 2
recipe: {{name: clip}}
data: {{train: a.tar}}
evals: [{{name: zero_shot, label: a, data: b.tar,
         templates: {folder / "zeroshot_classification_templates.txt"}}}]
"""
    run = parse_run(text)
    assert parse_run(dump_run(run)) == run
    assert "a picture of {}" in dump_run(run)
