"""One of four context-parallel ranks on gloo; run by test_memory_parallel.py.

python branch_worker.py OUT; rank, world and rendezvous come by environment. Two branches, one after
the other as layers are, run whole on rank 0 and in shards over two and four ranks. Rank 0 writes
for every case the outputs and the gradients of the inputs and of every parameter, of both.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.context_parallel import ContextShard
from allmem_megatron.exchange import Exchange, drain
from allmem_megatron.layer_specs import transformer_config
from allmem_megatron.mamba2 import Mamba2Branch
from allmem_megatron.memory import MemoryBranch
from allmem_megatron.parallel import destroy_model_parallel, init_model_parallel

BASE = BaseModelConfig(
    family="llama",
    hidden_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=16,
    vocab_size=16,
)
KINDS = {"allmem": MemoryBranch, "mamba2": Mamba2Branch}
SEQUENCES: dict[str, tuple[int, int, list[int] | None, int]] = {
    # rows, tokens, document bounds, chunk size
    "rows": (2, 24, None, 4),
    "chunks_longer_than_shards": (2, 24, None, 11),
    "shards_shorter_than_the_convolution": (2, 8, None, 3),
    "packed": (1, 24, [0, 5, 17, 24], 4),
    "packed_over_many_ranks": (1, 24, [0, 1, 23, 24], 9),
    "packed_at_the_borders": (1, 24, [0, 6, 6, 12, 24], 5),
    "no_chunk_is_complete": (1, 24, [0, 9, 24], 16),
}
CASES = list(
    itertools.product(KINDS, ("wavefront", "a2a"), SEQUENCES, (2, 4), ("plain", "recompute"))
)


def branches(kind: str) -> nn.ModuleList:
    group = parallel_state.get_tensor_model_parallel_group()
    config = transformer_config(BASE, dtype=torch.float64, sequence_parallel=False)
    memory = MemoryConfig(memory_size=16, num_heads=4)
    made = nn.ModuleList([KINDS[kind](config, BASE, memory, group) for _ in range(2)])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * noise)
    return made


def run(
    layers: nn.ModuleList, x: Tensor, chunk_size: int, bounds: Tensor | None,
    shard: ContextShard | None, recompute: bool,
) -> Tensor:  # fmt: skip
    """x [T, B, D] plus both branches."""
    settings = MixerSettings(mode="allmem", window_size=64, chunk_size=chunk_size)
    for number, layer in enumerate(layers):
        arguments = (x, settings, bounds, shard, number)
        if recompute:
            x = x + checkpoint(layer, *arguments, use_reentrant=False)
        else:
            x = x + layer(*arguments)
    return x


def gradients(layers: nn.ModuleList, x: Tensor) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in layers.named_parameters()}
    layers.zero_grad(set_to_none=True)
    return {**found, "x": x.grad}


def whole(layers: nn.ModuleList, sequence: str) -> dict[str, Any]:
    rows, tokens, bounds, chunk = SEQUENCES[sequence]
    x, weight = data(rows, tokens)
    packed = None if bounds is None else torch.tensor(bounds)
    out = run(layers, x.requires_grad_(), chunk, packed, None, False)
    (out * weight).sum().backward()
    return {"out": out.detach(), **gradients(layers, x)}


def data(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (tokens, rows, BASE.hidden_size)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, weight


def in_shards(
    layers: nn.ModuleList, sequence: str, mode: str, group: dist.ProcessGroup, recompute: bool
) -> dict[str, Any]:
    rows, tokens, bounds, chunk = SEQUENCES[sequence]
    x, weight = data(rows, tokens)
    packed = None if bounds is None else torch.tensor(bounds)
    exchange = Exchange(group, tape=recompute)
    shard = ContextShard.of(exchange, mode, tokens, packed)
    own = slice(shard.start, shard.stop)
    x = x[own].clone().requires_grad_()
    out = exchange.attach(run(layers, x, chunk, None, shard, recompute))
    exchange.finish()
    (out * weight[own]).sum().backward()
    drain()
    found = gradients(layers, x)
    inputs = found.pop("x")
    result: dict[str, Any] = {}
    for name, part in (("out", out.detach()), ("x", inputs)):
        parts = [torch.empty_like(part) for _ in range(shard.size)]
        dist.all_gather(parts, part, group=group)
        result[name] = torch.cat(parts)
    for name, gradient in found.items():
        if gradient is None:
            result[name] = None
            continue
        dist.all_reduce(gradient, group=group)
        result[name] = gradient
    return result


def main() -> None:
    torch.set_num_threads(1)
    init_model_parallel(cp=4)
    groups = {4: parallel_state.get_context_parallel_group(), 2: dist.new_group([0, 1])}
    rank = dist.get_rank()
    results: dict[Any, Any] = {}
    for kind in KINDS:
        layers = branches(kind)
        for sequence in SEQUENCES:
            if rank == 0:
                results[kind, sequence] = whole(layers, sequence)
        for case in CASES:
            _, mode, sequence, size, recompute = case
            if case[0] == kind and rank < size:
                found = in_shards(layers, sequence, mode, groups[size], recompute == "recompute")
                results[case] = found
    if rank == 0:
        torch.save(results, sys.argv[1])
    dist.barrier()
    destroy_model_parallel()


if __name__ == "__main__":
    main()
