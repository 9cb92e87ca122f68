"""What lives when: a tracker of tensor storage that follows a forward and backward pass.

Every operation passes by here (`TorchDispatchMode`). A storage counts from the operation that made
it until Python frees it, which for tensors kept for the backward pass is when autograd lets go of
them; so the numbers are those of the real code, whatever it keeps.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_NO_KERNEL = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "as_strided"),
        *("slice", "narrow", "select", "split", "split_with_sizes", "unbind", "squeeze"),
        *("unsqueeze", "detach", "alias", "empty", "empty_like", "new_empty"),
        *("new_empty_strided", "empty_strided"),
    )
)
"""Operations that move no data."""

_MATRIX = frozenset(
    (
        *("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"),
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    )
)
"""Operations whose time `flops / mfu` stands for."""


@dataclass(kw_only=True)
class Phase:
    """A part of a step, in bytes and counts."""

    peak: int = 0
    """Most bytes alive at once, what was alive before included."""
    gradients: int = 0
    """Numbers of trained parameters whose gradients are there at its end; not in the bytes."""
    peak_communication: int = 0
    """Of `peak`: in storages that a collective or a transfer has used."""
    start: int = 0
    """Bytes alive when it began."""
    end: int = 0
    """Bytes alive at its end."""
    traffic: int = 0
    """Bytes read and written by all operations but matrix products."""
    kernels: int = 0
    """Operations that start at least one kernel."""
    sent: dict[tuple[int, ...], int] = field(default_factory=lambda: defaultdict(int))
    """Bytes that collectives move, by the ranks of their group; as `moved_bytes` counts them."""


class Answers:
    """Runs operations on meta tensors; one that came before with the same sizes is not run again.

    The chunks of a memory are alike, and PyTorch works out shapes in Python: this makes a plan
    three times as fast. Operations that write to or view their inputs always run.
    """

    def __init__(self) -> None:
        self._makes: dict[Any, bool] = {}
        self._known: dict[Any, Any] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` gives."""
        if not self._makes_new(func):
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        try:
            known = self._known.get(key)
        except TypeError:  # an argument that has no hash
            return func(*args, **kwargs)
        if known is None:
            out = func(*args, **kwargs)
            parts = out if isinstance(out, tuple) else (out,)
            if all(isinstance(part, Tensor) and part.is_meta for part in parts):
                made = [(part.shape, part.stride(), part.dtype) for part in parts]
                self._known[key] = (made, isinstance(out, tuple))
            return out
        made, several = known
        news = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in made
        ]
        return tuple(news) if several else news[0]

    def _makes_new(self, func: Any) -> bool:
        found = self._makes.get(func)
        if found is None:
            schema = func._schema
            values = (*schema.arguments, *schema.returns)
            found = func.namespace == "aten" and all(v.alias_info is None for v in values)
            found = (
                found and _name(func) not in _NO_KERNEL
            )  # `_unsafe_view` says it makes a new one
            self._makes[func] = found
        return found


def _name(func: Any) -> str:
    """`mul_` and `mul` → `mul`."""
    name: str = func._schema.name.partition("::")[2]
    return name.rstrip("_")


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        # real tensors steer: their values count
        where = None if value.is_meta else object()
        return (value.shape, value.stride(), value.dtype, where)
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return (type(value), value)


class MemoryTracker(TorchDispatchMode):
    """Counts storages while active.

    Args:
        loss_tokens: what a boolean mask selects: meta tensors have no values to count.
        attention_backward_bytes: bytes for each element of the queries that the attention's
            backward kernel takes for itself.
        gathers_copy: all-gathers and reduce-scatters work on a copy of the whole, as gloo's do.
        real: count real tensors, and not meta ones (to watch a true step).
    """

    def __init__(
        self,
        *,
        loss_tokens: int = 0,
        attention_backward_bytes: int = 0,
        gathers_copy: bool = False,
        real: bool = False,
    ) -> None:
        super().__init__()
        self.loss_tokens = loss_tokens
        self.attention_backward_bytes = attention_backward_bytes
        self.gathers_copy = gathers_copy
        self.real = real
        self.live = 0
        self.gradient_numbers = 0
        self.communication = 0
        self.phases: dict[str, Phase] = {}
        self._storages: dict[int, int] = {}
        self._of_communication: set[int] = set()
        self._outside: set[int] = set()
        self._answers = Answers()
        self.enter("start")

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, or views of them: weights, which are counted by their sizes."""
        self._outside.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._add(tensor)

    def enter(self, name: str) -> None:
        """What follows belongs to phase `name`."""
        if self.phases:
            self.close()
        self._phase = self.phases.setdefault(name, Phase(start=self.live))
        self._note_peak(0)

    def close(self) -> None:
        """End the phase."""
        self._phase.end, self._phase.gradients = self.live, self.gradient_numbers

    def launch(self) -> None:
        """A kernel that is no operation of PyTorch's was started."""
        self._phase.kernels += 1

    def drop_gradient(self, parameter: Tensor) -> None:
        """Take a gradient from its parameter as soon as it is there; it is counted apart."""
        self.gradient_numbers += parameter.numel()
        parameter.grad = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _INDEXING and not self.real:
            args = self._without_masks(args)
        out = (
            func(*args, **(kwargs or {})) if self.real else self._answers(func, args, kwargs or {})
        )
        for tensor in _tensors(out):
            self._add(tensor)
        if func.namespace == "c10d":
            self._collective(func, args)
        name = _name(func)
        if name not in _NO_KERNEL:
            self._phase.kernels += 1
            if name not in _MATRIX:
                self._phase.traffic += _bytes(args) + _bytes(out)
            elif name.endswith("cpu_backward") and args[7]:  # causal: flash attention
                self._note_peak(args[1].numel() * self.attention_backward_bytes)
        return out

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_meta == self.real:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or key in self._outside:
            return
        size = storage.nbytes()
        self._storages[key] = size
        self.live += size
        weakref.finalize(storage, self._free, key)
        self._note_peak(0)

    def _free(self, key: int) -> None:
        size = self._storages.pop(key)
        self.live -= size
        if key in self._of_communication:
            self._of_communication.remove(key)
            self.communication -= size

    def _note_peak(self, extra: int) -> None:
        phase, now = self._phase, self.live + extra
        if now > phase.peak:
            phase.peak, phase.peak_communication = now, self.communication

    def _collective(self, func: Any, args: tuple[Any, ...]) -> None:
        for tensor in _tensors(args):
            key = tensor.untyped_storage()._cdata
            if key in self._storages and key not in self._of_communication:
                self._of_communication.add(key)
                self.communication += self._storages[key]
        name = _name(func).strip("_")
        if self.gathers_copy and name in ("allgather_base", "reduce_scatter_base", "allgather"):
            self._note_peak(max(_bytes(tensor) for tensor in _tensors(args)))
        ranks, moved = moved_bytes(name, args)
        if moved:
            self._phase.sent[ranks] += moved

    def _without_masks(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A boolean index as the integer indices of `loss_tokens` places."""
        indices = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool and index.is_meta:
                shape = (self.loss_tokens,)
                new = [
                    torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(index.dim())
                ]
                indices.extend(new)
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])


_INDEXING = frozenset(
    (
        aten.index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
    )
)


def moved_bytes(name: str, args: tuple[Any, ...]) -> tuple[tuple[int, ...], int]:
    """Ranks of a collective's group, and the bytes that pass through one rank's link, in a ring.

    Args:
        name: the operation's, without `c10d::` and underscores.
        args: its arguments, as PyTorch gives them to the process group.
    """
    from torch._C._distributed_c10d import ProcessGroup

    groups = [value for value in args if isinstance(value, torch.ScriptObject)]
    process_groups = []
    for value in groups:
        try:
            process_groups.append(ProcessGroup.unbox(value))
        except (RuntimeError, TypeError):
            continue  # the ReduceOp, which is boxed the same way
    if not process_groups:
        return (), 0
    ranks = tuple(torch.distributed.get_process_group_ranks(process_groups[0]))
    size, biggest = (
        len(ranks),
        max((t.untyped_storage().nbytes() for t in _tensors(args)), default=0),
    )
    if size == 1:
        return ranks, 0
    if name in ("send", "recv"):
        return ranks, biggest
    share = {"allreduce": 2.0, "broadcast": 1.0}.get(name, 1.0) * (size - 1) / size
    return ranks, int(biggest * share) if name != "barrier" else 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
