"""Messages between ranks, with gradients; see test_context_parallel_exchange.py."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import layouts
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from allmem_megatron import exchange as module
from allmem_megatron.exchange import Exchange, drain

LAYERS = 3
EMPTY = (2, 0, 3)


def mix(x: Tensor, weight: Tensor, came: list[tuple[Tensor, ...]]) -> Tensor:
    """A rank's layer: of what it has and what lower ranks sent, nearest first; not linear."""
    total = (x * weight).sin()
    for distance, (a, b, _) in enumerate(came, 1):
        total = total + a * a * (b.to(a.dtype) + distance) * weight
    return total


def layer(exchange: Exchange, number: int, x: Tensor, weight: Tensor) -> Tensor:
    key, rank = (number, "x"), exchange.rank
    (weight,) = exchange.hold(key, weight)
    sent = [x, x.mT.to(torch.float32), x.new_zeros(EMPTY)]
    exchange.send(key, x, sent, range(rank + 1, exchange.size))
    specs = [(tuple(t.shape), t.dtype) for t in sent]
    for source in reversed(range(rank)):
        exchange.expect(key, x, specs, source)
    own = (x * 0.5).cos()
    came = [exchange.receive(key, x, specs, source) for source in reversed(range(rank))]
    came = [(a, b.mT, c) for a, b, c in came]
    return mix(own, weight, came)


def together(xs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """All ranks' layers in one process."""
    for number in range(LAYERS):
        sent = [(x, x.to(torch.float32), x) for x in xs]
        weight = weights[number]
        xs = [mix((x * 0.5).cos(), weight, sent[:rank][::-1]) for rank, x in enumerate(xs)]
    return xs


def apart(x: Tensor, weights: list[Tensor], recompute: bool) -> tuple[Tensor, Exchange]:
    exchange = Exchange(layouts.group(), tape=recompute)
    for number, weight in enumerate(weights):
        if recompute:
            x = checkpoint(layer, exchange, number, x, weight, use_reentrant=False)
        else:
            x = layer(exchange, number, x, weight)
    out = exchange.attach(x)
    exchange.finish()
    return out, exchange


def leaves(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    size = layouts.group().size()
    xs = [layouts.random(3, 3, seed=rank, dtype=dtype).requires_grad_() for rank in range(size)]
    weights = [layouts.random(3, 3, seed=50 + i, dtype=dtype) for i in range(LAYERS)]
    return xs, [w.requires_grad_() for w in weights]


def chain(cp: int, recompute: bool, passes: int, dtype: str) -> dict[str, float]:
    """Deviations of outputs and gradients from one process that has all ranks' parts."""
    layouts.switch(1, cp)
    xs, weights = leaves(getattr(torch, dtype))
    rank = layouts.group().rank()
    outs = together(xs, weights)
    sum(((out * out).sum() for out in outs), torch.zeros(())).backward()
    mine, own = leaves(getattr(torch, dtype))
    results = [apart(mine[rank], own, recompute)[0] for _ in range(passes)]
    for out in reversed(results):
        (out * out).sum().div(passes).backward()
    found = {"out": layouts.deviation(results[0], outs[rank])}
    found["x"] = layouts.deviation(mine[rank].grad, xs[rank].grad)
    for i, weight in enumerate(own):
        assert weight.grad is not None
        dist.all_reduce(weight.grad, group=layouts.group())
        found[f"weight {i}"] = layouts.deviation(weight.grad, weights[i].grad)
    drain()
    found["messages in flight"] = float(len(module._flying))
    return layouts.worst(found)


def order(cp: int, recompute: bool) -> dict[str, Any]:
    """What this rank noted, in order, and when a held weight got its gradient."""
    layouts.switch(1, cp)
    xs, weights = leaves(torch.float64)
    rank = layouts.group().rank()
    module.trace = []
    try:
        out, _ = apart(xs[rank], weights, recompute)
        for i, weight in enumerate(weights):
            weight.register_post_accumulate_grad_hook(
                lambda _, i=i: module.record(f"weight {i}", 0.0)
            )
        out.sum().backward()
        names = [event.name for event in module.trace]
    finally:
        module.trace = None
    drain()
    return {"rank": rank, "names": names}


def without_gradients(cp: int) -> dict[str, bool]:
    """What a pass without gradients leaves behind."""
    layouts.switch(1, cp)
    xs, weights = leaves(torch.float64)
    with torch.no_grad():
        out, exchange = apart(xs[layouts.group().rank()], weights, False)
    gone = weakref.ref(exchange)
    empty = exchange._tape is None and exchange._token is None
    del exchange
    gc.collect()
    dist.barrier()
    drain()
    return {"graph": out.grad_fn is not None, "empty": empty, "gone": gone() is None}


def buffers_are_copies(cp: int) -> dict[str, float]:
    """A tensor that is sent may be changed right after."""
    layouts.switch(1, cp)
    exchange = Exchange(layouts.group())
    rank, size = exchange.rank, exchange.size
    x = torch.full((1000,), float(rank))
    exchange.send(("x",), x, [x], range(rank + 1, size))
    x.fill_(-1.0)
    dist.barrier()
    found = {}
    for source in reversed(range(rank)):
        (came,) = exchange.receive(("x",), x, [((1000,), torch.float32)], source)
        found[f"from {source}"] = layouts.deviation(came, torch.full((1000,), float(source)))
    exchange.finish()
    drain()
    return found


def refusals() -> dict[str, str]:
    """The messages of wrong uses, none of which reaches another rank."""
    layouts.switch(1, 4)
    x = torch.ones(2, requires_grad=True)
    found = {}
    exchange = Exchange(layouts.group())
    exchange.hold(("a",), x)
    for name, wrong in {
        "twice": lambda: exchange.hold(("a",), x),
        "anchor": lambda: exchange.send(("b",), x.detach(), [x], [0]),
    }.items():
        try:
            wrong()
        except ValueError as error:
            found[name] = str(error)
    return found


CASES = {
    "chain": chain,
    "order": order,
    "without_gradients": without_gradients,
    "buffers_are_copies": buffers_are_copies,
    "refusals": refusals,
}
