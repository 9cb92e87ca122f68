"""The token mixer in place of self-attention: full attention, or window plus branch.

Equation (1) of AllMem (arXiv 2602.13680): TokenMixer(x) = SWA(x) + alpha * AllMem(x).

Shapes: B sequences, T tokens, D model width, H query heads, G key-value heads, K head width.
Megatron is sequence-first, [T, B, D]; the kernels are batch-first, [B, T, ...].
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from allmem_megatron.attention_parallel import Reach, attention_over_ranks
from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.inputs import MixerInputs
from allmem_megatron.mamba2 import Mamba2Branch
from allmem_megatron.memory import MemoryBranch
from allmem_megatron.norm import RMSNorm
from allmem_megatron.order import batch_first, tokens_first
from allmem_megatron.rotary import apply_rotary


class TokenMixer(MegatronModule):
    """Attention of the base model, full or windowed, and the memory branch beside it.

    One set of base weights (`linear_qkv`, `linear_proj`, q and k norms, named as in core's
    SelfAttention) serves every mode; the branch's parameters are `memory.*`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        base: BaseModelConfig,
        branch: str,
        memory: MemoryConfig | None,
        pg_collection: ProcessGroupCollection | None = None,
        **_core_options: Any,
    ) -> None:
        super().__init__(config=config)
        group = (
            pg_collection.tp
            if pg_collection is not None
            else parallel_state.get_tensor_model_parallel_group()
        )
        self.layer_number = layer_number
        self.tp_group = group
        self.head_dim = base.head_dim
        self.group_size = base.group_size
        self.num_groups = base.num_kv_heads // group.size()  # on this rank
        self.linear_qkv = ColumnParallelLinear(
            base.hidden_size,
            (base.num_heads + 2 * base.num_kv_heads) * base.head_dim,
            config=config,
            init_method=config.init_method,
            bias=base.qkv_bias,
            gather_output=False,
            tp_group=group,
        )
        self.linear_proj = RowParallelLinear(
            base.num_heads * base.head_dim,
            base.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=group,
        )
        self.q_layernorm: RMSNorm | None = None
        self.k_layernorm: RMSNorm | None = None
        if base.qk_norm:  # each rank norms its own heads: the gradient is summed over all ranks
            self.q_layernorm = RMSNorm(config, base.head_dim, base.rms_norm_eps, group)
            self.k_layernorm = RMSNorm(config, base.head_dim, base.rms_norm_eps, group)
        self.memory: MemoryBranch | Mamba2Branch | None = None
        if branch != "none" and memory is not None:
            kind = {"allmem": MemoryBranch, "mamba2": Mamba2Branch}[branch]
            self.memory = kind(config, base, memory, group)
        self.recompute = False
        self.align_squares: Tensor | None = None

    def forward(
        self, x: Tensor, *, packed_seq_params: MixerInputs, **_core_arguments: Any
    ) -> tuple[Tensor, None]:
        """Mixes tokens as `packed_seq_params.settings` says.

        Args:
            x: [T, B, D] after the layer's norm; [T / tp, B, D] under sequence parallelism.
            packed_seq_params: settings, document bounds and rotary tables of this pass.

        Returns:
            (output shaped as x, None for the bias that core asks for).
        """
        inputs = packed_seq_params
        settings = inputs.settings
        if settings is None:
            raise ValueError("MixerInputs.settings=None: pass the MixerSettings of this call")
        if settings.mode == "align":
            return self._align(x, inputs, settings), None
        q, k, v = self._qkv(x, inputs)
        if settings.mode == "full":
            return self._project(self._attend(q, k, v, inputs, _FULL)), None
        out = self._project(self._attend(q, k, v, inputs, _window(settings)))
        if settings.mode in ("allmem", "mamba2") and not settings.memory_off:
            out = self._memory(x, inputs, settings, out)
        return out, None

    def _memory(
        self, x: Tensor, inputs: MixerInputs, settings: MixerSettings, base: Tensor | None = None
    ) -> Tensor:
        """The branch's output, shaped as x; on top of `base` where one is given."""
        if self.memory is None:
            raise ValueError("this model was built with branch='none'; build it with a branch")
        return self.memory(x, settings, inputs.cu_seqlens, inputs.context, self.layer_number, base)

    def _qkv(self, x: Tensor, inputs: MixerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K] and k, v [B, T, G, K] of this rank, normed and rotated."""
        mixed, _ = self.linear_qkv(x)
        num_tokens, batch = mixed.shape[:2]
        # [T, B, G (group_size + 2) K] -> [B, T, G, group_size + 2, K]: convert once
        mixed = mixed.view(num_tokens, batch, self.num_groups, self.group_size + 2, self.head_dim)
        mixed = batch_first(mixed)
        q, k, v = mixed.split([self.group_size, 1, 1], dim=3)
        q = q.reshape(batch, num_tokens, -1, self.head_dim)
        k, v = k.squeeze(3), v.squeeze(3)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if inputs.cos is None or inputs.sin is None:
            raise ValueError("MixerInputs has no rotary tables; call the model, not the layer")
        return apply_rotary(q, inputs.cos, inputs.sin), apply_rotary(k, inputs.cos, inputs.sin), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: MixerInputs, reach: Reach) -> Tensor:
        """[B, T, H, K]; the other context-parallel ranks' keys come from there."""
        if inputs.context is None:
            return reach.within(q, k, v, inputs.cu_seqlens)
        what = "full" if reach.window_size is None else "window"
        return attention_over_ranks(q, k, v, inputs.context, reach, (self.layer_number, what))

    def _project(self, heads_BTHK: Tensor) -> Tensor:
        return self.linear_proj(tokens_first(heads_BTHK.flatten(2)))[0]

    def _align(self, x: Tensor, inputs: MixerInputs, settings: MixerSettings) -> Tensor:
        """Full attention's output; also records this layer's squares."""
        with torch.no_grad():
            q, k, v = self._qkv(x, inputs)
            full = self._project(self._attend(q, k, v, inputs, _FULL))
            window = self._project(self._attend(q, k, v, inputs, _window(settings)))
            missing = missing_from(window, full)
        del q, k, v, window
        arguments = (x.detach(), missing, inputs, settings)
        if self.recompute and torch.is_grad_enabled():
            self.align_squares = checkpoint(
                self._alignment_squares,
                *arguments,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            self.align_squares = self._alignment_squares(*arguments)
        return full

    def _alignment_squares(
        self, x: Tensor, missing: Tensor, inputs: MixerInputs, settings: MixerSettings
    ) -> Tensor:
        """[2]: ||missing - branch||^2, ||missing||^2 over these tokens; missing = full - window."""
        left = missing.float()
        if not settings.memory_off:
            left = left - self._memory(x, inputs, settings).float()
        return torch.stack((left.pow(2).sum(), missing.float().pow(2).sum()))


def missing_from(window: Tensor, full: Tensor) -> Tensor:
    """full - window; 0 for tokens where the two differ by rounding only.

    A token that sees everything through window and sinks has nothing for the branch to learn, but
    the two sums of its keys may be rounded differently, and losses are relative to what is missing.
    """
    missing = full - window
    rounding = max(torch.finfo(full.dtype).eps, 1e-6)
    size, whole = (x.float().norm(dim=-1, keepdim=True) for x in (missing, full))
    return missing.masked_fill(size <= rounding * whole, 0)


_FULL = Reach(window_size=None)


def _window(settings: MixerSettings) -> Reach:
    return Reach(window_size=settings.window_size, num_sinks=settings.num_sinks)
