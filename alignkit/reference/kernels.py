"""docs/reference/kernels.md: the public names of `alignkit_kernels`, as their source has them."""

import ast
import inspect
from collections.abc import Iterator
from typing import Any, get_args

import alignkit_kernels
from alignkit.reference.markdown import WRITTEN, code, doc, table
from alignkit_kernels import losses

HEAD = """# `alignkit_kernels`

`pip install alignkit-kernels` needs torch, and triton on a GPU. How these fit together, what they compute and how fast:
[kernels.md](../kernels.md). B is the batch."""
WIDTH = 100


def page() -> str:
    lines = [WRITTEN, "", HEAD, "", doc(alignkit_kernels)]
    for name in alignkit_kernels.__all__:
        if name != "losses":
            lines += _entry(name, getattr(alignkit_kernels, name))
    lines += ["", "# `alignkit_kernels.losses`", "", doc(losses)]
    for name in losses.__all__:
        if name not in alignkit_kernels.__all__:
            lines += _entry(f"losses.{name}", getattr(losses, name))
    return "\n".join(lines) + "\n"


def _entry(name: str, thing: Any) -> list[str]:
    lines = ["", f"## {name}", ""]
    if not inspect.isclass(thing) and not inspect.isfunction(thing):  # an alias of types
        return [*lines, code(" | ".join(kind.__name__ for kind in get_args(thing)))]
    node = ast.parse(inspect.getsource(thing)).body[0]
    if isinstance(node, ast.FunctionDef):
        return [*lines, "```python", _signature(name, node), "```", *_text(doc(thing))]
    assert isinstance(node, ast.ClassDef)
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    rows = table(("field", "type", "default"), _fields(node))
    return [*lines, "```python", f"class {name}{bases}", "```", *_text(doc(thing)), *(["", *rows] if rows else [])]


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    for part in node.body:
        if isinstance(part, ast.AnnAssign):
            yield code(ast.unparse(part.target)), code(ast.unparse(part.annotation)), _default(part.value)
        elif isinstance(part, ast.Assign):
            yield code(ast.unparse(part.targets[0])), "", _default(part.value)


def _text(docstring: str) -> list[str]:
    """As it is: arguments a line each, and formulas, are no markdown."""
    return ["", "```text", docstring, "```"]


def _default(value: ast.expr | None) -> str:
    return code(ast.unparse(value)) if value else ""


def _signature(name: str, node: ast.FunctionDef) -> str:
    """The signature, an argument a line where one line is too long."""
    given = node.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    arguments = [*map(_argument, given.args, defaults), *["*"] * bool(given.kwonlyargs)]
    arguments += map(_argument, given.kwonlyargs, given.kw_defaults)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if argument.annotation else "="
    return ast.unparse(argument) + (f"{equals}{ast.unparse(default)}" if default else "")
