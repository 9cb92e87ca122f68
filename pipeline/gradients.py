"""Gradients reach ZeRO in one order, and all of them, on every rank.

ZeRO 2 and 3 put gradients into buckets as a backward pass makes them, and reduce the buckets over
the ranks: so all ranks must make the same gradients in the same order. Context-parallel ranks need
not: what a rank waits for depends on where documents cross its borders, and where none of its
tokens is ever written to the memory the rates have no gradient at all. So gradients wait here for
their turn, and zeros stand in for those that a backward pass leaves out.

Without ZeRO gradients are clipped here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from allmem_megatron.sharding import part_shape


class GradientOrder:
    """Stands between the backward pass and the ZeRO optimizer of a DeepSpeed engine.

    Args:
        engine: of stage 1, 2 or 3.
        parameters: the trained ones in the order in which a model uses them; their gradients are
            handed over in the opposite one.
        at_end: only when the backward pass is over. Context-parallel ranks must, or a reduction
            would wait for a rank that waits for this rank's messages. All gradients are held until
            then; else one is held until those before it have come.
        after_backward: called when a backward pass is over, before what is held is handed over.
    """

    def __init__(
        self,
        engine: Any,
        parameters: Sequence[nn.Parameter],
        *,
        at_end: bool,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        zero = engine.optimizer
        self._order = list(reversed(parameters))
        self._at_end = at_end
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self._next = 0
        # What DeepSpeed's hooks call: with the parameter's group in stages 1 and 2, without in 3.
        by_group = hasattr(zero, "process_gradients")
        name = "process_gradients" if by_group else "reduce_ready_partitions_and_remove_grads"
        self._hand_over = getattr(zero, name)
        setattr(zero, name, self._arrived)
        self._group_of: dict[int, tuple[int, ...]] = {id(p): () for p in parameters}
        if by_group:
            groups = enumerate(zero.bit16_groups)
            self._group_of = {id(p): (number,) for number, group in groups for p in group}
        self._after_backward = after_backward
        self._reduce = engine.allreduce_gradients  # called at the end of each backward pass
        engine.allreduce_gradients = self._finish

    def _arrived(self, parameter: nn.Parameter, *group: int) -> None:
        self._waiting[id(parameter)] = (parameter, *group)
        while not self._at_end and self._next < len(self._order):
            if (found := self._waiting.pop(id(self._order[self._next]), None)) is None:
                break
            self._hand_over(*found)
            self._next += 1

    def _finish(self, *arguments: Any, **options: Any) -> None:
        """Hand over what is left after a backward pass, and reduce.

        Raises:
            RuntimeError: a gradient came twice.
        """
        if self._after_backward is not None:
            self._after_backward()
        for parameter in self._order[self._next :]:
            if id(parameter) not in self._waiting:
                fill_gradient(parameter)
            self._waiting.pop(id(parameter), None)
            self._hand_over(parameter, *self._group_of[id(parameter)])
        self._next = 0
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} gradient(s) came twice in a backward pass")
        self._reduce(*arguments, **options)


def fill_gradient(parameter: nn.Parameter) -> None:
    """Give a parameter a gradient of zeros where it has none."""
    if parameter.grad is not None:
        return
    data = parameter.data
    # Under ZeRO-3 a parameter's own data are empty, and a gradient of another shape is refused.
    parameter.data = torch.zeros(part_shape(parameter), dtype=data.dtype, device=data.device)
    parameter.grad = torch.zeros_like(parameter)
    parameter.data = data


def clip_gradients(
    parameters: Sequence[nn.Parameter], limit: float, *, group: dist.ProcessGroup
) -> float:
    """Scale gradients down to a global L2 norm; the norm before.

    What tensor-parallel ranks hold in common counts once, what is split over them in sum.

    Args:
        parameters: with gradients that are reduced over the other ranks already.
        limit: the largest norm; 0 leaves the gradients as they are.
        group: the tensor-parallel ranks.
    """
    gradients = [(p, p.grad) for p in parameters if p.grad is not None]
    squares = torch.zeros((), dtype=torch.float32, device=gradients[0][1].device)
    for parameter, gradient in gradients:
        if dist.get_rank(group) == 0 or getattr(parameter, "tensor_model_parallel", False):
            squares += gradient.float().square().sum()
    dist.all_reduce(squares, group=group)
    norm = float(squares.sqrt())
    if limit and limit < norm < math.inf:
        for _, gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))
    return norm
