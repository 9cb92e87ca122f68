"""From words on the command line to a `RunConfig`: Hydra composes, dataclasses check.

Stages never see OmegaConf: `compose` returns frozen dataclasses. Whatever is wrong with a key, a
group's option or a value is one `ValueError` line that names the nearest right one.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from allmem_megatron.config import BaseModelConfig
from pipeline.entries import split_entry as split_entry
from pipeline.lineage import check_rounds
from pipeline.nearest import nearest as nearest
from pipeline.schema import RunConfig

PROJECT_ROOT = Path(__file__).resolve().parent.parent
"""Folder that holds `configs/`; relative paths are also looked up here."""

CONFIG_DIR = PROJECT_ROOT / "configs"
"""The YAML files of Hydra."""


def groups() -> dict[str, list[str]]:
    """The configuration groups and the options of each."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONFIG_DIR.iterdir())
        if folder.is_dir()
    }


def schema_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema, sections included."""
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        key = prefix + item.name
        yield key
        inner = dataclass_in(hints[item.name])
        if inner is not None:
            yield from schema_keys(inner, key + ".")
        elif _is_mapping(hints[item.name]):
            yield key + ".*"


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type hint is or contains, or None."""
    for option in (hint, *typing.get_args(hint)):
        if is_dataclass(option) and isinstance(option, type):
            return option
    return None


def _is_mapping(hint: Any) -> bool:
    options = (hint, *typing.get_args(hint))
    return any(option is dict or typing.get_origin(option) is dict for option in options)


def compose(overrides: Sequence[str]) -> RunConfig:
    """Compose `configs/run.yaml` with overrides of the command line and check everything.

    Args:
        overrides: Hydra overrides, `recipe=demo`, `convert.lr=1e-3`, `data.kinds=[text]`, …

    Raises:
        ValueError: an unknown key, option or stage, a value of the wrong type or out of range.
    """
    prepared, recipe = _check_overrides(overrides)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = hydra_compose("run", overrides=prepared)
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"configuration does not compose: {line}; see --help") from error
    values = {**typing.cast(Mapping[str, Any], plain), "recipe": recipe}
    values["run"] = {"dir": f"runs/{recipe}", **values.get("run", {})}
    config: RunConfig = build(RunConfig, values)
    for entry in config.stages:
        split_entry(entry)
    split_entry(config.stage.name)
    _check_together(config)
    return config


def _check_overrides(overrides: Sequence[str]) -> tuple[list[str], str]:
    """Refuse unknown keys and options; overrides that Hydra takes, and the recipe's name."""
    known_groups = groups()
    keys = sorted(set(schema_keys()))
    prepared, recipe, entry = [], None, "all"
    for text in overrides:
        override = _parse(text, keys)
        key = override.key_or_group
        value = override.value()
        if key in known_groups:
            option = str(value)
            if key == "stage":
                split_entry(option)
                entry = option
                continue
            if option not in known_groups[key]:
                raise ValueError(
                    f"{key}={option} is unknown{nearest(option, known_groups[key])} "
                    f"({key} has: {', '.join(known_groups[key])}; a file "
                    f"configs/{key}/{option}.yaml would add it)"
                )
            recipe = option if key == "recipe" else recipe
            prepared.append(f"{key}={option}")
            continue
        if not _known_key(key, keys):
            shown = [name for name in keys if not name.endswith("*")] + sorted(known_groups)
            raise ValueError(f"{key} is not a setting{nearest(key, shown)}")
        prepared.append("++" + text.lstrip("+"))
    if recipe is None:
        raise ValueError(
            f"recipe is not given; set recipe=NAME, one of {', '.join(known_groups['recipe'])}"
        )
    return [f"stage={split_entry(entry)[0]}", f"++stage.name='{entry}'", *prepared], recipe


def _parse(text: str, keys: list[str]) -> Override:
    if "=" not in text or text.startswith("~"):
        flat = text.lstrip("~")
        raise ValueError(f"{text!r} is not KEY=VALUE{nearest(flat, keys)}")
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{text!r} cannot be read: {line}; quote the value") from error
    if override.is_sweep_override():
        raise ValueError(f"{text!r} is a sweep; give one value, or a list in brackets [a,b]")
    return override


def _known_key(key: str, keys: Sequence[str]) -> bool:
    if key in keys:
        return True
    return any(name.endswith(".*") and key.startswith(name[:-1]) for name in keys)


def _check_together(config: RunConfig) -> None:
    """Rules between sections."""
    if "plan" in config.stages:
        raise ValueError(
            "stages holds plan, which is no part of a recipe; remove it and call stage=plan"
        )
    if config.model.scratch is not None and "pretrain" not in config.stages:
        raise ValueError(
            "model.scratch starts from random weights but the recipe's stages have no pretrain; "
            "put pretrain first in stages or set model.path"
        )
    if config.model.scratch is not None:
        check_memory(config, config.model.scratch)
    check_rounds(config)


def check_memory(config: RunConfig, base: BaseModelConfig) -> None:
    """Refuse a memory whose heads do not fit this base model, where a stage trains one."""
    names = {split_entry(entry)[0] for entry in config.stages}
    if names & {"align", "convert", "sft"}:
        config.mixer.memory.heads(base)


# --- plain values → dataclasses -------------------------------------------------------------------


def build(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """Make a (nested) dataclass from plain values, checking names and types.

    Raises:
        ValueError: unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'the configuration'}={values!r} must be a section of keys")
    names = {item.name: item for item in fields(cls) if item.init}
    prefix = path + "." if path else ""
    for key in values:
        if key not in names:
            raise ValueError(f"{prefix}{key} is not a setting{nearest(str(key), list(names))}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, item in names.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], prefix + name)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{prefix}{name} is not set; give {prefix}{name}=VALUE")
    return cls(**arguments)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(options, value, path)
    if origin is typing.Literal:
        if value in options:
            return value
        words = [str(option) for option in options]
        raise ValueError(
            f"{path}={value!r} is not one of {', '.join(words)}{nearest(str(value), words)}"
        )
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, path)
    if origin in (tuple, list):
        return _convert_sequence(origin, options, value, path)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}={value!r} must be a section of keys, {{name: value}}")
        inner = options[1] if options else Any
        return {str(key): _convert(inner, item, f"{path}.{key}") for key, item in value.items()}
    return _convert_scalar(hint, value, path)


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    for option in rest[:-1]:
        try:
            return _convert(option, value, path)
        except ValueError:
            continue
    return _convert(rest[-1], value, path)


def _convert_sequence(origin: type, options: tuple[Any, ...], value: Any, path: str) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{path}={value!r} must be a list; write {path}=[{value}]")
    if origin is tuple and options and options[-1] is not Ellipsis:
        if len(value) != len(options):
            raise ValueError(f"{path}={list(value)} must have {len(options)} values")
        hints = list(options)
    else:
        hints = [options[0] if options else Any] * len(value)
    items = [
        _convert(hint, item, f"{path}[{i}]")
        for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    ]
    return tuple(items) if origin is tuple else items


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a word
        except ValueError:
            pass
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    raise ValueError(f"{path}={value!r} must be {names.get(hint, str(hint))}")


# --- the other way ----------------------------------------------------------------------


def to_plain(config: Any) -> Any:
    """A dataclass as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(asdict(config), default=str))


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def resolve_path(path: str) -> Path:
    """A path of the configuration: absolute, from the working directory, or from the project."""
    given = Path(path).expanduser()
    if given.is_absolute() or given.exists():
        return given
    return PROJECT_ROOT / given if (PROJECT_ROOT / given).exists() else given
