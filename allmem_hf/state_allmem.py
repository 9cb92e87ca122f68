"""A memory state on disk: a long document read once can be asked again later.

The file is safetensors. Its tensors are the cache's by layer (`layers.0.keys`, …) and `hidden`, the
last token's final hidden state, from which the next token's logits follow. The header's metadata
`allmem_state` is JSON: `schema_version`, `fingerprint` of the weights, `mixer` (the settings that
decide what the state means), `lengths` (tokens read by each row), `dtype` and the caller's `note`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from allmem_hf.cache_allmem import AllMemCache
from allmem_hf.configuration_allmem import AllMemConfig

SCHEMA_VERSION = 1
_KEY = "allmem_state"
_SAMPLES = 1024  # elements of each weight that its fingerprint looks at
_MIXER = (
    "branch",
    "full_attention",
    "window_size",
    "num_sinks",
    "chunk_size",
    "memory_size",
    "num_memory_heads",
    "conv_kernel",
    "expansion",
    "state_size",
    "clip",
    "decay",
    "memory_off",
    "write_off",
)
_UNUSED_BY = {  # settings without a meaning: they may differ
    "full": ("window_size", "num_sinks"),
    "none": _MIXER[4:12],
}


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What was read from a file.

    Attributes:
        cache: the state, on the model's device.
        hidden: `[R, D]` final hidden states of the last tokens.
        note: what the caller had to say.
    """

    cache: AllMemCache
    hidden: Tensor
    note: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and up to 1,024 elements of each weight.

    Elements are spread evenly, so that any training step or other model shows; it takes
    milliseconds where a hash over all bytes takes minutes.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        places = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)  # whole numbers
        sample = flat[places.to(flat.device)].double().cpu()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def mixer_settings(config: AllMemConfig) -> dict[str, Any]:
    """The settings that decide what a state means."""
    unused = (
        *(_UNUSED_BY["full"] if config.full_attention else ()),
        *(_UNUSED_BY["none"] if config.branch == "none" else ()),
    )
    return {key: getattr(config, key) for key in _MIXER if key not in unused}


def save_state(
    path: str | Path,
    model: nn.Module,
    cache: AllMemCache,
    hidden: Tensor,
    note: Mapping[str, Any] | None = None,
) -> int:
    """Writes a state; the file appears whole under its name, or not at all.

    Args:
        path: of the file; one that is there is replaced.
        model: the model that read the tokens, with `config`.
        cache: what it left.
        hidden: `[R, D]` final hidden states of the rows' last tokens.
        note: plain values to keep with it (where the text came from, …).

    Returns:
        bytes of the file.

    Raises:
        ValueError: the cache has seen no token.
        OSError: the disk refused; what stood at `path` stands there still.
    """
    if cache.lengths is None:
        raise ValueError("the cache has seen no token; read a text before saving its state")
    tensors = {"hidden": hidden.detach().cpu().contiguous()}
    longest = max(cache.host_lengths)
    for index, layer in enumerate(cache.layers):
        for name, tensor in layer.tensors.items():
            used = tensor[:, :longest] if name in ("keys", "values") else tensor
            tensors[f"layers.{index}.{name}"] = used.detach().cpu().contiguous()
    about = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint(model),
        "mixer": mixer_settings(cache.config),
        "lengths": list(cache.host_lengths),
        "seen": cache.seen,
        "dtype": str(hidden.dtype),
        "note": dict(note or {}),
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        save_file(tensors, partial, metadata={"format": "pt", _KEY: json.dumps(about)})
        partial.chmod(mode)  # safetensors makes files that only their owner reads
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        size = partial.stat().st_size
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the state could not be saved to {str(target)!r} ({error}); nothing was changed there,"
            " make room or name another file"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return size


def load_state(path: str | Path, model: nn.Module) -> SavedState:
    """Reads a state for this very model.

    Args:
        path: of the file.
        model: the model that read the tokens, with `config`.

    Raises:
        ValueError: no such file, no state in it, another schema, model or settings.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"state {str(file)!r} is not there; save one first, or correct the path")
    try:
        with safe_open(file, framework="pt") as opened:
            about = _about(file, opened.metadata() or {})
            _check(file, about, model)
            device = next(model.parameters()).device
            tensors = {name: opened.get_tensor(name).to(device) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"state {str(file)!r} is no whole safetensors file ({error}); read the document again"
        ) from error
    config: Any = model.config
    cache = AllMemCache(config)
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, index, own = name.split(".", 2)
            cache.layers[int(index)].tensors[own] = tensor
    cache.host_lengths = tuple(about["lengths"])
    cache.lengths = torch.tensor(cache.host_lengths, device=device)
    cache.seen = about["seen"]
    return SavedState(cache=cache, hidden=tensors["hidden"], note=about["note"])


def _about(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise ValueError(f"{str(file)!r} holds no memory state; name a file that save_state made")
    about: dict[str, Any] = json.loads(metadata[_KEY])
    version = about.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"state {str(file)!r} has schema_version={version}, this program reads "
            f"{SCHEMA_VERSION}; read the document again"
        )
    return about


def _check(file: Path, about: Mapping[str, Any], model: nn.Module) -> None:
    config: Any = model.config
    now = mixer_settings(config)
    for key in sorted({*about["mixer"], *now}):
        if about["mixer"].get(key) != now.get(key):
            raise ValueError(
                f"state {str(file)!r} was made with {key}={about['mixer'].get(key)}, the model has "
                f"{key}={now.get(key)}; use the same settings, or read the document again"
            )
    own = fingerprint(model)
    if about["fingerprint"] != own:
        raise ValueError(
            f"state {str(file)!r} was made by another model or dtype (fingerprint "
            f"{about['fingerprint'][:12]}, this one has {own[:12]}); load the model that read the "
            "document, or read it again"
        )


__all__ = ["SavedState", "fingerprint", "load_state", "mixer_settings", "save_state"]
