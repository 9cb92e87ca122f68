"""GPU kernels that are launched in name only, so that code around them runs on a planned GPU.

What surrounds a Triton kernel, its outputs, what it keeps for the backward pass and the segments
that long sequences are cut into, is ordinary PyTorch and runs as it is; a launch only counts. Where
Triton is not installed (no GPU, no need), names that its decorators and helpers have stand in for
it while the kernels' modules are imported, and are taken away again.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

import kernels.ttt_memory as ttt_memory
from kernels import vocabulary

PACKAGE = "kernels.ttt_memory.triton_backend"
VOCABULARY = "kernels.vocabulary.triton_kernels"


class Launch:
    """A kernel: `kernel[grid](arguments)` tells that it was launched, and nothing else."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self._tell()

        return launch


@contextlib.contextmanager
def named_only(
    attend: Callable[..., Any], num_processors: int, tell: Callable[[], None]
) -> Iterator[None]:
    """The memory's Triton kernels and FlexAttention as on a GPU, without one.

    Args:
        attend: takes FlexAttention's arguments.
        num_processors: streaming multiprocessors of the planned GPU.
        tell: is called at every launch of a Triton kernel.
    """
    flex = importlib.import_module("kernels.swa.flex")

    class Properties:
        multi_processor_count = num_processors

    with contextlib.ExitStack() as stack:
        modules = stack.enter_context(_triton_modules())
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                _swap(stack, module, name, Launch(tell))
        _swap(stack, ttt_memory, "_has_triton", lambda: True)
        _swap(stack, vocabulary, "available", lambda device, dtype: device.type == "cuda")
        _swap(stack, flex, "_compiled", lambda: attend)
        _swap(stack, torch.cuda, "get_device_properties", lambda device: Properties)
        plan = importlib.import_module(f"{PACKAGE}.plan")
        branch = importlib.import_module(f"{PACKAGE}.branch")
        masks = (flex.window_mask, flex.continued_mask)
        for cached in (*masks, plan.make_plan, branch.conv_blocks):
            cached.cache_clear()  # what a pass makes is to be counted in every pass
            stack.callback(cached.cache_clear)
        yield


def _swap(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    real = getattr(owner, name)
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, real)


@contextlib.contextmanager
def _triton_modules() -> Iterator[list[ModuleType]]:
    """The modules that launch, and are launched; with stand-ins where Triton is not installed."""
    own = ("forward", "backward", "backward_reads", "scan", "branch_kernels", "branch")
    names = [*(f"{PACKAGE}.{name}" for name in own), VOCABULARY]
    if importlib.util.find_spec("triton") is not None:
        yield [importlib.import_module(name) for name in names]
        return
    stand_ins = _stand_ins()
    sys.modules.update(stand_ins)
    try:
        modules = [importlib.import_module(name) for name in names]
    finally:
        for name in stand_ins:  # PyTorch, too, looks whether there is a Triton
            del sys.modules[name]
    try:
        yield modules
    finally:
        for name in [name for name in sys.modules if name.startswith((PACKAGE, VOCABULARY))]:
            del sys.modules[name]
        for package, name in ((ttt_memory, "triton_backend"), (vocabulary, "triton_kernels")):
            if hasattr(package, name):
                delattr(package, name)


def _stand_ins() -> dict[str, ModuleType]:
    """What the kernels' modules use of Triton outside of kernels."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    language.constexpr = lambda value: value  # type: ignore[attr-defined]
    own: dict[str, Any] = {
        "jit": lambda function=None, **_: function or (lambda decorated: decorated),
        "cdiv": lambda a, b: -(-a // b),
        "next_power_of_2": lambda n: 1 << max(n - 1, 0).bit_length(),
        "language": language,
    }
    for name, value in own.items():
        setattr(triton, name, value)
    return {"triton": triton, "triton.language": language}
