"""The paper's baseline: a Mamba-2 (SSD) recurrence in the memory's place, all else equal.

Mamba-2: arXiv 2405.21060; its place in the AllMem paper: arXiv 2602.13680, tables of section 4.

Shapes: B sequences, T tokens, H heads of this rank, K head width, N state columns of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.context_parallel import ContextShard
from allmem_megatron.memory import BranchBase, refuse_controls, roll_queries
from allmem_megatron.memory_parallel import ssd_over_ranks
from kernels.ssd import ssd_scan


class Mamba2Branch(BranchBase):
    """alpha * Mamba2(x): q is C, k is B and v is x of h_t = a_t h_{t-1} + dt_t x_t B_t^T.

    SiLU follows the convolutions as in Mamba-2; gate, output norm, projection and alpha are those
    of equation (12), so that only the recurrence differs from the memory.
    """

    def __init__(
        self,
        config: TransformerConfig,
        base: BaseModelConfig,
        memory: MemoryConfig,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        state_size = memory.state_size or memory.head_dim(base)
        super().__init__(config, base, memory, tp_group, qk_head_dim=state_size)
        self.dt_proj = self.column(base.hidden_size, memory.heads(base), bias=True)
        self.a_log = self.parameter(self.num_heads)
        self.d_skip = self.parameter(self.num_heads)
        self.mean_dt: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        settings: MixerSettings,
        cu_seqlens: Tensor | None,
        shard: ContextShard | None = None,
        layer: int = 0,
        base: Tensor | None = None,
    ) -> Tensor:
        """Runs the recurrence over x [T, B, D]; returns base + alpha * its output, shaped as x.

        Arguments as in `MemoryBranch.forward`. The controls mean the same as for the memory:
        `write_off` keeps the state empty, `shuffle_state` reads another row's state.
        """
        if shard is not None:
            refuse_controls(settings, shard)
            cu_seqlens = shard.local_cu_seqlens
        x = self.entered(x)
        *inputs, dt_logits, gate = self.projected(
            x, self.q_proj, self.k_proj, self.v_proj, self.dt_proj, self.gate_proj
        )
        q, k, v = self.convolved(inputs, cu_seqlens, shard, layer)
        c, b, v = F.silu(q), F.silu(k), F.silu(v)
        dt = F.softplus(dt_logits.float())
        self.mean_dt = dt.detach().mean()
        if settings.write_off:
            dt = torch.zeros_like(dt)
            shard = None  # the state stays 0: nothing to hand on
        if settings.shuffle_state:
            c = roll_queries(c, cu_seqlens)
        if shard is None:
            y, _ = ssd_scan(v, dt, self.a_log, b, c, cu_seqlens=cu_seqlens)
        else:
            y = ssd_over_ranks((v, dt, b, c), self.a_log, shard, layer)
        if settings.shuffle_state:
            y = y.roll(-1, dims=0)
        return self.output(y + self.d_skip[:, None] * v, gate, base)
