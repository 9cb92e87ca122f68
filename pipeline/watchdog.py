"""What this rank does now: which communication it is in, since when, and where in our code.

While training runs, the functions of `torch.distributed` are replaced by ones that leave a
breadcrumb: name, group, shape, step, the first line of this project on the stack, and the time. A
thread sends the newest one to rank 0 once a second (`pipeline.crew`), where `pipeline.hang` finds
out who is waited for when nothing moves for `parallel.hang_warning_s`.

On the CPU (gloo) a call returns when it is done, or its `Work.wait()` does, so the crumb says what
the rank waits for. **On a GPU (NCCL) calls only hand work to the device and return**: a rank that
hangs then looks as if it computed, and the crumb says which call was handed over last and how many
each group has seen, which names a rank that has made fewer. The end of such a hang is left to
PyTorch's own timeout of the process group (`parallel.timeout_s`).

Calls that do not go through `torch.distributed`'s functions (methods of a process group) leave no
crumb. torch is imported when the watch begins, not with this module.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

_ROOT = str(Path(__file__).resolve().parents[1])
_OURS = tuple(
    f"{_ROOT}/{name}/" for name in ("pipeline", "allmem_megatron", "kernels", "benchmarks", "tests")
)

_HELPERS = ("pipeline/distributed.py", "pipeline/watchdog.py")
"""Files whose callers say more than they do."""


class _Form(NamedTuple):
    """Where the arguments of a function are: (position, name)."""

    tensor: tuple[int, str] | None
    group: tuple[int, str]
    peer: tuple[int, str] | None = None


_TENSOR, _GROUP1, _GROUP2, _GROUP3 = (0, "tensor"), (1, "group"), (2, "group"), (3, "group")
FORMS: dict[str, _Form] = {
    "all_reduce": _Form(_TENSOR, _GROUP2),
    "broadcast": _Form(_TENSOR, _GROUP2),
    "reduce": _Form(_TENSOR, _GROUP3),
    "gather": _Form(_TENSOR, _GROUP3),
    "scatter": _Form(_TENSOR, _GROUP3),
    "all_gather": _Form((1, "tensor"), _GROUP2),
    "all_gather_into_tensor": _Form((1, "input_tensor"), _GROUP2),
    "_all_gather_base": _Form((1, "input_tensor"), _GROUP2),
    "all_gather_coalesced": _Form((1, "input_tensor_list"), _GROUP2),
    "all_reduce_coalesced": _Form((0, "tensors"), _GROUP2),
    "reduce_scatter": _Form((0, "output"), _GROUP3),
    "reduce_scatter_tensor": _Form((1, "input"), _GROUP3),
    "_reduce_scatter_base": _Form((1, "input"), _GROUP3),
    "all_to_all": _Form((1, "input_tensor_list"), _GROUP2),
    "all_to_all_single": _Form((1, "input"), (4, "group")),
    "barrier": _Form(None, (0, "group")),
    "monitored_barrier": _Form(None, (0, "group")),
    "all_gather_object": _Form(None, _GROUP2),
    "broadcast_object_list": _Form(None, _GROUP2),
    "gather_object": _Form(None, _GROUP3),
    "scatter_object_list": _Form(None, _GROUP3),
    "send": _Form(_TENSOR, _GROUP2, (1, "dst")),
    "isend": _Form(_TENSOR, _GROUP2, (1, "dst")),
    "recv": _Form(_TENSOR, _GROUP2, (1, "src")),
    "irecv": _Form(_TENSOR, _GROUP2, (1, "src")),
    "batch_isend_irecv": _Form(None, _GROUP1),
}
"""Functions of `torch.distributed` that are watched; those that a version lacks are left out."""

_POINT_TO_POINT = ("send", "isend", "recv", "irecv", "batch_isend_irecv")


@dataclass(slots=True)
class _Crumb:
    call: str
    place: str
    group: str
    number: int
    members: tuple[int, ...]
    peer: int | None
    entered: float
    enqueued: bool


class _Watch:
    """The crumbs of this process."""

    def __init__(self) -> None:
        self.now: dict[int, _Crumb] = {}
        """Calls that are under way, by thread."""
        self.last: _Crumb | None = None
        self.counts: dict[str, int] = {}
        self.moved = time.monotonic()
        self.step: int | None = None
        self.num_crumbs = 0
        """So far; a benchmark asks."""
        self.on = False


_watch = _Watch()
_groups: weakref.WeakKeyDictionary[Any, tuple[str, tuple[int, ...], bool]] = (
    weakref.WeakKeyDictionary()
)
_works: weakref.WeakKeyDictionary[Any, _Crumb] = weakref.WeakKeyDictionary()
_places: dict[tuple[CodeType, int], str] = {}


def state() -> dict[str, Any]:
    """What this rank does, as fields of `pipeline.hang.Rank`. Called by another thread."""
    watch, now = _watch, time.monotonic()
    calls = list(watch.now.values())
    crumb = min(calls, key=lambda crumb: crumb.entered, default=None)
    last = watch.last
    found: dict[str, Any] = {
        "watching": watch.on,
        "step": watch.step,
        "quiet_s": round(now - watch.moved, 1),
        "counts": dict(watch.counts),
        "last": last.call if last else "",
        "enqueued": last is not None and last.enqueued,
        "place": last.place if last else "",
    }
    if crumb is not None:
        found |= {
            "call": crumb.call,
            "place": crumb.place,
            "group": crumb.group,
            "number": crumb.number,
            "members": crumb.members,
            "peer": crumb.peer,
        }
    return found


def note_step(step: int) -> None:
    """A training step begins (1 for the first): that is progress, too."""
    _watch.step, _watch.moved = step, time.monotonic()


@contextlib.contextmanager
def watching(*, enabled: bool = True) -> Iterator[None]:
    """Leave breadcrumbs while the block runs.

    Args:
        enabled: false where there is one rank only, and nobody to wait for: costs nothing then.
    """
    if not enabled:
        yield
        return
    before = _replace_functions()
    _watch.__init__()  # type: ignore[misc]
    _watch.on = True
    try:
        yield
    finally:
        _watch.on = False
        for owner, name, function in before:
            setattr(owner, name, function)


def _replace_functions() -> list[tuple[Any, str, Any]]:
    """Put breadcrumbs around the functions; what was there before."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    before: list[tuple[Any, str, Any]] = []
    for name, form in FORMS.items():
        original = getattr(distributed_c10d, name, None)
        if original is None:
            continue
        wrapped = _Watched(name, form, original)
        for owner in (dist, distributed_c10d):
            if getattr(owner, name, None) is original:
                before.append((owner, name, original))
                setattr(owner, name, wrapped)
    wait = dist.Work.wait

    def watched_wait(work: Any, *args: Any, **options: Any) -> Any:
        crumb = _works.pop(work, None)
        if crumb is None or (thread := threading.get_ident()) in _watch.now:
            return wait(work, *args, **options)
        crumb.entered = _watch.moved = time.monotonic()
        _watch.now[thread] = crumb
        try:
            return wait(work, *args, **options)
        finally:
            _leave(thread, crumb)

    make = dist.P2POp.__init__

    def make_of_ours(operation: Any, op: Any, *args: Any, **options: Any) -> None:
        make(operation, op, *args, **options)
        # PyTorch asks by identity which of the two it is, and callers may have kept the originals.
        operation.op = next(f for f in (distributed_c10d.isend, distributed_c10d.irecv) if f == op)

    before.append((dist.P2POp, "__init__", make))
    dist.P2POp.__init__ = make_of_ours  # type: ignore[method-assign, assignment]
    before.append((dist.Work, "wait", wait))
    dist.Work.wait = watched_wait  # type: ignore[method-assign, assignment]
    return before


class _Watched:
    """A function of `torch.distributed` that leaves a breadcrumb; equals the function itself."""

    def __init__(self, name: str, form: _Form, function: Callable[..., Any]) -> None:
        self._name, self._form, self._function = name, form, function
        self._counts = name not in _POINT_TO_POINT
        functools.update_wrapper(self, function)

    def __eq__(self, other: object) -> bool:
        return self is other or self._function is other

    def __hash__(self) -> int:
        return hash(self._function)

    def __call__(self, *args: Any, **options: Any) -> Any:
        thread, watch = threading.get_ident(), _watch
        if thread in watch.now:  # one of our functions calls another one
            return self._function(*args, **options)
        form = self._form
        name, members, enqueues = _group_of(_argument(form.group, args, options))
        number = 0
        if self._counts:
            number = watch.counts[name] = watch.counts.get(name, 0) + 1
        crumb = _Crumb(
            call=self._described(args, options),
            place=_place(sys._getframe(1)),
            group=name,
            number=number,
            members=members,
            peer=self._peer(args, options, members),
            entered=time.monotonic(),
            enqueued=enqueues,
        )
        watch.now[thread] = crumb
        watch.moved = crumb.entered
        watch.num_crumbs += 1
        try:
            result = self._function(*args, **options)
            self._remember(result, crumb)
            return result
        finally:
            _leave(thread, crumb)

    def _described(self, args: tuple[Any, ...], options: dict[str, Any]) -> str:
        if self._form.tensor is None:
            return self._name
        tensor = _argument(self._form.tensor, args, options)
        first = tensor[0] if isinstance(tensor, list | tuple) and tensor else tensor
        dtype = str(getattr(first, "dtype", "?")).removeprefix("torch.")
        more = f" x {len(tensor)}" if first is not tensor else ""
        return f"{self._name} {dtype}{list(getattr(first, 'shape', ()))}{more}"

    def _peer(
        self, args: tuple[Any, ...], options: dict[str, Any], members: tuple[int, ...]
    ) -> int | None:
        if self._form.peer is None:
            return None
        peer = _argument(self._form.peer, args, options)
        if peer is not None:
            return int(peer)
        inside = options.get(f"group_{self._form.peer[1]}")
        return None if inside is None else members[inside]

    def _remember(self, result: Any, crumb: _Crumb) -> None:
        """Keep the crumb for the `wait()` of what is under way."""
        if result is None:
            return
        for work in result if isinstance(result, list) else [result]:
            if hasattr(work, "wait"):
                called = f"wait for {crumb.call}"
                _works[work] = _Crumb(
                    called, crumb.place, crumb.group, crumb.number, crumb.members, crumb.peer,
                    crumb.entered, crumb.enqueued,
                )  # fmt: skip


def _leave(thread: int, crumb: _Crumb) -> None:
    _watch.now.pop(thread, None)
    _watch.last, _watch.moved = crumb, time.monotonic()


def _argument(place: tuple[int, str], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    position, name = place
    return args[position] if position < len(args) else options.get(name)


def _group_of(group: Any) -> tuple[str, tuple[int, ...], bool]:
    """Name, ranks, and whether its calls only hand work to a GPU."""
    import torch.distributed as dist

    if group is None:
        group = dist.group.WORLD
    found = _groups.get(group)
    if found is None:
        ranks = tuple(dist.get_process_group_ranks(group))
        found = (group.group_name, ranks, "nccl" in dist.get_backend(group))
        _groups[group] = found
    return found


def _place(frame: FrameType | None) -> str:
    """`pipeline/engine.py:210`: the first line of this project on the stack, or the caller's."""
    caller = frame
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_OURS) and not code.co_filename.endswith(_HELPERS):
            break
        frame = frame.f_back
    frame = frame or caller
    assert frame is not None
    key = (frame.f_code, frame.f_lineno)
    found = _places.get(key)
    if found is None:
        path = Path(frame.f_code.co_filename)
        inside = path.is_relative_to(_ROOT)
        name = str(path.relative_to(_ROOT)) if inside else "/".join(path.parts[-3:])
        found = _places[key] = f"{name}:{frame.f_lineno}"
    return found
