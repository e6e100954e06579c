"""A configuration is read whole or refused in one sentence that names the key and the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.config import RunConfig, dump_run, load_run, parse_run
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[1]
STUDIES = ("compare", "scaling")  # files of several runs
RUNS = [path for path in (ROOT / "launch/runs").glob("*.yaml") if not path.name.startswith(STUDIES)]
RUN = """
workdir: run
steps: 10
global_batch: 8
recipe: {name: clip}
data: {train: "a-000000.tar"}
evals:
- {name: retrieval, label: pairs, data: "b-000000.tar"}
- {name: zero_shot, label: names, data: "b-000000.tar"}
"""


def refused(*overrides: str, text: str = RUN) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run(text, overrides, source="run.yaml")
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stpes=5", "stpes: there is no such key; did you mean 'steps'?"),
        ("learning_rate=1", "did you mean optim.learning_rate?"),
        ("data.reader=indexd", "data.reader: 'indexd' is not known; did you mean 'indexed'?"),
        ("recipe.name=clpi", "recipe: no recipe is called 'clpi'; did you mean 'clip'?"),
        ("recipe={}", "recipe: name is missing; it is one of aclip, "),
        ("recipe=7", "recipe: "),
        ("recipe.modell={}", "recipe.modell: there is no such key; did you mean 'model'?"),
        ("recipe.model.image.width=a", "recipe.model.image.width: should be a valid integer"),
        ("recipe.model.image.poolin=mean", "did you mean 'pooling'?"),
        ("evals.1.tamplates=[]", "evals.1.tamplates: there is no such key; did you mean"),
        ("evals.1.name=zero-shot", "evals.1.name: 'zero-shot' is not known; did you mean"),
        ("steps=abc", "steps: should be a valid integer, unable to parse string as an integer"),
        ("steps=", "steps: should be a valid integer, found nothing"),
        ("save_every=5m", "save_every: '5m' is no period; write '1000 steps'"),
        ("log_every=0 steps", "log_every: '0 steps' is no period"),
        ("log_every=1.2.3 steps", "log_every: '1.2.3 steps' is no period"),
        ("data=", "data: should be a valid dictionary"),
    ],
)
def test_a_mistake_is_named_with_file_path_and_what_was_probably_meant(override, says):
    said = refused(override)
    assert said.startswith(f"run.yaml with {override}: ")
    assert says in said
    assert "Value error" not in said


def test_a_wrong_preset_has_no_follow_up_errors():
    said = refused("recipe.model.preset=tinyy")
    assert said.endswith("recipe.model.preset: 'tinyy' is not known; did you mean 'tiny'?")


def test_mistakes_of_recipe_and_run_are_told_together_and_known_keys_once():
    said = refused("steps=0", "recipe.xyzzy=1", "recipe.plugh=1")
    assert said.count(";") >= 2
    assert "steps: should be greater than 0" in said
    assert said.count("known: ") == 1


def test_a_missing_key_says_what_it_is():
    said = refused(text="workdir: run\nsteps: 1\nrecipe: {name: clip}\ndata: {train: a.tar}\n")
    assert "global_batch: is missing (Samples per optimizer step over all ranks)" in said


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RUN + "steps: 20\n", "the key 'steps' stands twice in one section (line 10"),
        ("a: [", "is not YAML"),
        ("!!timestamp x", "is not YAML"),
        ("\x00", "is not YAML"),
        ("[" * 3000, "nested too deeply"),
        ("- a", "must be a mapping"),
    ],
)
def test_text_that_is_no_configuration_is_one_sentence(text, says):
    assert says in refused(text=text)


def test_a_file_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"steps: \xff")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load_run(tmp_path / "run.yaml")


def test_overrides_reach_into_lists_and_read_numbers_as_people_write_them():
    run = parse_run(
        RUN, ["evals.0.limit=10", "evals.-1.templates=['{}']", "steps=1e4", "optim.epsilon=1e-8"]
    )
    assert (run.evals[0].limit, run.evals[1].templates, run.steps) == (10, ("{}",), 10_000)
    assert run.optim.epsilon == 1e-8
    assert parse_run(RUN.replace("steps: 10", "steps: 2e3")).steps == 2000


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evals.2.limit=1", "evals is a list of 2 entries, counted from 0; '2' is none"),
        ("evals.pairs.limit=1", "'pairs' is none"),
        ("steps.a=1", "steps is not a section"),
        ("steps", "has no '='"),
        ("=5", "has no key"),
        ("steps={", "the value is not YAML"),
    ],
)
def test_an_override_that_leads_nowhere_says_so(override, says):
    said = refused(override)
    assert said.startswith(f"override {override!r}")
    assert says in said


def test_an_override_of_one_section_leaves_its_alias_alone():
    text = RUN.replace("- {name: retrieval", "- &first {name: retrieval") + "- *first\n"
    run = parse_run(text, ["evals.0.limit=5", "evals.2.label=again"])
    assert [entry.limit for entry in run.evals] == [5, None, None]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_comes_back_from_its_resolved_text(path):
    run = load_run(path)
    assert parse_run(dump_run(run)) == run


def test_a_period_keeps_every_digit_through_the_resolved_text():
    run = parse_run(RUN, ["save_every=1234567 samples", "log_every=0.1 epochs"])
    assert "save_every: 1234567 samples" in dump_run(run)
    assert parse_run(dump_run(run)) == run


def test_the_home_folder_is_spelt_out_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = parse_run(
        RUN,
        [
            "workdir=~/run",
            "data.train=~/a.tar::s3://b/~c.tar::~/d-{0..3}.tar",
            "evals.0.data=~/b.tar",
            "evals.1.train=~/c.tar",
            "deepspeed=~/zero.json",
            "recipe.model.text.path=~/bert",
            "recipe.model.tokenizer=~/words",
        ],
    )
    assert run.workdir == tmp_path / "run"
    assert run.data.train == f"{tmp_path}/a.tar::s3://b/~c.tar::{tmp_path}/d-{{0..3}}.tar"
    assert (run.evals[0].data, run.evals[1].train) == (f"{tmp_path}/b.tar", f"{tmp_path}/c.tar")
    assert "~" not in dump_run(run).replace("/~c", "")
    assert "no home folder is known for '~nobody-here'" in refused("workdir=~nobody-here/x")


def test_every_path_of_the_configuration_is_spelt_out():
    """A field whose type is a bare Path or that names a model would keep `~` as it is."""
    from trainer.settings.recipe_files import recipe_module, recipe_names

    bare = [
        f"{section.__name__}.{name}"
        for recipe in recipe_names()
        for section in sections_below(recipe_module(recipe).Config)
        for name, field in section.model_fields.items()
        if "Path" in str(field.annotation) and not any("home" in str(m) for m in marks(field))
    ]
    assert not bare


def marks(field):
    """Metadata of a field and of the members of its union."""
    import typing

    found = list(field.metadata)
    for argument in typing.get_args(field.annotation):
        found += getattr(argument, "__metadata__", ())
    return found


def sections_below(section):
    from trainer.settings.errors import _sections_in

    yield section
    for field in section.model_fields.values():
        for below in _sections_in(field.annotation):
            yield from sections_below(below)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.epoch_samples=10"], "epoch_samples is not read where reader is indexed"),
        (["data.allow_pipe=true"], "drop allow_pipe, or set reader to webdataset"),
        (["data.reader=webdataset", "data.window_shards=2"], "window_shards is not read"),
        (["evals.0.templates=['{}']"], "evals.0: templates is not read where name is retrieval"),
        (["evals.0.train=a.tar"], "evals.0: train is not read where name is retrieval"),
        (["evals.0.target=cls"], "evals.0: target is not read"),
        (["evals.1.caption=long"], "caption is not read where name is zero_shot"),
        (["evals.0.languages=[de]"], "languages is not read"),
        (["evals.0.text_vectors=[0]"], "text_vectors is not read where text_store is null"),
        (["data.augment.jitter_probability=0", "data.augment.jitter=[0,0,0,0]"], "jitter is not"),
        (["evals.0.name=knn"], "evals.0: knn needs `train`"),
        (["evals.0.label=names"], "evals: several evaluations are labelled names"),
        (["evals.1.templates=[a]"], "evals.1.templates: template 'a' has no {}"),
        (["data.augment.crop_scale=[1.0, 0.5]"], "must be the lowest and the highest"),
        (
            ["recipe={name: mlcd, classes: [cls]}", "evals=[]", "data.captions.fields=[long]"],
            "data.captions: the model of mlcd has no text tower",
        ),
        (
            ["recipe={name: mlcd, classes: [cls]}", "evals=[]", "optim.text_learning_rate=1e-5"],
            "optim.text_learning_rate: the model of mlcd has no text tower",
        ),
    ],
)
def test_a_key_that_other_keys_make_meaningless_is_refused(overrides, says):
    assert says in refused(*overrides)


def test_help_names_files_that_exist():
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "400"},
    )
    named = [word.strip(",.") for word in done.stdout.split() if "/" in word and ".yaml" in word]
    assert named
    assert all((ROOT / name).is_file() for name in named)
    assert yaml.safe_load((ROOT / named[0]).read_text())["recipe"]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"name": "clip", "model": {"bias": True}}, "clip trains no model.bias; drop it, or use"),
        ({"name": "clip", "model": {"head": {}}}, "clip trains no model.head; drop it, or use"),
        ({"name": "siglip", "model": {"head": {"dim": 8}}}, "siglip trains no model.head"),
        ({"name": "siglip", "model": {"bias": False}}, "siglip trains with a bias; drop `bias:"),
        ({"name": "protoclip", "model": {"bias": True}}, "protoclip trains no model.bias"),
        ({"name": "flame", "store": "s", "model": {"head": {}}}, "flame trains no model.head"),
        ({"name": "clip", "model": {"logit_bias_init": -5}}, "logit_bias_init is not read"),
        ({"name": "clip", "model": {"prototype_scale_init": 5}}, "prototype_scale_init is not"),
        ({"name": "flame", "store": "s", "loss": "mp_nce", "logit_bias_init": 1}, "is not read"),
        ({"name": "mlcd", "classes": ["a"], "loss": "mlc", "drop_unlabelled": True}, "not read"),
        ({"name": "mlcd", "classes": ["a"], "head": {"momentum": 0.5}}, "set optimizer to sgd"),
        (
            {"name": "mlcd", "classes": ["a"], "head": {"optimizer": "sgd", "epsilon": 1.0}},
            "epsilon is not read where optimizer is sgd",
        ),
        ({"name": "protoclip", "model": {"head": {"layers": 0, "hidden": 5}}}, "hidden is not"),
        ({"name": "mlcd", "classes": ["a"], "labels_per_sample": 2}, "1 keys of `classes` give"),
        (
            {"name": "clip", "model": {"text": {"path": "b"}, "vocabulary": 300}},
            "vocabulary is that of the tokenizer in b; drop it",
        ),
        ({"name": "clip", "model": {"tokenizer": "t", "vocabulary": 300}}, "in t; drop it"),
        ({"name": "clip", "model": {"vocabulary": None}}, "vocabulary is null, and no tokenizer"),
    ],
)
def test_a_part_of_the_model_that_a_recipe_does_not_train_is_refused(recipe, says):
    values = {**yaml.safe_load(RUN), "recipe": recipe, "evals": []}
    assert says in refused(text=yaml.safe_dump(values))


def test_the_resolved_text_says_which_model_a_recipe_makes():
    siglip = parse_run(RUN, ["recipe.name=siglip"]).recipe
    protoclip = parse_run(RUN, ["recipe.name=protoclip", "recipe.model.head.layers=0"]).recipe
    assert (siglip.model.bias, siglip.model.head) == (True, None)
    assert (protoclip.model.bias, protoclip.model.head.layers) == (False, 0)
    for name in ("clip", "siglip", "protoclip"):
        run = parse_run(RUN, [f"recipe.name={name}"])
        assert parse_run(dump_run(run)) == run


def test_every_mark_names_a_key_of_its_section_and_holds_for_some_value_of_it():
    from trainer.settings.recipe_files import recipe_module, recipe_names
    from trainer.settings.section import OnlyWhere, OnlyWith

    roots = [recipe_module(name).Config for name in recipe_names()]
    found = 0
    for section in {below for root in (RunConfig, *roots) for below in sections_below(root)}:
        for name, field in section.model_fields.items():
            for mark in (m for m in field.metadata if isinstance(m, OnlyWhere)):
                found += 1
                assert mark.key in section.model_fields, (section, name)
                if not isinstance(mark, OnlyWith):
                    known = str(section.model_fields[mark.key].annotation)
                    assert all(repr(value) in known for value in mark.values), (section, name)
    assert found >= 20
