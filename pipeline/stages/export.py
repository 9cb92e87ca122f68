"""`stage=export`: a Hugging Face folder that loads where this project is not installed.

`run.dir/export` holds the base's weights, the trained branch, configuration, tokenizer and model
code; it is replaced as a whole, or left as it was.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allmem_hf.export import export_model
from allmem_megatron.config import BaseModelConfig
from allmem_megatron.convert import model_to_hf
from data_prep.tokenizer import load_tokenizer
from pipeline.config import resolve_path
from pipeline.context import StageContext
from pipeline.distributed import on_main, on_some
from pipeline.models import load_model, open_base, tokenizer_files
from pipeline.schema import RunConfig


def run(config: RunConfig, context: StageContext) -> None:
    """Write the entry's model as a Hugging Face folder.

    Raises:
        ValueError: a stage before has no checkpoint, or the base cannot be exported.
        OSError: the disk is full; the folder is as it was before.
    """
    first = context.ranks.replica == 0  # its tensor-parallel ranks hold the model together
    whole = on_some(context.ranks, first, lambda: _whole_model(config, context))
    report = on_main(context.ranks, lambda: _export(config, context, *(whole or ())))
    context.log(0, report)


def _whole_model(
    config: RunConfig, context: StageContext
) -> tuple[BaseModelConfig, dict[str, Tensor]]:
    """Sizes of the base, and all weights by Hugging Face name, put together over TP."""
    cpu = context.device.type == "cpu" or context.ranks.tp == 1  # NCCL gathers on the GPU alone
    model = load_model(
        config,
        context.run_dir,
        branch=context.branch,
        device=torch.device("cpu") if cpu else context.device,
        before=context.entry,
        any_dtype=True,
    )
    tensors = {name: tensor.cpu() for name, tensor in model_to_hf(model).items()}
    return model.base_config, tensors


def _export(
    config: RunConfig, context: StageContext, sizes: BaseModelConfig, tensors: dict[str, Tensor]
) -> dict[str, float]:
    base = open_base(config)
    mixer: dict[str, Any] = {
        "mode": context.branch,
        "window_size": config.mixer.window_size,
        "num_sinks": config.mixer.num_sinks,
        "chunk_size": config.mixer.chunk_size,
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = export_model(
            context.dir,
            sizes.to_hf() if base is None else base.hf_config,
            tensors,
            config.mixer.memory,
            mixer,
            _tokenizer_files(config, Path(scratch)),
        )
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    context.say(f"{context.entry}: {num_bytes / 2**20:.1f} MiB of weights in {out}")
    return {
        "export/parameters": float(sum(tensor.numel() for tensor in tensors.values())),
        "export/bytes": float(num_bytes),
    }


def _tokenizer_files(config: RunConfig, scratch: Path) -> list[Path]:
    """The tokenizer's files; a GGUF file's tokenizer is written to `scratch` first."""
    files = list(tokenizer_files(config))
    path = config.data.tokenizer or config.model.path
    if files or not path:
        return files
    load_tokenizer(resolve_path(path)).save_pretrained(scratch)  # type: ignore[attr-defined]
    return sorted(file for file in scratch.iterdir() if file.is_file())
