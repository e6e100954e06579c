"""What an author of a recipe is told: one sentence for what the contract asks and he forgot."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from trainer.config import RecipeConfig, parse_run
from trainer.errors import ConfigError
from trainer.models.config import ImageTowerConfig


def test_a_config_without_a_model_is_refused_where_it_is_made() -> None:
    with pytest.raises(ConfigError, match="Forgetful declares no model; a recipe's Config needs"):

        class Forgetful(RecipeConfig):
            name: Literal["forgetful"] = "forgetful"


def test_a_config_inherits_its_model_and_says_no_stores_of_its_own() -> None:
    class Parent(RecipeConfig):
        name: str = "parent"
        model: ImageTowerConfig = ImageTowerConfig()

    class Child(Parent):
        name: str = "child"

    assert Child().model.image_size == Parent().model.image_size == ImageTowerConfig().image_size
    assert list(Child().stores()) == []


def test_only_a_recipe_that_learns_from_a_store_names_it() -> None:
    run = "{{workdir: w, steps: 1, global_batch: 8, recipe: {recipe}, data: {{train: x.tar}}}}"
    flame = parse_run(run.format(recipe="{name: flame, store: vectors}"))
    assert list(flame.recipe.stores()) == [Path("vectors")]
    assert list(parse_run(run.format(recipe="{name: clip}")).recipe.stores()) == []
