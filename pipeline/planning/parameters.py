"""How many parameters there are, by kind, and which of them a stage trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from allmem_megatron.model import build_model
from pipeline.models import trained_parameters
from pipeline.planning.device import planned_ranks
from pipeline.planning.work import Work

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("memory: projections", ("memory.q_proj", "memory.k_proj", "memory.v_proj", "memory.o_proj")),
    ("memory: initial fast weights", ("memory.fast_",)),
    ("memory: rates and gate", ("memory.eta_proj", "memory.mu_proj", "memory.gate_proj")),
    ("memory: the rest", (".memory.",)),
    ("embedding", ("word_embeddings",)),
    ("output head", ("output_layer",)),
    ("attention", ("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")),
    ("MLP", ("mlp.linear",)),
    ("norms", ("",)),
)
"""Kinds by what a parameter's name holds; the first that suits counts."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Parameters of one kind, over all layers and ranks."""

    name: str
    count: int
    trained: bool


def parameters(work: Work) -> list[Kind]:
    """All kinds of the stage's model, the largest first; nothing is allocated."""
    with planned_ranks(tp=1, cp=1, rank=0):
        model = build_model(
            replace(work.base, num_layers=1),
            branch="none" if work.stage == "pretrain" else work.branch,
            memory=work.memory,
            dtype=torch.float32,
            meta=True,
        )
        trained = trained_parameters(model, work.trains)
    counts: dict[tuple[str, bool], int] = {}
    for name, parameter in model.named_parameters():
        kind = next(kind for kind, parts in KINDS if any(part in name for part in parts))
        times = work.base.num_layers if ".layers." in name else 1
        key = (kind, name in trained)
        counts[key] = counts.get(key, 0) + times * parameter.numel()
    kinds = [Kind(name=name, count=n, trained=is_on) for (name, is_on), n in counts.items()]
    return sorted(kinds, key=lambda kind: (not kind.trained, -kind.count))
