"""Prompts of the suites, from where they may be read: lm-evaluation-harness, or a local copy.

No prompt of a suite is kept in this project. What is kept is the SHA-256 of each upstream prompt:
what is read must have it, so that "upstream" means upstream to the last character.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def digest(text: str) -> str:
    """First 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def lm_eval_folder() -> Path:
    """`tasks` of the installed lm-evaluation-harness, found without importing it.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the suites' prompts come from lm-evaluation-harness, which is not installed; "
            "pip install 'allmem[evals]'"
        )
    return Path(spec.submodule_search_locations[0]) / "tasks"


def lm_eval_installed() -> bool:
    """Whether its prompts can be read."""
    return importlib.util.find_spec("lm_eval") is not None


def file_in_copy(folder: str, file: str, *, upstream: str, key: str) -> Path:
    """A file of a local copy of upstream.

    Args:
        folder: the copy's, as `eval.suites.KEY` has it.
        file: its path in there.
        upstream: OWNER/NAME, for the message.
        key: likewise.

    Raises:
        ValueError: it is not there.
    """
    path = Path(folder).expanduser() / file
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; give the folder of a copy of {upstream}, or leave "
            f"eval.suites.{key} empty"
        )
    return path


class _Loader(yaml.SafeLoader):
    """YAML with the harness's `!function` tags, which are left unread."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def lm_eval_yaml(path: str) -> dict[str, Any]:
    """A task file of the harness, its functions as None."""
    text = (lm_eval_folder() / path).read_text(encoding="utf-8")
    value: dict[str, Any] = yaml.load(text, Loader=_Loader)
    return value


def literals(path: Path) -> dict[str, Any]:
    """The constants that a Python file assigns at its top, read without running it."""
    values: dict[str, Any] = {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                values[statement.targets[0].id] = ast.literal_eval(statement.value)
            except ValueError:  # computed when run: not a constant
                continue
    return values


def check_prompts(
    prompts: Mapping[str, str], digests: Mapping[str, str], *, source: str, mend: str
) -> None:
    """Check that prompts are upstream's.

    Raises:
        ValueError: one differs or is missing.
    """
    for name, wanted in digests.items():
        if name not in prompts:
            raise ValueError(f"{source} has no prompt for {name}; {mend}")
        if digest(prompts[name]) != wanted:
            raise ValueError(f"{source}: the prompt of {name} is not upstream's; {mend}")
