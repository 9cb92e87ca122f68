"""The branch over context-parallel ranks: convolution halo, wavefront, head all-to-all.

The recurrence of the memory (equations (8) to (11) of AllMem, arXiv 2602.13680) is not linear in
its state, so no associative scan applies. It crosses ranks in one of two exact ways:

- `wavefront`: a rank scans as soon as the rank before it has sent the state, and sends it on before
  it does anything else (`shard_scan.py`). Rank r works on layer l while rank r - 1 works on l + 1.
- `a2a`: an all-to-all gives each rank all T tokens of H / R heads, a second one the outputs back.

Both take q, k and v after the convolution, whose last `taps - 1` inputs come from the ranks before.

Shapes: B sequences, T tokens of this rank, H memory heads of this rank, K head width, C channels,
R context-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from allmem_megatron.context_parallel import ContextShard, by_heads
from allmem_megatron.exchange import Spec
from allmem_megatron.shard_scan import (
    ShardDocuments,
    Streams,
    halo_of,
    scan_shard,
    ssd_scan_shard,
)
from kernels.ssd import ssd_scan
from kernels.ttt_memory import FastWeights, memory_scan


def check_heads(num_heads: int, shard_size: int) -> None:
    """Refuses heads that do not divide over the context-parallel ranks in mode `a2a`.

    Args:
        num_heads: memory heads of a tensor-parallel rank.
        shard_size: R.

    Raises:
        ValueError: naming both numbers and what would do.
    """
    if num_heads % shard_size:
        raise ValueError(
            f"parallel.cp={shard_size} with cp_mode=a2a does not divide the {num_heads} memory"
            f" heads of a tensor-parallel rank; set parallel.cp_mode=wavefront, or parallel.cp to"
            f" {math.gcd(num_heads, shard_size)}"
        )


def conv_halo(
    inputs: Sequence[Tensor], reach: int, shard: ContextShard, layer: int
) -> list[Tensor]:
    """The tails that `causal_conv` takes: the tokens before this shard, of its first document.

    Args:
        inputs: `[B, T, C_i]` of this shard, all sent in one message.
        reach: tokens that the convolution looks back.
        shard: where the tokens lie.
        layer: names the message.

    Returns:
        for each input `[B, reach, C_i]`, `[N, reach, C_i]` for N packed documents; 0 where the
        document began less than `reach` tokens ago.
    """
    key = (layer, "conv")
    anchor = _anchor(inputs)
    for rank in range(shard.rank + 1, shard.size):
        for source, lo, hi in halo_of(shard, rank, reach):
            if source == shard.rank:
                tokens = slice(lo - shard.start, hi - shard.start)
                last = torch.cat([x[:, tokens] for x in inputs], -1)
                shard.exchange.send(key, anchor, [last], rank)
    channels = [x.shape[-1] for x in inputs]
    rows = inputs[0].shape[0]
    halo = inputs[0].new_zeros(rows, 0, sum(channels))
    for source, lo, hi in halo_of(shard, shard.rank, reach):
        spec: Spec = ((rows, hi - lo, sum(channels)), inputs[0].dtype)
        (piece,) = shard.exchange.receive(key, anchor, [spec], source)
        halo = torch.cat((piece, halo), 1)
    bounds = shard.local_cu_seqlens
    documents = rows if bounds is None else len(bounds) - 1
    tail = F.pad(halo, (0, 0, reach - halo.shape[1], 0, 0, documents - rows))
    return list(tail.split(channels, -1))


def memory_over_ranks(
    streams: Streams,
    weights: FastWeights,
    shard: ContextShard,
    layer: int,
    *,
    chunk_size: int,
    clip: float | None = None,
    decay: float | None = None,
) -> Tensor:
    """`memory_scan` over a sequence whose tokens lie on several ranks.

    Args:
        streams: q, k, v `[B, T, H, K]`, eta `[B, T, H, 3]`, mu `[B, T, H]` of this shard.
        weights: initial fast weights of this rank's heads.
        shard: where the tokens lie, and how the memory crosses ranks.
        layer: names the messages.
        chunk_size, clip, decay: as in `memory_scan`.

    Returns:
        out `[B, T, H, K]`.

    Raises:
        ValueError: mode "a2a" with heads that do not divide over the ranks.
    """
    options: dict[str, Any] = {"chunk_size": chunk_size, "clip": clip, "decay": decay}
    if shard.mode == "wavefront":
        weights = FastWeights(*shard.exchange.hold((layer, "weights"), *weights))
        receive, send = _ends(shard, layer, _anchor((*streams, *weights)))
        documents = ShardDocuments.of(shard)
        return scan_shard(streams, weights, documents, receive=receive, send=send, **options)

    def scan(q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor) -> Tensor:
        own = weights.map(lambda w: own_heads(w, shard))
        bounds = shard.cu_seqlens
        return memory_scan(
            q, k, v, eta, mu[..., 0], own, cu_seqlens=bounds, return_state=False, **options
        )[0]

    q, k, v, eta, mu = streams
    check_heads(q.shape[2], shard.size)
    return by_heads(scan, (q, k, v, eta, mu[..., None]), shard, (layer, "memory"))


def ssd_over_ranks(streams: Streams, a_log: Tensor, shard: ContextShard, layer: int) -> Tensor:
    """`ssd_scan` over a sequence whose tokens lie on several ranks; see `memory_over_ranks`.

    Args:
        streams: x `[B, T, H, K]`, dt `[B, T, H]`, b and c `[B, T, H, N]` of this shard.
        a_log: `[H]`.
        shard: where the tokens lie.
        layer: names the messages.

    Returns:
        y `[B, T, H, K]`.
    """
    if shard.mode == "wavefront":
        (a_log,) = shard.exchange.hold((layer, "decay"), a_log)
        receive, send = _ends(shard, layer, _anchor((*streams, a_log)))
        documents = ShardDocuments.of(shard)
        return ssd_scan_shard(streams, a_log, documents, receive=receive, send=send)

    def scan(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        bounds = shard.cu_seqlens
        return ssd_scan(x, dt[..., 0], own_heads(a_log, shard), b, c, cu_seqlens=bounds)[0]

    x, dt, b, c = streams
    check_heads(x.shape[2], shard.size)
    return by_heads(scan, (x, dt[..., None], b, c), shard, (layer, "memory"))


def own_heads(x: Tensor, shard: ContextShard) -> Tensor:
    """The heads `[H / R, ...]` of x `[H, ...]` that this rank scans in mode "a2a"."""
    return x.unflatten(0, (shard.size, -1))[shard.rank]


def _anchor(tensors: Sequence[Tensor]) -> Tensor:
    """One that requires a gradient if any does: the same on every rank, whatever it holds."""
    return next((t for t in tensors if t.requires_grad), tensors[0])


def _ends(
    shard: ContextShard, layer: int, anchor: Tensor
) -> tuple[Callable[[list[Spec]], tuple[Tensor, ...]], Callable[[Tensor, list[Tensor]], Tensor]]:
    """How states come from the rank before and go to the rank after."""
    key = (layer, "state")

    def receive(specs: list[Spec]) -> tuple[Tensor, ...]:
        return shard.exchange.receive(key, anchor, specs, shard.rank - 1)

    def send(out: Tensor, tensors: list[Tensor]) -> Tensor:
        shard.exchange.send(key, anchor, tensors, shard.rank + 1)
        return out

    return receive, send


class _KeepGradients(torch.autograd.Function):
    """Identity on the first tensor; the others get a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(t.shape, t.dtype, t.device) for t in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        zeros = (
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.shapes
        )
        return grad, *zeros


def keep_gradients(x: Tensor, *others: Tensor) -> Tensor:
    """x, and a gradient of 0 for tensors that may not have gone into it.

    Where no chunk is completed on a rank, nothing is written and the keys, rates and initial
    weights get no gradient there. ZeRO's buckets would then hold other parameters on this rank than
    on the ranks they are summed with.
    """
    return _KeepGradients.apply(x, *others)
