"""RMSNorm that Megatron-Core layers take in place of its own.

Shapes: x [..., D], weight [D].
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def shared_over_tp(weight: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """A weight kept whole on every tensor-parallel rank, each of which sees part of its gradient.

    Identity forward; backward sums the gradient over the group, so that the copies stay equal
    under any optimiser. Because the sum happens here the weight is *not* tagged
    `sequence_parallel`: Megatron's finalize_model_grads would sum it a second time.
    """
    if group.size() == 1:
        return weight
    return copy_to_tensor_model_parallel_region(weight, group=group)


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the mean in float32 as Hugging Face computes it.

    Args:
        config: of the model; tells whether tokens are split over tensor-parallel ranks.
        hidden_size: D.
        eps: added to the mean square.
        tp_group: ranks to sum the weight's gradient over, where they see different tokens or
            heads; None: only under sequence parallelism, over core's tensor-parallel group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        if tp_group is None and config.sequence_parallel:
            from megatron.core import parallel_state

            tp_group = parallel_state.get_tensor_model_parallel_group()
        self.tp_group = tp_group

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.tp_group is not None:
            weight = shared_over_tp(weight, self.tp_group)
        x_float = x.float()
        x_float = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * x_float.to(x.dtype)
