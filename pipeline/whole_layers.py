"""ZeRO-3 over context-parallel ranks: a layer's weights are gathered at its border, all at once.

DeepSpeed gathers each module's weights when the module runs, in the backward pass too, and the same
modules have to run on all ranks in the same order. Inside a layer context-parallel ranks do not do
that: one whose documents are never written to memory has no gradient for the rates' projections,
and ranks wait for each other's messages. So a layer is gathered before anything of it runs, forward
and backward, and freed when all of it has run. This costs the memory of a layer's weights; and the
ranks are in step at each layer, which takes from `wavefront` what it is for (docs/parallelism.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class WholeLayers:
    """Gathers and frees the weights of some modules as wholes.

    Args:
        zero: DeepSpeed's optimizer of stage 3.
        root: the module that it was made for.
        modules: layers, and inner modules that a loss may reach past their layer. Each takes its
            activations as the first argument or as `hidden_states`.
    """

    def __init__(self, zero: Any, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._coordinator = zero.parameter_offload.get_param_coordinator()
        root.register_forward_pre_hook(self._forget_order, prepend=True)
        for module in self._modules:
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            module.register_forward_hook(self._after_forward)

    def _forget_order(self, *_: Any) -> None:
        """DeepSpeed records which modules run, and would insist on the same ones on all ranks."""
        if not self._coordinator.is_invalid_trace():
            self._coordinator._invalidate_trace()

    def _before_forward(
        self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._gather(module)
        if "hidden_states" in options:
            x = _AtBackward.apply(options["hidden_states"], self._free, module)
            return arguments, {**options, "hidden_states": x}
        return (_AtBackward.apply(arguments[0], self._free, module), *arguments[1:]), options

    def _after_forward(self, module: nn.Module, _: Any, output: Any) -> Any:
        self._free(module)
        if isinstance(output, tuple):
            return (_AtBackward.apply(output[0], self._gather, module), *output[1:])
        return _AtBackward.apply(output, self._gather, module)

    def _gather(self, module: nn.Module) -> None:
        parameters: list[Any] = list(module.parameters())
        absent = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
        if absent:
            absent[0].all_gather(absent)
        for parameter in parameters:  # DeepSpeed frees what no module is using
            parameter.ds_active_sub_modules.add(_Whole(module))

    def _free(self, module: nn.Module) -> None:
        """Free what no other whole module holds, whatever inner ones ran on this rank."""
        for parameter in module.parameters():
            held: Any = parameter
            held.ds_active_sub_modules.discard(_Whole(module))
            if any(isinstance(user, _Whole) for user in held.ds_active_sub_modules):
                continue
            held.ds_active_sub_modules.clear()
            if held.ds_status.name == "AVAILABLE":
                held.partition()

    def finish(self) -> None:
        """After a backward pass: free what had no input with a gradient to tell that it is over."""
        for module in self._modules:
            self._free(module)


class _Whole:
    """A user of parameters, among the numbers of modules by which DeepSpeed counts users."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Whole) and other._module is self._module

    def __hash__(self) -> int:
        return id(self._module)


class _AtBackward(torch.autograd.Function):
    """The identity, which calls something when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Any, module: nn.Module) -> Tensor:
        ctx.action, ctx.module = action, module
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.action(ctx.module)
        return grads[0], None, None
