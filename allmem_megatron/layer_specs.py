"""The layer specification and configuration that make core's GPTModel an AllMem model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from allmem_megatron.attention import TokenMixer
from allmem_megatron.config import BaseModelConfig, MemoryConfig
from allmem_megatron.inputs import MixerInputs
from allmem_megatron.norm import RMSNorm


class AllMemLayer(TransformerLayer):
    """core's TransformerLayer; recomputes its activations in backward when `recompute` is set."""

    recompute: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # core turns gradients on around the residual additions, under no_grad too
        self.bias_dropout_add_exec_handler = nullcontext

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """One layer on [T, B, D]; see TransformerLayer.forward."""
        inputs = kwargs.get("packed_seq_params")
        aligning = isinstance(inputs, MixerInputs) and _mode(inputs) == "align"
        if not (self.recompute and torch.is_grad_enabled()) or aligning:
            return super().forward(hidden_states=hidden_states, **kwargs)
        # no dropout anywhere: there is no random state to bring back
        return checkpoint(
            lambda x: super(AllMemLayer, self).forward(hidden_states=x, **kwargs),
            hidden_states,
            use_reentrant=False,
            preserve_rng_state=False,
        )


def _mode(inputs: MixerInputs) -> str:
    return inputs.settings.mode if inputs.settings is not None else "full"


def add_residual(training: bool, fused: bool) -> Any:
    """The bias-dropout-add of a model that has neither bias nor dropout there."""
    del training, fused

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        del prob
        x, bias = x_with_bias
        return residual + x if bias is None else residual + x + bias

    return add


def block_spec(
    base: BaseModelConfig, branch: str, memory: MemoryConfig | None
) -> TransformerBlockSubmodules:
    """The specification of all layers: our TokenMixer in place of self-attention."""
    layer = ModuleSpec(
        module=AllMemLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=TokenMixer, params={"base": base, "branch": branch, "memory": memory}
            ),
            self_attn_bda=add_residual,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=add_residual,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * base.num_layers, layer_norm=RMSNorm)


def transformer_config(
    base: BaseModelConfig, *, dtype: torch.dtype, sequence_parallel: bool
) -> TransformerConfig:
    """core's configuration of the base model.

    Weights are left unset (`perform_initialization=False`): `initialise.py` draws them from
    generators seeded by name, which core's own initialisation cannot.
    """
    return TransformerConfig(
        num_layers=base.num_layers,
        hidden_size=base.hidden_size,
        num_attention_heads=base.num_heads,
        num_query_groups=base.num_kv_heads,
        kv_channels=base.head_dim,
        ffn_hidden_size=base.intermediate_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=base.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=base.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
