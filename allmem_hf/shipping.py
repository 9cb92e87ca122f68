"""The code that goes beside exported weights: the model's modules and all that they import here.

transformers copies a folder's modules one by one and finds them by their text, so they lie flat in
the folder: `kernels.ttt_memory.reference` becomes `ttt_memory_reference.py`, and each import of a
project module becomes a relative one. Modules that are imported inside functions (Triton kernels,
FlexAttention) go along: where the device and the packages have them, they are used without this
project.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGES = ("allmem_hf", "kernels")
ROOTS = ("allmem_hf.configuration_allmem", "allmem_hf.modeling_allmem")


@cache
def shipped_modules() -> dict[str, str]:
    """Module of this project -> its name beside the weights."""
    found: dict[str, str] = {}
    waiting = list(ROOTS)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found[module] = _flat(module)
        for node in _imports(ast.parse(_source(module))):
            waiting.extend(_split(node)[0].values())
            if _split(node)[1]:
                waiting.append(str(node.module))
    names = sorted(found.values())
    assert len(set(names)) == len(names), names  # two modules would be one file
    return dict(sorted(found.items()))


def shipped_source(module: str) -> str:
    """A module's text with this project's imports turned into relative ones.

    Raises:
        ValueError: an import whose form cannot be turned.
    """
    text = _source(module)
    lines = text.splitlines()
    for node in sorted(_imports(ast.parse(text)), key=lambda node: -node.lineno):
        lines[node.lineno - 1 : node.end_lineno] = _relative(node)
    return "\n".join(lines) + "\n"


def _imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """The imports of this project's modules, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    raise ValueError(
                        f"`import {alias.name}` cannot be shipped; write `from … import …`"
                    )
        elif (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] in PACKAGES
        ):
            yield node


def _split(node: ast.ImportFrom) -> tuple[dict[str, str], list[ast.alias]]:
    """What an import names: modules by the name they get, and things of the module itself."""
    spec = importlib.util.find_spec(str(node.module))
    is_package = spec is not None and spec.submodule_search_locations is not None
    modules, things = {}, []
    for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        if is_package and importlib.util.find_spec(whole) is not None:
            modules[alias.asname or alias.name] = whole
        else:
            things.append(alias)
    return modules, things


def _relative(node: ast.ImportFrom) -> list[str]:
    indent = " " * node.col_offset
    modules, things = _split(node)
    lines = []
    for name, module in modules.items():
        flat = _flat(module)
        # transformers only sees, and copies, modules that something is imported from
        lines.append(f"{indent}from .{flat} import __name__ as _{flat}")
        lines.append(f"{indent}from . import {flat} as {name}")
    if things:
        wanted = ", ".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in things)
        lines.append(f"{indent}from .{_flat(str(node.module))} import ({wanted})")
    return lines


def _flat(module: str) -> str:
    return "_".join(module.split(".")[1:])


@cache
def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"module {module!r} is not installed; install the project as a whole")
    return Path(spec.origin).read_text(encoding="utf-8")


__all__ = ["shipped_modules", "shipped_source"]
