"""The run's tokenizer: where it is, loaded once a process, and whether it made the shards."""

from __future__ import annotations

import functools
from pathlib import Path

from allmem_megatron.base_files import TOKENIZER_FILES
from data_prep.shards import MANIFEST_NAME, Manifest
from data_prep.tokenize import TokenizerLike
from data_prep.tokenizer import load_tokenizer, tokenizer_hash
from pipeline.config import resolve_path
from pipeline.models import base_path
from pipeline.schema import RunConfig

Stamp = tuple[tuple[str, int, int], ...]
"""Name, bytes and date [ns] of each file of a tokenizer."""


def tokenizer_path(config: RunConfig) -> Path:
    """`data.tokenizer`, or the base model's own.

    Raises:
        ValueError: neither is given, or there is no base model at `model.path`.
    """
    given = resolve_path(config.data.tokenizer) if config.data.tokenizer else base_path(config)
    if given is None:
        raise ValueError(
            "data.tokenizer is not given and the model has no path; set data.tokenizer to a folder "
            "with tokenizer.json (python -m data_prep.tokenizer train makes one)"
        )
    return given


def open_tokenizer(config: RunConfig) -> TokenizerLike:
    """The tokenizer; one of a .gguf takes seconds to load and is kept while its file is the same.

    Raises:
        ValueError: none is given, nothing is there, or it has no fast tokenizer.
    """
    path = tokenizer_path(config)
    files = [path] if path.is_file() else [path / name for name in TOKENIZER_FILES]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return _load(path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@functools.lru_cache(maxsize=1)
def _load(path: Path, stamp: Stamp) -> TokenizerLike:
    del stamp  # part of the key only: changed files are loaded again
    return load_tokenizer(path)


def check_vocabulary(config: RunConfig) -> None:
    """Refuse a `data.tokenizer` under which the base model's token ids would mean other text.

    Tokens and a chat template may be added; nothing is compared where the base model comes without
    a tokenizer, or is made from scratch.

    Raises:
        ValueError: a token of the base model's own tokenizer has another id, or none.
    """
    base = base_path(config)
    if base is None or not config.data.tokenizer:
        return
    given = resolve_path(config.data.tokenizer)
    if given == base or not (base.suffix == ".gguf" or (base / "tokenizer.json").is_file()):
        return
    ids = open_tokenizer(config).get_vocab()
    for token, number in sorted(load_tokenizer(base).get_vocab().items(), key=lambda item: item[1]):
        if ids.get(token) != number:
            other = f"gives {token!r} the id {ids[token]}" if token in ids else f"has no {token!r}"
            raise ValueError(
                f"data.tokenizer={config.data.tokenizer} {other}, the tokenizer of model.path="
                f"{config.model.path} gives it {number}: the model would read other text; leave "
                "data.tokenizer out, or extend the model's own"
            )


def check_tokenizer(config: RunConfig, data_dir: Path) -> None:
    """Refuse to go on from shards of another tokenizer; their ids would mean other text.

    Nothing is compared where there are no shards yet or the run has no tokenizer of its own.

    Raises:
        ValueError: the tokenizer was replaced since `prepare`, cannot be read, or is not the base
            model's.
    """
    check_vocabulary(config)
    without = not config.data.tokenizer and config.model.path is None
    if without or not (data_dir / MANIFEST_NAME).is_file():
        return
    if Manifest.load(data_dir).tokenizer_hash != tokenizer_hash(open_tokenizer(config)):
        raise ValueError(
            f"the shards in {data_dir} were made with another tokenizer than "
            f"{tokenizer_path(config)} holds now; put the former one back, or take another run.dir"
        )
