"""Text of `--help`, made from the schema's docstrings and the YAML files' first comments."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
import typing
from dataclasses import MISSING, fields, is_dataclass

from pipeline.config import CONFIG_DIR, dataclass_in, groups, nearest
from pipeline.schema import STAGES, RunConfig


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for node, after in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


def option_summary(group: str, option: str) -> str:
    """The comment on the first line of a group's option."""
    first = (CONFIG_DIR / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    comments = [line[1:].strip() for line in first[:3] if line.startswith("#")]
    return next((line for line in comments if line and not line.startswith("@")), "")


_SECTION_OF_STAGE = {"prepare": "data", "evaluate": "eval"}
"""Stages whose section of settings has another name."""


def help_text(section: str | None = None) -> str:
    """Text of `--help`, or of `--help SECTION`: every field with its default and meaning.

    Args:
        section: `data`, or a section inside one, such as `data.dedup` or `data.sources.filters`;
            or a stage.

    Raises:
        ValueError: unknown section.
    """
    sections = _sections_in(RunConfig)
    if section is not None:
        section = _SECTION_OF_STAGE.get(section, section)
        first, *rest = section.split(".")
        if first not in sections:
            raise ValueError(f"{first} is not a section{nearest(first, list(sections))}")
        cls = sections[first]
        for name in rest:
            known_inner = _sections_in(cls)
            if name not in known_inner:
                raise ValueError(f"{section} is not a section{nearest(name, list(known_inner))}")
            cls = known_inner[name]
        return _section_help(section, cls)
    known = groups()
    docs = field_docs(RunConfig)
    lines = [
        "Usage: python -m pipeline.run stage=NAME recipe=NAME run.dir=DIR "
        "[group=option …] [key=value …]",
        "",
        "Stages:   " + ", ".join((*STAGES, "all")) + "; convert@mamba2 for the",
        "          baseline's branch, convert:on_policy for its round on collected responses.",
        "          `all` runs the recipe's stages in order, skips finished ones, resumes the rest.",
        "Recipes:",
        *(f"  {name:<16} {option_summary('recipe', name)}" for name in known["recipe"]),
        "Groups (group=option):",
        *(
            f"  {name:<10} {', '.join(known[name])}"
            for name in known
            if name not in ("recipe", "stage")
        ),
        "Sections (section.key=value; `--help SECTION` lists the keys):",
        *(f"  {name:<10} {docs.get(name, '')}" for name in sections if name != "stage"),
        "",
        "`--cfg` prints the composed configuration and stops. Example:",
        "  python -m pipeline.run stage=all recipe=demo run.dir=runs/demo convert.steps=200",
    ]
    return "\n".join(lines)


def _sections_in(cls: type) -> dict[str, type]:
    """Fields of a section that are, or list, sections themselves."""
    hints = typing.get_type_hints(cls)
    return {name: inner for name, hint in hints.items() if (inner := dataclass_in(hint))}


def _section_help(section: str, cls: type) -> str:
    docs = field_docs(cls)
    inner = _sections_in(cls)
    lines = [f"{section}: {' '.join((cls.__doc__ or '').split())}"]
    for item in fields(cls):
        if item.default is not MISSING:
            default = json.dumps(item.default, default=str)
        else:
            made = "(required)" if item.default_factory is MISSING else item.default_factory()
            default = "(section)" if is_dataclass(made) else str(made)
        if item.name in inner:
            default += f"   (--help {section}.{item.name} lists the keys)"
        lines.append(f"  {section}.{item.name} = {default}")
        lines.extend(
            textwrap.wrap(
                docs.get(item.name, ""), 92, initial_indent="      ", subsequent_indent="      "
            )
        )
    lines.append("Defaults are the schema's; a recipe may set others (see --cfg).")
    return "\n".join(lines)
