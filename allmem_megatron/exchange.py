"""Exchange of tensors between context-parallel ranks, with gradients.

Point to point and non-blocking: the forward pass sends from lower to higher ranks, the backward
pass the other way. No message says how large another one is: both ends know the shapes.

**Order.** Between two ranks NCCL matches sends and receives by order alone, and a collective wants
every rank at the same place. So (1) both ends must name their messages in the same order: in each
layer all ranks run the same program, send to the nearest rank first and receive from the nearest
first; and (2) the backward pass must run through the messages in exactly the opposite order, which
autograd alone does not promise: it runs whatever is ready. Therefore every message that carries a
gradient is a node of one chain: a scalar token goes through them in program order and is tied to
the result by `attach`, so that a node's backward cannot run before those of all later messages. By
induction, at the last message first, both ends of every pair meet in the same order; nobody waits
for a send, and a receive waits only for what its sender posts without waiting for the receiver:
no cycle. (With one communicator for each pair, made at its first message, "nearest first, sends
before receives" also keeps the making of communicators free of cycles.)

**Recomputation.** `torch.utils.checkpoint` (not reentrant) runs a layer's forward again inside the
backward pass, when the peers are elsewhere. With `tape=True` an exchange remembers what it received
by key; a key met a second time is answered from the tape, and sends are skipped. The gradient goes
through the nodes of the first run. All-to-alls run again: all ranks recompute the same layers.

**Buffers.** What is sent is copied into one buffer of bytes a message, so that nothing the caller
does later can change it; buffers live in a list until their sends are done.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from allmem_megatron.messages import Spec, num_bytes, pack, unpack

__all__ = ["Event", "Exchange", "Key", "Spec", "drain", "record", "trace"]

Key = tuple[Any, ...]
"""(layer, what): names a message within a forward pass."""


class Event(NamedTuple):
    """What a rank did, in seconds of `time.perf_counter`."""

    name: str
    start: float
    stop: float


trace: list[Event] | None = None
"""Set to a list to have messages (and whatever else calls `record`) noted in it."""


def record(name: str, start: float) -> None:
    """Notes in `trace`, if there is one, that `name` went on from `start` until now."""
    if trace is not None:
        trace.append(Event(name, start, time.perf_counter()))


class _Flying(NamedTuple):
    work: dist.Work
    buffer: Tensor
    number: int


_flying: deque[_Flying] = deque()
_passes = 0


def drain() -> None:
    """Waits until every send of this process has been received; call it before ranks part."""
    while _flying:
        _flying.popleft().work.wait()


class _Wire:
    """Messages of bytes between the ranks of a group; knows nothing of autograd."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def send(self, key: Key, tensors: Sequence[Tensor], dests: Sequence[int]) -> None:
        start = time.perf_counter()
        buffer = pack(tensors)
        if not buffer.numel():
            return
        while _flying and _flying[0].work.is_completed():
            _flying.popleft()
        for dest in dests:
            peer = dist.get_global_rank(self.group, dest)
            work = dist.isend(buffer, peer, group=self.group, tag=_tag(key))
            assert work is not None  # of a group that this rank belongs to
            _flying.append(_Flying(work, buffer, _passes))
            record(f"send {_name(key)} to {dest}", start)

    def post(self, key: Key, specs: Sequence[Spec], source: int, device: torch.device) -> _Posted:
        start = time.perf_counter()
        buffer = torch.empty(num_bytes(specs), dtype=torch.uint8, device=device)
        work = None
        if buffer.numel():
            peer = dist.get_global_rank(self.group, source)
            work = dist.irecv(buffer, peer, group=self.group, tag=_tag(key))
            record(f"post {_name(key)} from {source}", start)
        return _Posted(work, buffer, tuple(specs), f"{_name(key)} from {source}")


class _Posted(NamedTuple):
    work: dist.Work | None
    buffer: Tensor
    specs: tuple[Spec, ...]
    name: str

    def wait(self) -> tuple[Tensor, ...]:
        if self.work is not None:
            start = time.perf_counter()
            self.work.wait()
            record(f"wait {self.name}", start)
        return unpack(self.buffer, self.specs)


class Exchange:
    """The messages of one forward pass of this rank, and of its backward pass.

    Args:
        group: the context-parallel ranks.
        tape: remember what is received for a second run of the same code (recomputation).
    """

    def __init__(self, group: dist.ProcessGroup, *, tape: bool = False) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self._wire = _Wire(group)
        self._tape: dict[Key, tuple[Tensor, ...]] | None = {} if tape else None
        self._seen: set[Key] = set()
        self._posted: dict[Key, _Posted] = {}
        self._token: Tensor | None = None

    def expect(self, key: Key, anchor: Tensor, specs: Sequence[Spec], source: int) -> None:
        """Posts a receive that a later `receive` of the same arguments waits for.

        Call it early; receives from one rank are matched in the order in which they are posted.
        """
        if (*key, source) not in self._seen:
            self._posted[*key, source] = self._wire.post(key, specs, source, anchor.device)

    def receive(
        self, key: Key, anchor: Tensor, specs: Sequence[Spec], source: int
    ) -> tuple[Tensor, ...]:
        """Waits for the tensors that rank `source` sends under `key`.

        Args:
            key: (layer, what), once a pass and source.
            anchor: any tensor on the right device; what comes carries a gradient back to the
                sender iff it requires one, which must be so at both ends.
            specs: (shape, dtype) of each tensor.
            source: rank within the group.
        """
        full_key = (*key, source)
        if self._again(full_key):
            assert self._tape is not None
            if full_key not in self._tape:
                raise ValueError(
                    f"message {_name(full_key)} is not on the tape: it was received without"
                    " gradients; receive it outside the recomputed part"
                )
            return tuple(t.detach().requires_grad_(t.requires_grad) for t in self._tape[full_key])
        posted = self._posted.pop(full_key, None)
        if posted is None:
            posted = self._wire.post(key, specs, source, anchor.device)
        if _wanted(anchor):
            token = self._chain(anchor)
            self._token, *tensors = _Receive.apply(token, self._wire, key, source, posted)
            received = tuple(tensors)
        else:
            received = posted.wait()
        if self._tape is not None and torch.is_grad_enabled():
            self._tape[full_key] = tuple(
                t.detach().requires_grad_(t.requires_grad) for t in received
            )
        return received

    def send(
        self, key: Key, anchor: Tensor, tensors: Sequence[Tensor], dest: int | Sequence[int]
    ) -> Tensor:
        """Sends copies of `tensors` without waiting, and returns `anchor`.

        Args:
            key: (layer, what), as the receiver names it.
            anchor: a tensor that requires a gradient iff what is sent is to get one from the
                receiver, as the receiver's anchor does.
            tensors: floating-point tensors on one device.
            dest: a rank within the group, or several that get the same, nearest first.
        """
        dests = (dest,) if isinstance(dest, int) else tuple(dest)
        if self._again(("send", *key, *dests)) or not dests:
            return anchor
        if _wanted(anchor):
            token = self._chain(anchor)
            self._token = _Send.apply(token, self._wire, key, dests, *tensors)
            return anchor
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise ValueError(
                f"message {_name(key)} holds tensors that require gradients but its anchor does"
                " not; give an anchor that does"
            )
        self._wire.send(key, tensors, dests)
        return anchor

    def all_to_all(self, key: Key, x: Tensor) -> Tensor:
        """Slice i of x [R, ...] goes to rank i; slice i of the result [R, ...] comes from it."""
        if self._again(("all_to_all", *key)):
            return _AllToAll.apply(x.new_zeros(()), self.group, x, _name(key))[1]
        if not _wanted(x):
            return _all_to_all(x, self.group, _name(key))
        self._token, out = _AllToAll.apply(self._chain(x), self.group, x, _name(key))
        return out

    def hold(self, key: Key, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Identity whose backward runs after those of all messages that come later in the pass.

        For parameters used between the receipt of a state and its sending on. Their gradients
        would be ready here before this rank has sent the state's gradient, but at the rank before
        only after: a reduction over both, started as soon as the gradient is there, would wait for
        a rank that waits for this one. One node a tensor: ZeRO's buckets take gradients as they
        come, and those of one node may come in another order on another rank.
        """
        anchor = next((t for t in tensors if _wanted(t)), None)
        if self._again(("hold", *key)) or anchor is None:
            return tensors
        held = []
        for tensor in tensors:
            self._token, same = _Hold.apply(self._chain(anchor), tensor)
            held.append(same)
        return tuple(held)

    def attach(self, x: Tensor) -> Tensor:
        """x, whose gradient now drives the backward pass of all messages; once, at the end.

        Every rank must call backward on something that comes from it, loss tokens or not.
        """
        token, self._token = self._token, None
        if token is None or not torch.is_grad_enabled():
            return x
        return _Attach.apply(token, x)

    def finish(self) -> None:
        """Ends the forward pass. Waits for the sends of earlier passes, not for this one's.

        The ranks after this one are still at work on what it sent last; to wait for them here
        would hold up the next pass.
        """
        global _passes
        _passes += 1
        while _flying and _flying[0].number < _passes - 1:
            _flying.popleft().work.wait()

    def _again(self, key: Key) -> bool:
        """Whether this message was exchanged before, in the run that this one repeats."""
        if key not in self._seen:
            self._seen.add(key)
            return False
        if self._tape is None:
            raise ValueError(
                f"message {_name(key)} is exchanged twice in one pass; use Exchange(tape=True)"
                " where layers are recomputed, and different keys"
            )
        return True

    def _chain(self, anchor: Tensor) -> Tensor:
        if self._token is None:
            self._token = torch.zeros((), device=anchor.device, requires_grad=True)
        return self._token


class _Send(torch.autograd.Function):
    """Forward: sends. Backward: receives the gradients of what was sent."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, wire: _Wire, key: Key, dests: Sequence[int], *tensors: Tensor
    ) -> Tensor:
        ctx.wire, ctx.key, ctx.dests = wire, key, dests
        ctx.specs = [(tuple(t.shape), t.dtype) for t in tensors]
        wire.send(key, tensors, dests)
        return token.clone()

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor) -> Any:  # type: ignore[override]
        key = ("grad", *ctx.key)
        posted = [ctx.wire.post(key, ctx.specs, dest, grad_token.device) for dest in ctx.dests]
        first, *others = [message.wait() for message in posted]
        for other in others:
            for total, part in zip(first, other, strict=True):
                total += part
        return (grad_token, None, None, None, *first)


class _Receive(torch.autograd.Function):
    """Forward: waits for what was posted. Backward: sends the gradients to where it came from."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, wire: _Wire, key: Key, source: int, posted: _Posted
    ) -> tuple[Tensor, ...]:
        ctx.wire, ctx.key, ctx.source = wire, key, source
        return (token.clone(), *posted.wait())

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor, *grads: Tensor) -> Any:  # type: ignore[override]
        ctx.wire.send(("grad", *ctx.key), grads, (ctx.source,))
        return grad_token, None, None, None, None


class _AllToAll(torch.autograd.Function):
    """Slices change places; the gradients' slices change back, which is the same exchange."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, group: dist.ProcessGroup, x: Tensor, name: str
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.name = group, name
        return token.clone(), _all_to_all(x, group, name)

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor, grad: Tensor) -> Any:  # type: ignore[override]
        return grad_token, None, _all_to_all(grad, ctx.group, f"grad {ctx.name}"), None


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return token.clone(), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor, grad: Tensor) -> Any:  # type: ignore[override]
        return grad_token, grad


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> Tensor:
        ctx.device = token.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return torch.zeros((), device=ctx.device), grad


def _all_to_all(x: Tensor, group: dist.ProcessGroup, name: str) -> Tensor:
    start = time.perf_counter()
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    record(f"all-to-all {name}", start)
    return out


def _wanted(anchor: Tensor) -> bool:
    return torch.is_grad_enabled() and anchor.requires_grad


def _name(key: Key) -> str:
    return "/".join(str(part) for part in key)


def _tag(key: Key) -> int:
    """For gloo, which matches by tag: messages out of order are then at least not mixed up."""
    return zlib.crc32(_name(key).encode()) >> 1
