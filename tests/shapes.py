"""Shapes in signatures of `trainer/` are checked while tests run.

Wrapped are the functions that name a shape, and each when it is first called. Wrapping every
function when it is defined, as jaxtyping does, is ten seconds of each start of pytest and makes
every call many times slower; mypy reads other types.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype
from jaxtyping import _import_hook, install_import_hook

__all__ = ["check_shapes", "checked_when_called"]

_EveryFunction = _import_hook.JaxtypingTransformer


def checked_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its shapes checked; what checks them is made by the first call."""
    made: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not made:
            made.append(jaxtyping.jaxtyped(function, typechecker=beartype))
        return made[0](*arguments, **named)

    return call


class _ThoseWithShapes(_EveryFunction):
    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if names_a_shape(node):
            # The innermost, as annotations are those of the function itself.
            decorator = ast.copy_location(_decorator(self._typechecker.get_hash()), node)
            node.decorator_list.append(decorator)
        self.generic_visit(node)
        return node


def _decorator(number: str) -> ast.expr:
    """`checked_when_called`, by a name that every module has which jaxtyping has looked through."""
    return ast.parse(f"jaxtyping._import_hook.Typechecker.lookup[{number!r}]", mode="eval").body


def names_a_shape(function: ast.FunctionDef) -> bool:
    """Whether an annotation has the form `Float[Tensor, "rows dim"]`."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = [function.returns, *(argument.annotation for argument in arguments)]
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Tuple)
        and isinstance(node.slice.elts[-1], ast.Constant)
        and isinstance(node.slice.elts[-1].value, str)
        for annotation in annotations
        if annotation is not None
        for node in ast.walk(annotation)
    )


def check_shapes(package: str) -> None:
    """From now on modules of a package are imported with their shapes checked."""
    _import_hook.JaxtypingTransformer = _ThoseWithShapes
    # By this name, so that compiled files of other wrappings are not taken for these.
    install_import_hook(package, "tests.shapes.checked_when_called")
