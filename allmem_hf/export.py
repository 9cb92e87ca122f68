"""Writes a folder that `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` loads.

The folder holds the weights, the configuration, the tokenizer's files and the model's code, with
the kernels it calls, so that it works where this project is not installed (`shipping`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.files import replace_folder, restore_folder, save_tensors, sync
from allmem_hf.modeling_allmem import AllMemForCausalLM
from allmem_hf.shipping import shipped_modules, shipped_source

_AUTO_MAP = {
    "AutoConfig": "configuration_allmem.AllMemConfig",
    "AutoModel": "modeling_allmem.AllMemModel",
    "AutoModelForCausalLM": "modeling_allmem.AllMemForCausalLM",
}
_BRANCH_OF_MODE = {"allmem": "allmem", "mamba2": "mamba2", "swa": "none", "full": "none"}
_BASE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_REFUSED = ("use_sliding_window", "mlp_bias", "quantization_config")
_MEMORY_KEYS = {
    "memory_size": "memory_size",
    "num_heads": "num_memory_heads",
    "conv_kernel": "conv_kernel",
    "expansion": "expansion",
    "eta_init": "eta_init",
    "clip": "clip",
    "decay": "decay",
    "state_size": "state_size",
}
_MIXER_KEYS = ("window_size", "num_sinks", "chunk_size", "memory_off", "write_off")
_RECORDS = ("metrics.jsonl",)  # a stage's own record, carried over when an export is replaced
_SHARD_BYTES = 4 * 2**30


def export_model(
    out_dir: str | Path,
    base_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    memory_config: Any,
    mixer: Any,
    tokenizer_files: Iterable[str | Path] = (),
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Writes a self-contained model folder; it appears whole under its name, or not at all.

    The folder is written beside `out_dir` under the name `.NAME.partial`, brought to disk, then
    renamed. What an earlier, killed export left there is removed. An earlier export in `out_dir` is
    replaced; only a stage's `metrics.jsonl` in it is carried over.

    Args:
        out_dir: the folder to make.
        base_config: the base model's `config.json` (Qwen3, Qwen2 or Llama family).
        tensors: weights by Hugging Face name, with `model.layers.{i}.memory.*` for the branch;
            read one file's worth at a time, so a lazy mapping keeps memory low.
        memory_config: mapping or dataclass with the memory's sizes (`memory_size`, `num_heads`,
            `expansion` ...); None with mode `swa`.
        mixer: mapping or dataclass with `mode` (`allmem`, `mamba2` or `swa`), `window_size`,
            `num_sinks` and `chunk_size`.
        tokenizer_files: files to copy as they are (tokenizer, `generation_config.json`).
        shard_bytes: largest size of one weight file, in bytes.

    Returns:
        The folder's path.

    Raises:
        ValueError: a base that is not supported, tensors that are missing, unknown or of another
            shape, a tokenizer file that is not there, or `out_dir` holding something else.
        OSError: the disk refused a write; nothing is left under `out_dir`'s name.
    """
    out = Path(out_dir)
    config = build_config(base_config, memory_config, mixer)
    shapes = _checked_shapes(config, tensors)
    files = [Path(file) for file in tokenizer_files]
    restore_folder(out)
    _check_files(out, files)
    with _replacing(out) as partial:
        for module, name in shipped_modules().items():
            (partial / f"{name}.py").write_text(shipped_source(module), encoding="utf-8")
        config.dtype = _write_weights(partial, shapes, tensors, shard_bytes)
        _write_json(partial / "config.json", _config_dict(config))
        for file in files:
            shutil.copyfile(file, partial / file.name)
        if not (partial / "generation_config.json").exists():
            _write_json(partial / "generation_config.json", _generation_dict(config))
        for name in _RECORDS:
            if (out / name).exists():
                shutil.copyfile(out / name, partial / name)
        if not (partial / "README.md").exists():
            (partial / "README.md").write_text(_card(config, out.name), encoding="utf-8")
    return out


def build_config(base_config: Mapping[str, Any], memory_config: Any, mixer: Any) -> AllMemConfig:
    """The exported configuration from the base's `config.json`, memory and mixer settings.

    Raises:
        ValueError: an unsupported base family or feature, or settings that do not fit.
    """
    base, memory, settings = dict(base_config), _mapping(memory_config), _mapping(mixer)
    of_the_start = {"init_from_base", "gate_up_std", "momentum", "writes"}  # the weights hold it
    _check_keys("memory_config", memory, {*_MEMORY_KEYS, *of_the_start})
    _check_keys("mixer", settings, {*_MIXER_KEYS, "mode", "shuffle_state"})
    if settings.get("shuffle_state"):
        raise ValueError("mixer shuffle_state=True is a control of batches; export without it")
    family = base.get("model_type")
    if family not in ("qwen3", "qwen2", "llama"):
        raise ValueError(
            f"model_type={family!r} is not supported; use a base of family qwen3, qwen2 or llama"
        )
    refused = [key for key in _REFUSED if base.get(key)]
    if base.get("attention_bias") and family != "qwen2":
        refused.append("attention_bias")
    if refused:
        raise ValueError(
            f"{refused[0]}={base[refused[0]]!r} of this {family} base is not supported; "
            "choose a base without it"
        )
    mode = settings.get("mode", "allmem")
    if mode not in _BRANCH_OF_MODE:
        raise ValueError(
            f"mixer mode={mode!r} is not one that generates; choose one of "
            f"{', '.join(_BRANCH_OF_MODE)}"
        )
    complete = AutoConfig.for_model(**base)  # with the family's defaults, and one layout of RoPE
    fields = {key: getattr(complete, key, None) for key in _BASE_KEYS}
    fields.update(
        {new: memory[old] for old, new in _MEMORY_KEYS.items() if memory.get(old) is not None}
    )
    fields.update({key: settings[key] for key in _MIXER_KEYS if settings.get(key) is not None})
    return AllMemConfig(
        family=family,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        branch=_BRANCH_OF_MODE[mode],
        full_attention=mode == "full",
        **fields,
    )


def _check_keys(owner: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            mend = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"{owner} has no key {key!r}; {mend}")


def _mapping(settings: Any) -> dict[str, Any]:
    """A dataclass, a mapping or None as a dictionary."""
    if settings is None:
        return {}
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return dataclasses.asdict(settings)
    return dict(settings)


def _config_dict(config: AllMemConfig) -> dict[str, Any]:
    """Every field, so that a later change of a default changes no exported model."""
    fields = config.to_dict()
    return {**fields, "architectures": ["AllMemForCausalLM"], "auto_map": _AUTO_MAP}


def _generation_dict(config: AllMemConfig) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(config, key) for key in keys if getattr(config, key) is not None}


def _card(config: AllMemConfig, name: str) -> str:
    """How to load the folder, for whoever finds it."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [allmem]
---
# {name}

A {config.family} model whose attention sees the last {config.window_size} tokens and the first
{config.num_sinks}, with the branch `{config.branch}` beside it (AllMem, arXiv 2602.13680). Its
decode state does not grow with the text. The folder holds the model's code:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


def _checked_shapes(config: AllMemConfig, tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Names and shapes to write, once the given names are known to be the model's own."""
    with torch.device("meta"):
        model = AllMemForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: shape for name, shape in shapes.items() if name not in tied}
    given = set(tensors) - tied
    for names, what, mend in (
        (sorted(set(shapes) - given), "missing", "export the whole model"),
        (sorted(given - set(shapes)), "unknown", "check the base's family and the mixer's mode"),
    ):
        if names:
            raise ValueError(
                f"{len(names)} tensors are {what}, the first of them {names[0]!r}; {mend}"
            )
    return shapes


def _check_files(out: Path, files: list[Path]) -> None:
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"file {absent[0]!r} to copy is not there; name files that exist")
    own = {f"{name}.py" for name in shipped_modules().values()} | {"config.json"}
    clash = sorted(own & {file.name for file in files})
    if clash:
        raise ValueError(f"{clash[0]!r} is written by the export itself; leave it out of the files")
    if not out.exists():
        return
    held = {path.name for path in out.iterdir()} if out.is_dir() else {"a file"}
    if held - set(_RECORDS) and "modeling_allmem.py" not in held:
        raise ValueError(
            f"out_dir={str(out)!r} holds something other than an export; name a new folder"
        )


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its name when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"export to {str(out)!r} stopped: {error}; nothing was left there, make room or choose "
            "another folder and run the export again"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replace_folder(partial, out)


def _write_weights(
    folder: Path, shapes: dict[str, torch.Size], tensors: Mapping[str, Tensor], shard_bytes: int
) -> torch.dtype:
    """Writes safetensors, split into files where one would be too large; returns the main dtype."""
    embedding = tensors["model.embed_tokens.weight"]
    shards = list(_shards(shapes, embedding.element_size(), shard_bytes))
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        held: dict[str, Tensor] = {}
        for name in names:
            tensor = tensors[name].detach().cpu()
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"tensor {name!r} has shape {tuple(tensor.shape)}, the configuration says "
                    f"{tuple(shapes[name])}; export with the settings that the model was built with"
                )
            held[name] = tensor.clone(memory_format=torch.contiguous_format)
            total += tensor.numel() * tensor.element_size()
            where[name] = file
        save_tensors(held, folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)
    return embedding.dtype


def _shards(
    shapes: dict[str, torch.Size], element_size: int, shard_bytes: int
) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = shape.numel() * element_size
        if names and size + more > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["build_config", "export_model"]
