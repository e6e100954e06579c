"""What the check of shapes catches while tests run."""

from __future__ import annotations

import ast

import jaxtyping
import pytest
import torch

from tests.shapes import names_a_shape
from trainer.comm import Comm
from trainer.losses.contrastive import info_nce


def test_a_tensor_of_another_shape_than_the_signature_says_is_refused() -> None:
    scale, rows = torch.tensor(1.0), torch.eye(4)
    assert info_nce(rows, rows, scale, Comm.solo()) > 0
    with pytest.raises(jaxtyping.TypeCheckError, match="info_nce"):
        info_nce(rows, rows[:, :3], scale, Comm.solo())


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ('Float[Tensor, "rows dim"]', True),
        ('tuple[Float[Tensor, "rows dim"], int] | None', True),
        ("dict[str, Tensor]", False),
        ('Literal["image", "text"]', True),  # wrapped too: harmless
        ("", False),
    ],
)
@pytest.mark.parametrize("place", ["argument", "result"])
def test_functions_that_name_a_shape_are_found(annotation: str, expected: bool, place: str) -> None:
    argument = f": {annotation}" if annotation and place == "argument" else ""
    result = f" -> {annotation}" if annotation and place == "result" else ""
    (function,) = ast.parse(f"def f(x{argument}){result}: ...").body
    assert isinstance(function, ast.FunctionDef)
    assert names_a_shape(function) == expected
