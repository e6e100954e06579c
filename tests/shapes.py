"""Shapes in signatures of `trainer/` are checked while tests run.

Wrapped are the functions that name a shape. Wrapping every function, as jaxtyping does, is ten
seconds of each start of pytest and makes every call many times slower; mypy reads other types.
"""

from __future__ import annotations

import ast

from beartype import beartype as checked
from jaxtyping import _import_hook, install_import_hook

__all__ = ["check_shapes", "checked"]

_EveryFunction = _import_hook.JaxtypingTransformer


class _ThoseWithShapes(_EveryFunction):
    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if names_a_shape(node):
            return super().visit_FunctionDef(node)
        self.generic_visit(node)
        return node


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
    install_import_hook(package, "tests.shapes.checked")
