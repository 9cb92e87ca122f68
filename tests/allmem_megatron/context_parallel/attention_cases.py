"""Attention over ranks in float64; see test_context_parallel_attention.py."""

from __future__ import annotations

import layouts
import torch
import torch.distributed as dist
from torch import Tensor

from allmem_megatron.attention_parallel import Reach, attention_over_ranks
from allmem_megatron.context_parallel import ContextShard, take_shard
from allmem_megatron.exchange import Exchange, drain

WIDTH = 4


def attention(
    cp: int,
    mode: str,
    rows: int,
    tokens_each: int,
    heads: tuple[int, int],
    window_size: int | None,
    num_sinks: int,
    bounds: list[int] | None,
) -> dict[str, float]:
    """Deviations of outputs and gradients from attention on one rank."""
    layouts.switch(1, cp)
    group = layouts.group()
    num_tokens = tokens_each * cp
    packed = None if bounds is None else torch.tensor(bounds)
    reach = Reach(window_size=window_size, num_sinks=num_sinks)
    sizes = (heads[0], heads[1], heads[1])
    whole = [
        layouts.random(rows, num_tokens, count, WIDTH, seed=i).requires_grad_()
        for i, count in enumerate(sizes)
    ]
    mix = layouts.random(rows, num_tokens, heads[0], WIDTH, seed=9)
    wanted = reach.within(*whole, packed)
    (wanted * mix).sum().backward()

    def own(x: Tensor) -> Tensor:
        return take_shard(x, group.rank(), cp)

    exchange = Exchange(group)
    shard = ContextShard.of(exchange, mode, num_tokens, packed)
    parts = [own(x).detach().clone().requires_grad_() for x in whole]
    out = exchange.attach(attention_over_ranks(*parts, shard, reach, (0, "x")))
    exchange.finish()
    (out * own(mix)).sum().backward()
    drain()
    found = {"out": layouts.deviation(out, own(wanted))}
    for name, part, x in zip("qkv", parts, whole, strict=True):
        # a key nobody sees, or one key alone, has no gradient: compare with what is large
        assert part.grad is not None
        assert x.grad is not None
        scale = float(whole[2].grad.abs().max())
        found[name] = float((part.grad - own(x.grad)).abs().max()) / scale
    return layouts.worst(found)


def messages(cp: int, tokens_each: int, window_size: int, num_sinks: int) -> int:
    """Keys that this rank receives for one row: each comes once."""
    layouts.switch(1, cp)
    exchange = Exchange(layouts.group())
    shard = ContextShard.of(exchange, "wavefront", cp * tokens_each, None)
    came = 0
    receive = exchange.receive

    def counted(*arguments: object) -> tuple[Tensor, ...]:
        nonlocal came
        tensors = receive(*arguments)  # type: ignore[arg-type]
        came += sum(t.shape[1] for t in tensors[::2])
        return tensors

    exchange.receive = counted  # type: ignore[assignment]
    x = torch.zeros(1, tokens_each, 1, WIDTH)
    reach = Reach(window_size=window_size, num_sinks=num_sinks)
    attention_over_ranks(x, x, x, shard, reach, (0, "x"))
    dist.barrier()
    drain()
    return came


CASES = {"attention": attention, "messages": messages}
