"""The AllMem branch of one layer: a memory network per head that learns while it reads.

Equations (2)-(12) of AllMem (arXiv 2602.13680). The formulas live in `kernels.ttt_memory`; this
module owns the parameters and splits them by memory head over the tensor-parallel ranks.

Shapes: B sequences, T tokens, D model width, H memory heads of this rank, K head width, F hidden
width of a head's network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.context_parallel import ContextShard
from allmem_megatron.memory_parallel import conv_halo, keep_gradients, memory_over_ranks
from allmem_megatron.norm import shared_over_tp
from allmem_megatron.order import batch_first, tokens_first
from allmem_megatron.shard_scan import ShardDocuments, Streams
from kernels.ttt_memory import FastWeights, memory_scan
from kernels.ttt_memory.branch import eta_from, mu_from
from kernels.ttt_memory.fused import add_scaled, conv_heads, gated_output

ALIGNMENT = 64
"""Outputs of the branch's projections of a token are padded to a multiple of this."""


def _in_turn(weight: Tensor) -> Tensor:
    """The weight, by a node of autograd of its own.

    Gradients of several weights that leave one node are accumulated in an order that depends on
    what else is ready; those that leave nodes of their own, in the nodes' order, on every rank.
    """
    return weight.view_as(weight)


class BranchBase(MegatronModule):
    """What the memory and its Mamba-2 stand-in share: projections, convolutions, gate, alpha."""

    def __init__(
        self,
        config: TransformerConfig,
        base: BaseModelConfig,
        memory: MemoryConfig,
        tp_group: torch.distributed.ProcessGroup,
        *,
        qk_head_dim: int,
    ) -> None:
        super().__init__(config=config)
        num_heads = memory.heads(base)
        self.tp_group = tp_group
        self.eps = base.rms_norm_eps
        self.num_heads = num_heads // tp_group.size()  # on this rank
        self.head_dim = memory.head_dim(base)
        self.qk_head_dim = qk_head_dim
        qk_size, v_size = num_heads * qk_head_dim, num_heads * self.head_dim
        self.q_proj = self.column(base.hidden_size, qk_size)
        self.k_proj = self.column(base.hidden_size, qk_size)
        self.v_proj = self.column(base.hidden_size, v_size)
        self.gate_proj = self.column(base.hidden_size, num_heads, bias=True)
        taps = memory.conv_kernel
        self.q_conv = self.parameter(self.num_heads * qk_head_dim, taps)
        self.k_conv = self.parameter(self.num_heads * qk_head_dim, taps)
        self.v_conv = self.parameter(self.num_heads * self.head_dim, taps)
        self.o_norm = self.parameter(self.head_dim)
        self.o_proj = RowParallelLinear(
            v_size,
            base.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tp_group,
        )
        self.alpha = self.parameter(base.hidden_size)

    def column(self, in_size: int, out_size: int, bias: bool = False) -> ColumnParallelLinear:
        """A projection of `entered` tokens, its outputs split over the ranks by memory head."""
        linear = ColumnParallelLinear(
            in_size,
            out_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=bias,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=self.tp_group,
        )
        linear.sequence_parallel = False  # its input is gathered already
        return linear

    def entered(self, x: Tensor) -> Tensor:
        """x with all tokens on every tensor-parallel rank, its gradient summed over them.

        Once for all projections: each of core's would gather x, and gather it again and scatter
        its gradient in backward, on its own.
        """
        if self.tp_group.size() == 1:
            return x
        if self.config.sequence_parallel:  # [T / tp, B, D] -> [T, B, D]
            return gather_from_sequence_parallel_region(x, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def parameter(self, *shape: int) -> nn.Parameter:
        """An unset parameter in the model's dtype."""
        return nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype))

    def project(self, linear: ColumnParallelLinear, x: Tensor) -> Tensor:
        """[T, B, D] -> [B, T, outputs of this rank]: from Megatron's order to the kernels'."""
        out: Tensor = linear(x)[0]
        return batch_first(out)

    def projected(self, x: Tensor, *linears: ColumnParallelLinear) -> list[Tensor]:
        """Several projections of x [T, B, D], each [B, T, outputs of this rank], in one product.

        x is read once and its gradient written once; products of their own would have their
        gradients summed one by one, which is most of what the narrow projections cost. Weights that
        ZeRO-3 gathers only when their module runs are multiplied there.
        """
        if any(hasattr(linear.weight, "ds_id") for linear in linears):
            return [self.project(linear, x) for linear in linears]
        weights = [_in_turn(linear.weight) for linear in linears]
        sizes = [weight.shape[0] for weight in weights]
        # rows of zeros, so that each token's outputs begin where wide loads may
        sizes.append(-sum(sizes) % ALIGNMENT)
        weights.append(x.new_zeros(sizes[-1], x.shape[-1]))
        bias = None
        if any(linear.bias is not None for linear in linears):
            given = [None if linear.bias is None else _in_turn(linear.bias) for linear in linears]
            parts = zip(sizes, (*given, None), strict=True)
            bias = torch.cat([x.new_zeros(n) if part is None else part for n, part in parts])
        out = F.linear(x, torch.cat(weights), bias)
        return list(batch_first(out).split(sizes, -1))[: len(linears)]

    def convolved(
        self,
        inputs: Sequence[Tensor],
        cu_seqlens: Tensor | None,
        shard: ContextShard | None = None,
        layer: int = 0,
        *,
        norms: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """q, k, v of equation (2), each [B, T, H, K]; with `norms`, of equation (3).

        inputs: their projections, each [B, T, H K].
        """
        convs = (self.q_conv, self.k_conv, self.v_conv)
        tails: list[Tensor] | list[None] = [None] * 3
        if shard is not None:
            tails = conv_halo(inputs, self.q_conv.shape[-1] - 1, shard, layer)
        weights = (None, None, None) if norms is None else (*norms, None)
        return [
            conv_heads(
                part, conv, self.num_heads, norm=weight, eps=self.eps, tail=tail,
                cu_seqlens=cu_seqlens,
            )
            for part, conv, weight, tail in zip(inputs, convs, weights, tails, strict=True)
        ]  # fmt: skip

    def output(self, v_hat_BTHK: Tensor, gate_logits: Tensor, base: Tensor | None) -> Tensor:
        """alpha times equation (12), [T, B, D], on top of `base`; gate_logits [B, T, H]."""
        norm_weight = shared_over_tp(self.o_norm, self.tp_group)
        mixed = gated_output(v_hat_BTHK, norm_weight, gate_logits, self.eps)
        out, _ = self.o_proj(tokens_first(mixed))
        alpha: Tensor = self.alpha
        if self.config.sequence_parallel:  # each rank multiplies T / tp tokens
            alpha = shared_over_tp(alpha, self.tp_group)
        return alpha * out if base is None else add_scaled(base, alpha, out)


class MemoryBranch(BranchBase):
    """alpha * AllMem(x) of equation (1).

    Args:
        config: core's configuration of the model.
        base: the base model's sizes.
        memory: the memory's sizes and switches.
        tp_group: ranks over which the memory heads are split.
    """

    def __init__(
        self,
        config: TransformerConfig,
        base: BaseModelConfig,
        memory: MemoryConfig,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config, base, memory, tp_group, qk_head_dim=memory.head_dim(base))
        self.clip = memory.clip
        self.decay = memory.decay or None
        heads, width = self.num_heads, self.head_dim
        hidden = memory.expansion * width
        self.q_norm = self.parameter(width)
        self.k_norm = self.parameter(width)
        num_heads = memory.heads(base)
        self.eta_proj = self.column(base.hidden_size, num_heads * 3, bias=True)
        self.mu_proj = self.column(base.hidden_size, num_heads, bias=True)
        self.fast_gate = self.parameter(heads, hidden, width)
        self.fast_up = self.parameter(heads, hidden, width)
        self.fast_down = self.parameter(heads, width, hidden)
        self.mean_eta: Tensor | None = None
        self.mean_mu: Tensor | None = None
        self.wants_spread = False
        self.spread: dict[str, Tensor] = {}

    def forward(
        self,
        x: Tensor,
        settings: MixerSettings,
        cu_seqlens: Tensor | None,
        shard: ContextShard | None = None,
        layer: int = 0,
        base: Tensor | None = None,
    ) -> Tensor:
        """Reads and writes the memory over x.

        Args:
            x: [T, B, D] ([T / tp, B, D] under sequence parallelism), after the layer's norm.
            settings: chunk size and controls.
            cu_seqlens: [N + 1] document bounds for B = 1, or None.
            shard: where the tokens lie if other ranks hold some; cu_seqlens is then not read.
            layer: names what goes to and comes from those ranks.
            base: what the branch is added to, shaped as x.

        Returns:
            base + alpha * AllMem(x), shaped as x.

        Raises:
            ValueError: `shuffle_state` with rows that do not fit it, or with a shard.
        """
        if shard is not None:
            refuse_controls(settings, shard)
            cu_seqlens = shard.local_cu_seqlens
        x = self.entered(x)
        # all that needs no state comes first: with a shard, the scan waits for the rank before
        norms = (
            shared_over_tp(self.q_norm, self.tp_group), shared_over_tp(self.k_norm, self.tp_group)
        )  # fmt: skip
        *inputs, eta_logits, mu_logits, gate = self.projected(
            x, self.q_proj, self.k_proj, self.v_proj, self.eta_proj, self.mu_proj, self.gate_proj
        )
        q, k, v = self.convolved(inputs, cu_seqlens, shard, layer, norms=norms)
        # rates in float32: bfloat16 has three digits
        eta = eta_from(eta_logits.float().unflatten(-1, (self.num_heads, 3)))
        mu = mu_from(mu_logits.float())
        self.mean_eta, self.mean_mu = eta.detach().float().mean(), mu.detach().float().mean()
        if self.wants_spread:
            self.spread = {"eta": spread_of(eta), "mu": spread_of(mu)}
        weights = FastWeights(self.fast_gate, self.fast_up, self.fast_down)
        chunk_size = settings.chunk_size
        if settings.write_off:
            # one chunk that is never written: even the renormalisation (9) leaves W0 alone
            eta, mu = torch.zeros_like(eta), torch.zeros_like(mu)
            chunk_size = max(chunk_size, q.shape[1] + 1)
            shard = None  # W0 everywhere: nothing to hand on
        if settings.shuffle_state:
            q = roll_queries(q, cu_seqlens)
        v_hat = self._scan((q, k, v, eta, mu), weights, chunk_size, cu_seqlens, shard, layer)
        if settings.shuffle_state:
            v_hat = v_hat.roll(-1, dims=0)
        return self.output(v_hat, gate, base)

    def _scan(
        self,
        streams: Streams,
        weights: FastWeights,
        chunk_size: int,
        cu_seqlens: Tensor | None,
        shard: ContextShard | None,
        layer: int,
    ) -> Tensor:
        """Equations (8) to (11), over ranks if there is a shard; every input gets a gradient."""
        q, k, v, eta, mu = streams
        options: dict[str, Any] = {
            "chunk_size": chunk_size,
            "clip": self.clip,
            "decay": self.decay,
        }
        if shard is None:
            v_hat, _ = memory_scan(
                q, k, v, eta, mu, weights, cu_seqlens=cu_seqlens, return_state=False, **options
            )
        else:
            v_hat = memory_over_ranks(streams, weights, shard, layer, **options)
        if num_chunks(q.shape[1], cu_seqlens, shard, chunk_size):
            return v_hat
        return keep_gradients(v_hat, k, v, eta, mu, *weights)


def num_chunks(
    num_tokens: int, cu_seqlens: Tensor | None, shard: ContextShard | None, chunk_size: int
) -> int:
    """Chunks that end among these tokens, which are all of a sequence or one rank's shard of it."""
    if shard is None:
        documents = ShardDocuments(cu_seqlens, num_tokens, 0, num_tokens, False)
    else:
        documents = ShardDocuments.of(shard)
    return documents.complete_chunks(chunk_size)


def refuse_controls(settings: MixerSettings, shard: ContextShard) -> None:
    """Refuses what needs whole sequences on one rank. Raises: ValueError."""
    if settings.shuffle_state:
        raise ValueError(
            f"shuffle_state=True over {shard.size} context-parallel ranks: the rows' states do not"
            " meet there; evaluate whole sequences, with cp_mode=None"
        )


def roll_queries(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Moves row b's queries beside row (b + 1) % B's keys (the shuffled-state control)."""
    if cu_seqlens is not None or q.shape[0] < 2:
        raise ValueError(
            f"shuffle_state with {q.shape[0]} row(s), packed={cu_seqlens is not None}: it needs at"
            " least 2 unpacked rows of equal length; raise the batch size and drop cu_seqlens"
        )
    return q.roll(1, dims=0)


def spread_of(values: Tensor) -> Tensor:
    """[3] least, largest and standard deviation over all elements, in float32."""
    values = values.detach().float()
    return torch.stack((*torch.aminmax(values), values.std(correction=0)))
