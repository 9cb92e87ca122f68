"""AllMem decoder for Hugging Face `generate` and `Trainer` (AllMem, arXiv 2602.13680).

B sequences, T tokens, D model width, V vocabulary; S real tokens where padding is packed away.

The base model's parameters keep their Hugging Face names, and each layer has its branch's under
`model.layers.{i}.memory.`. Equation (1): `TokenMixer(x) = SWA(x^) + alpha * AllMem(x^)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from allmem_hf.branches_allmem import AllMemBranch, AllMemConv, AllMemMamba2, AllMemMemory
from allmem_hf.cache_allmem import AllMemCache, AllMemLayerCache
from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.decode_allmem import fits, fused_step, fused_steps
from allmem_hf.layers_allmem import (
    AllMemAttention,
    AllMemMLP,
    AllMemRMSNorm,
    AllMemRotaryEmbedding,
)
from allmem_hf.layout_allmem import RowLayout, build_layout
from allmem_hf.state_allmem import SavedState, load_state, save_state
from kernels.swa import auto_backend as window_backend
from kernels.ttt_memory import auto_backend as memory_backend
from kernels.ttt_memory.branch import eta_bias

logger = logging.get_logger(__name__)


class AllMemDecoderLayer(GradientCheckpointingLayer):
    """Attention and memory side by side, then the MLP; both on a residual stream."""

    decode_backend = "auto"  # see `decode_allmem.set_decode_backend`

    def __init__(self, config: AllMemConfig) -> None:
        super().__init__()
        self.use_memory = config.branch != "none" and not config.memory_off
        self.self_attn = AllMemAttention(config)
        self.mlp = AllMemMLP(config)
        self.input_layernorm = AllMemRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = AllMemRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.branch == "allmem":
            self.memory: AllMemBranch = AllMemMemory(config)
        elif config.branch == "mamba2":
            self.memory = AllMemMamba2(config)

    def forward(
        self,
        hidden: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        layout: RowLayout,
        cache: AllMemLayerCache | None,
        seen: int,
    ) -> Tensor:
        """`[B, T, D]` -> `[B, T, D]`; `seen` columns are in the cache before this call."""
        if cache is not None and fits(self, hidden, layout, cache):
            return fused_step(self, hidden, cos_sin, layout, cache)
        normed = self.input_layernorm(hidden)
        mixed = self.self_attn(normed, cos_sin, layout, cache, seen)
        if self.use_memory:
            mixed = mixed + self.memory(normed, layout, cache)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class AllMemPreTrainedModel(PreTrainedModel):
    """Initialisation and what `transformers` asks about the architecture."""

    config_class = AllMemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AllMemDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # the memory cannot take tokens back, so no assisted decoding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AllMemConv):
            init.copy_(module.weight, AllMemConv.identity(*module.weight.shape))
        elif isinstance(module, AllMemRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies(module.config)[0])
        elif isinstance(module, AllMemBranch):
            init.zeros_(module.alpha)
            init.normal_(module.o_proj.weight, std=0.02)
            for proj in (module.q_proj, module.k_proj, module.v_proj):
                init.normal_(proj.weight, std=proj.in_features**-0.5)
            if isinstance(module, AllMemMemory):
                for fast in (module.fast_gate, module.fast_up, module.fast_down):
                    init.normal_(fast, std=fast.shape[-1] ** -0.5)
                init.constant_(module.eta_proj.bias, eta_bias(module.config.eta_init))
                for proj in (module.eta_proj, module.mu_proj):  # close to their bias at the start
                    init.normal_(proj.weight, std=0.1 * proj.in_features**-0.5)
            elif isinstance(module, AllMemMamba2):
                init.normal_(module.dt_proj.weight, std=0.1 * module.dt_proj.in_features**-0.5)
                rates = torch.empty_like(module.a_log, dtype=torch.float32).uniform_(1, 16)
                init.copy_(module.a_log, rates.log())
                low, high = math.log(1e-3), math.log(1e-1)  # dt log-uniform between 0.001 and 0.1
                dt = torch.empty_like(module.dt_proj.bias, dtype=torch.float32)
                dt = dt.uniform_(low, high).exp()
                init.copy_(module.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))
                init.ones_(module.d_skip)

    def kernel_backends(self) -> dict[str, str]:
        """What computes attention and memory of a long call here, by part of the layer.

        `window`: `flex` (FlexAttention), `reference` (blocks in plain PyTorch) or `sdpa` (full
        attention); `memory`: `triton`, `reference`, or the recurrence's `ssd`. On a CUDA device the
        fast ones are taken by themselves. `decode`: `triton` where fused kernels make its steps.
        """
        weight = next(self.parameters())
        probe = torch.empty(0, device=weight.device, dtype=weight.dtype)
        full = self.config.full_attention
        chosen = {"window": "sdpa" if full else window_backend(probe)}
        if self.config.branch == "allmem" and not self.config.memory_off:
            chosen["memory"] = memory_backend(probe, self.config.decay or None)
        elif self.config.branch == "mamba2" and not self.config.memory_off:
            chosen["memory"] = "ssd"
        if fused_steps(self, probe):
            chosen["decode"] = "triton"
        return chosen


class AllMemModel(AllMemPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: AllMemConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            AllMemDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = AllMemRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = AllMemRotaryEmbedding(config)
        self._told = False  # once which kernels run
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: AllMemCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states `[B, T, D]` after the final norm, zero at padding.

        Args:
            input_ids: `[B, T]` new tokens.
            attention_mask: `[B, T]` or `[B, cached + T]`, 1 at real tokens.
            position_ids: `[B, T]`; only needed to pack documents: restarts at 0 begin a document.
            past_key_values: the state so far; a new one is made when `use_cache` asks for it.
            inputs_embeds: `[B, T, D]` in the place of `input_ids`.
            use_cache: whether to return the state; None: as configured, but not in training.
            output_hidden_states: also return the input of every layer and the final states.
            output_attentions: refused, the weights are never held.
            return_dict: False for a plain tuple.
            **kwargs: ignored here; the causal model's loss reads some.

        Raises:
            ValueError: neither or both inputs, a cache of another kind, a mask that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions=True: the weights are never held; leave it out")
        if not self._told:
            self._told = True
            logger.info("AllMem kernels on %s: %s", self.device, self.kernel_backends())
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        seen = 0 if cache is None else cache.seen
        layout = build_layout(
            (hidden.shape[0], hidden.shape[1]),
            hidden.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=None if cache is None else cache.lengths,
            seen=seen,
            host_past=() if cache is None else cache.host_lengths,
        )
        if cache is not None and layout.batch_shape[0] != len(layout.past):
            raise ValueError(
                "packed documents cannot fill a cache; pass use_cache=False, or pad them instead"
            )
        hidden = layout.pack(hidden)
        cos_sin = self.rotary_emb(layout.positions, hidden.dtype)
        collect = output_hidden_states or (
            output_hidden_states is None and self.config.output_hidden_states
        )
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if collect:
                states.append(layout.unpack(hidden))
            layer_cache = None if cache is None else cache.layers[index]
            hidden = layer(hidden, cos_sin, layout, layer_cache, seen)
        hidden = layout.unpack(self.norm(hidden))
        if cache is not None:
            self._finish_chunks(cache, layout)
            cache.advance(layout)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if collect else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _finish_chunks(self, cache: AllMemCache, layout: RowLayout) -> None:
        """After a decode step: the rows whose chunk is complete write it."""
        if not layout.is_step:
            return  # longer calls write as they go
        size = self.config.chunk_size
        rows = [row for row, length in enumerate(layout.host_lengths) if length % size == 0]
        if not rows:
            return
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            if isinstance(layer, AllMemDecoderLayer) and layer.use_memory:
                layer.memory.finish_chunk(layer_cache, rows)

    def _cache(self, given: Any, use_cache: bool | None) -> AllMemCache | None:
        """The cache of this call: the given one, a new one, or none."""
        if given is not None and not isinstance(given, AllMemCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}, not an AllMemCache; leave it out or "
                "pass the one from an earlier call"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and self.layers[0].gradient_checkpointing:
            use_cache = False  # the backward replay would write the state a second time
        if not use_cache:
            if given is not None and given.seen:
                raise ValueError(
                    "past_key_values was given with use_cache=False; pass use_cache=True"
                )
            return None
        return AllMemCache(self.config) if given is None else given


class AllMemForCausalLM(AllMemPreTrainedModel, GenerationMixin):
    """The decoder with its output projection, ready for `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: AllMemConfig) -> None:
        super().__init__(config)
        self.model = AllMemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: AllMemCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the next-token loss when `labels` are given.

        Args:
            input_ids: see `AllMemModel.forward`, as for the other inputs.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: `[B, T]` token ids, -100 where there is no target; shifted here. A token whose
                predecessor is padding or of another document is no target.
            use_cache: see `AllMemModel.forward`.
            logits_to_keep: 0 for all positions, a number for the last ones, or indices of columns.
            return_dict: False for a plain tuple.
            **kwargs: `num_items_in_batch` for the loss; `output_hidden_states`.

        Raises:
            ValueError: as `AllMemModel.forward`, or labels together with `logits_to_keep`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            if logits.shape[:2] != labels.shape:
                raise ValueError(
                    f"labels of shape {tuple(labels.shape)} meet logits of "
                    f"{tuple(logits.shape[:2])} positions; leave logits_to_keep out"
                )
            targets = next_token_targets(labels, attention_mask, position_ids)
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=targets,
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    def save_memory(
        self,
        path: str | Path,
        cache: AllMemCache,
        hidden: Tensor,
        note: Mapping[str, Any] | None = None,
    ) -> int:
        """Writes what the model remembers to a file; arguments as in `save_state`."""
        return save_state(path, self, cache, hidden, note)

    def load_memory(self, path: str | Path) -> SavedState:
        """Reads what this model saved; errors as in `load_state`."""
        return load_state(path, self)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Gives `generate` an AllMemCache where it would make its own kind."""
        given = model_kwargs.get("past_key_values")
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} does not fit an AllMem model; leave it out, the "
                "state is of constant size already"
            )
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = AllMemCache(self.config)


def next_token_targets(
    labels: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Targets `[B, T]` of each position: the next label, -100 where there is none.

    Padding predicts nothing and is not predicted, and no document predicts the next one's start.
    """
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    if attention_mask is not None:
        real = attention_mask[:, -labels.shape[1] :].to(labels.device).bool()
        targets[:, :-1].masked_fill_(~(real[:, 1:] & real[:, :-1]), -100)
    elif position_ids is not None:
        starts = position_ids.to(labels.device).expand_as(labels)[:, 1:] == 0
        targets[:, :-1].masked_fill_(starts, -100)
    return targets


__all__ = ["AllMemForCausalLM", "AllMemModel", "AllMemPreTrainedModel"]
