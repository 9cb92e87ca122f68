"""Pretrained models on disk: Hugging Face safetensors directories and GGUF files, in and out."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from allmem_hf.files import replace_folder, restore_folder, save_tensors, sync
from allmem_megatron.config import BaseModelConfig
from allmem_megatron.gguf_file import read_gguf

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class BaseCheckpoint:
    """A pretrained model as found on disk."""

    path: Path
    """The directory or the GGUF file."""
    config: BaseModelConfig
    hf_config: dict[str, Any]
    """config.json as read, or as made from a GGUF file's metadata."""
    tensors: Mapping[str, Tensor]
    """Weights by Hugging Face name, read when asked for."""
    tokenizer_files: tuple[Path, ...]
    """Files to copy beside exported weights; none for GGUF, whose tokenizer is inside `path`."""


class SafetensorsMapping(Mapping[str, Tensor]):
    """Tensors of one or several safetensors files, each read from disk when asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"shard {path} is missing; copy or download the model again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"shard {path} is no readable safetensors file ({error}); copy it again"
        ) from error


def open_safetensors(directory: Path) -> SafetensorsMapping:
    """The tensors of a directory: by its index if it is sharded, else of model.safetensors.

    Raises:
        ValueError: no weights there, a missing or corrupt shard, or an index that lies.
    """
    index_path = directory / _INDEX
    if index_path.is_file():
        files = {name: directory / file for name, file in _json(index_path)["weight_map"].items()}
    elif (directory / _SINGLE).is_file():
        with _opened(directory / _SINGLE) as file:
            files = dict.fromkeys(file.keys(), directory / _SINGLE)
    else:
        raise ValueError(
            f"{directory} has neither {_SINGLE} nor {_INDEX}; save the model as safetensors there"
        )
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            held = set(file.keys())
        absent = sorted(name for name, at in files.items() if at == path and name not in held)
        if absent:
            raise ValueError(f"{path} lacks {absent[0]}, which {_INDEX} promises; copy it again")
    return SafetensorsMapping(files)


def read_base_config(path: str | Path) -> BaseModelConfig:
    """Sizes of a pretrained model, from config.json or a GGUF file's header alone.

    Raises: ValueError as `load_base`, weights apart.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return load_base(path).config  # opening one reads no more than its header
    return BaseModelConfig.from_hf(_hf_config(path))


def load_base(path: str | Path) -> BaseCheckpoint:
    """Opens a pretrained model of a supported family.

    Args:
        path: a Hugging Face directory with config.json and safetensors, or a .gguf file.

    Raises:
        ValueError: nothing there, unreadable files, or an unsupported family.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give the path of a GGUF file")
        hf_config, tensors = read_gguf(path)
        return BaseCheckpoint(
            path=path,
            config=BaseModelConfig.from_hf(hf_config),
            hf_config=hf_config,
            tensors=tensors,
            tokenizer_files=(),
        )
    hf_config = _hf_config(path)
    return BaseCheckpoint(
        path=path,
        config=BaseModelConfig.from_hf(hf_config),
        hf_config=hf_config,
        tensors=open_safetensors(path),
        tokenizer_files=tuple(path / n for n in TOKENIZER_FILES if (path / n).is_file()),
    )


def _hf_config(directory: Path) -> dict[str, Any]:
    restore_folder(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} has no config.json; give a Hugging Face model directory or a .gguf file"
        )
    return _json(directory / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return value


def save_hf_dir(
    path: str | Path,
    config: BaseModelConfig | dict[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer_files: Sequence[Path] = (),
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model directory that transformers loads: whole, or not at all.

    Everything goes to a temporary neighbour first, is flushed to disk, and takes its name last;
    a directory that stood there before is replaced.

    Args:
        path: of the directory.
        config: the configuration, or the dictionary to write as config.json.
        tensors: by Hugging Face name, whole.
        tokenizer_files: copied beside the weights.
        max_shard_bytes: size above which the weights are split over several files.

    Raises:
        OSError: the disk is full or not writable; `path` is then as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        hf_config = config.to_hf() if isinstance(config, BaseModelConfig) else config
        _write_json(scratch / "config.json", hf_config)
        _write_shards(scratch, tensors, max_shard_bytes)
        for file in tokenizer_files:
            shutil.copyfile(file, scratch / file.name)
        for file in scratch.iterdir():
            sync(file)
        sync(scratch)
        replace_folder(scratch, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot save a model to {path}: {error}; free or choose a disk with room and save"
            " again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone already where it took its name


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(directory: Path, tensors: Mapping[str, Tensor], max_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    total = size = 0
    for name in tensors:
        num_bytes = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
        total += num_bytes
    files = (
        [_SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, names in zip(files, shards, strict=True):
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_tensors(shard, directory / file)
    if len(shards) > 1:
        weight_map = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        _write_json(
            directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
