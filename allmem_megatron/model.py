"""The model: Megatron-Core's GPTModel whose layers mix tokens by full attention, window or memory.

Shapes: B sequences, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from allmem_megatron.attention import TokenMixer
from allmem_megatron.config import BRANCHES, BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.context_parallel import ContextShard, check_splits, sum_over_ranks
from allmem_megatron.exchange import Exchange
from allmem_megatron.initialise import initialise
from allmem_megatron.inputs import MixerInputs
from allmem_megatron.layer_specs import block_spec, transformer_config
from allmem_megatron.mamba2 import Mamba2Branch
from allmem_megatron.memory import MemoryBranch
from allmem_megatron.order import batch_first
from allmem_megatron.parallel import ensure_model_parallel
from allmem_megatron.rotary import cos_sin, inverse_frequencies, positions_within_documents
from allmem_megatron.sharding import part_of, tag_tensor_parallel

_BRANCH_PREFIX = ".self_attention.memory."


class AllMemGPTModel(GPTModel):
    """GPTModel with our layers. Build it with `build_model`.

    One set of base weights serves teacher and student: `with model.mixer(settings): …` chooses
    what the next forward passes compute (at first: full attention, the base model itself).
    """

    def __init__(
        self,
        base: BaseModelConfig,
        *,
        branch: str,
        memory: MemoryConfig | None,
        dtype: torch.dtype,
        sequence_parallel: bool,
    ) -> None:
        super().__init__(
            config=transformer_config(base, dtype=dtype, sequence_parallel=sequence_parallel),
            transformer_layer_spec=block_spec(base, branch, memory),
            vocab_size=base.vocab_size,
            max_sequence_length=base.max_position_embeddings,
            share_embeddings_and_output_weights=base.tie_word_embeddings,
            position_embedding_type="none",  # rotary is the mixer's own
        )
        self.base_config = base
        self.branch = branch
        self.memory_config = memory
        self.settings = MixerSettings()
        frequencies, self._rotary_factor = inverse_frequencies(base)
        # a plain attribute, moved when used: a buffer would follow `.to(bfloat16)`
        self._rotary_frequencies = frequencies
        self._align_context: ContextShard | None = None
        tag_tensor_parallel(self)

    @contextlib.contextmanager
    def mixer(self, settings: MixerSettings) -> Iterator[None]:
        """Sets how all layers mix tokens inside the `with` block.

        Raises:
            ValueError: the model was built without the branch that the mode asks for.
        """
        needs = {"allmem": ("allmem",), "mamba2": ("mamba2",), "align": ("allmem", "mamba2")}
        allowed = needs.get(settings.mode)
        if allowed is not None and self.branch not in allowed:
            raise ValueError(
                f"mode={settings.mode!r} needs a model with branch {' or '.join(allowed)}, this one"
                f" has branch={self.branch!r}; build it with that branch"
            )
        before, self.settings = self.settings, settings
        try:
            yield
        finally:
            self.settings = before

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """GPTModel.forward: logits [B, T, V] (this rank's part of V), or losses given `labels`.

        The mask is always causal, with `self.settings`; `position_ids` and `attention_mask` are
        not read. Use `hidden_states` and `logits` to leave out logits that nobody needs.
        """
        packed = kwargs.pop("packed_seq_params", None)
        if isinstance(packed, PackedSeqParams) and not isinstance(packed, MixerInputs):
            cu_seqlens = packed.cu_seqlens_q
        kwargs["packed_seq_params"] = self._mixer_inputs(input_ids, cu_seqlens)
        return super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)

    def hidden_states(
        self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cp_mode: str | None = None
    ) -> Tensor:
        """States after the final norm; no logits are computed.

        Args:
            tokens: [B, T] int64. With `cp_mode`: [B, T / cp], this context-parallel rank's shard
                (`context_parallel.take_shard`).
            cu_seqlens: int [N + 1], bounds over T of N documents packed in one row (B = 1); with
                `cp_mode` too these are the bounds over all T tokens.
            cp_mode: None: this rank has whole sequences. "wavefront" or "a2a": how the memory
                crosses the context-parallel ranks, all of which make this call. With gradients on,
                all of them call backward on a loss that depends on the result (times 0 will do).

        Returns:
            [B, T, D], or [B, T / cp, D], of the tokens given.

        Raises:
            ValueError: cu_seqlens with B > 1 or not from 0 to T, T that does not split, an unknown
                mode, mode "a2a" with memory heads that do not split over the ranks, or
                `shuffle_state` over several ranks.
        """
        context = self._context(tokens, cu_seqlens, cp_mode)
        inputs = self._mixer_inputs(tokens, cu_seqlens, context)
        x = self.embedding(input_ids=tokens, position_ids=None)  # [T, B, D]
        x = self.decoder(hidden_states=x, attention_mask=None, packed_seq_params=inputs)
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        self._align_context = None
        if context is not None:
            if inputs.settings is not None and inputs.settings.mode == "align":
                self._align_context = context  # whose messages' gradients the losses will drive
            else:
                x = context.exchange.attach(x)
            context.exchange.finish()
        return batch_first(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], the whole vocabulary on every rank."""
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return F.linear(hidden, weight)
        split = F.linear(copy_to_tensor_model_parallel_region(hidden), weight)
        return gather_from_tensor_model_parallel_region(split)

    def _context(
        self, tokens: Tensor, cu_seqlens: Tensor | None, cp_mode: str | None
    ) -> ContextShard | None:
        """Where this rank's tokens lie; None if it has them all."""
        if cp_mode is None:
            return None
        recompute = any(layer.recompute for layer in self.decoder.layers)
        exchange = Exchange(
            parallel_state.get_context_parallel_group(),
            tape=recompute and torch.is_grad_enabled(),
        )
        bounds = None if cu_seqlens is None else cu_seqlens.cpu()
        context = ContextShard.of(exchange, cp_mode, tokens.shape[1] * exchange.size, bounds)
        return context if exchange.size > 1 else None

    def _mixer_inputs(
        self, tokens: Tensor, cu_seqlens: Tensor | None, context: ContextShard | None = None
    ) -> MixerInputs:
        batch, num_tokens = tokens.shape
        tp = parallel_state.get_tensor_model_parallel_world_size()
        if self.config.sequence_parallel and num_tokens % tp:
            cp = 1 if context is None else context.size
            check_splits(num_tokens * cp, cp, parts=tp)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.cpu()  # it steers Python loops: wait for a GPU once, not often
            _check_bounds(cu_seqlens, batch, num_tokens if context is None else context.num_tokens)
        if self._rotary_frequencies.device != tokens.device:
            self._rotary_frequencies = self._rotary_frequencies.to(tokens.device)
        start = 0 if context is None else context.start
        positions = positions_within_documents(num_tokens, cu_seqlens, start).to(tokens.device)
        cos, sin = cos_sin(
            positions, self._rotary_frequencies, self._rotary_factor, self.config.params_dtype
        )
        return MixerInputs(
            settings=self.settings, cu_seqlens=cu_seqlens, cos=cos, sin=sin, context=context
        )

    def mixers(self) -> Iterator[TokenMixer]:
        """The token mixer of every layer, in order."""
        for layer in self.decoder.layers:
            yield layer.self_attention

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the base model."""
        return ((n, p) for n, p in self.named_parameters() if _BRANCH_PREFIX not in n)

    def memory_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the branch, alpha included; nothing for branch "none"."""
        return ((n, p) for n, p in self.named_parameters() if _BRANCH_PREFIX in n)

    def align_squares(self) -> Tensor:
        """||missing - branch||^2 and ||missing||^2 of the last forward pass in mode "align".

        missing = full - window, over all tokens; the call clears them. The same numbers on all
        tensor- and context-parallel ranks, all of which make this call; on several context-parallel
        ranks the gradient is that of the sum over all ranks, so that each rank's share of a loss
        made of them is 1 / cp of it.

        Returns:
            [L, 2], float32.

        Raises:
            ValueError: no such pass has run since the last call.
        """
        squares = []
        for mixer in self.mixers():
            if mixer.align_squares is None:
                raise ValueError("no alignment losses: run hidden_states in mode 'align' first")
            squares.append(mixer.align_squares)
            mixer.align_squares = None
        total = torch.stack(squares)
        if self.config.sequence_parallel:  # each rank has seen T / tp tokens
            total = reduce_from_tensor_model_parallel_region(total)
        context, self._align_context = self._align_context, None
        if context is not None:
            total = sum_over_ranks(context.exchange.attach(total), context.exchange.group)
        return total

    def align_losses(self) -> list[Tensor]:
        """Every layer's ||missing - branch||^2 / ||missing||^2; see `align_squares`."""
        return list(relative_errors(*self.align_squares().unbind(1)).unbind())

    @contextlib.contextmanager
    def noting_spread(self, wanted: bool = True) -> Iterator[None]:
        """While it is open, and `wanted`, passes note how far eta and mu spread, too."""
        branches = [m.memory for m in self.mixers() if isinstance(m.memory, MemoryBranch)]
        for branch in branches:
            branch.wants_spread, branch.spread = wanted, {}
        try:
            yield
        finally:
            for branch in branches:
                branch.wants_spread = False

    def memory_statistics(self) -> dict[str, float]:
        """Mean |alpha| over channels per layer; eta and mu of the last forward pass.

        Keys: "alpha_abs/layer_00", …, "alpha_abs/mean", and once a pass has used the branch
        "eta/layer_00", …, "eta/mean", and the same of "mu" ("dt" for mamba2). After a pass under
        `noting_spread` also "eta/min", "eta/max" and "eta/std" (the mean over layers of the
        standard deviation over tokens and heads). Numbers are this rank's heads' and come from the
        device in one copy. Under ZeRO-3 all ranks make this call.
        """
        branches = [mixer.memory for mixer in self.mixers() if mixer.memory is not None]
        if not branches:
            return {}
        columns = {"alpha_abs": [part_of(b.alpha).detach().float().abs().mean() for b in branches]}
        for name in ("dt",) if isinstance(branches[0], Mamba2Branch) else ("eta", "mu"):
            means = [getattr(branch, f"mean_{name}") for branch in branches]
            if all(mean is not None for mean in means):
                columns[name] = means
        statistics: dict[str, float] = {}
        for name, row in zip(
            columns, torch.stack([torch.stack(c) for c in columns.values()]).tolist(), strict=True
        ):
            statistics |= {f"{name}/layer_{i:02d}": value for i, value in enumerate(row)}
            statistics[f"{name}/mean"] = sum(row) / len(row)
        spreads = [b.spread for b in branches if isinstance(b, MemoryBranch) and b.spread]
        for name in ("eta", "mu") if spreads else ():
            low, high, std = zip(*torch.stack([s[name] for s in spreads]).tolist(), strict=True)
            statistics[f"{name}/min"], statistics[f"{name}/max"] = min(low), max(high)
            statistics[f"{name}/std"] = sum(std) / len(std)
        return statistics


def relative_errors(left: Tensor, missing: Tensor) -> Tensor:
    """[L]: left / missing, and 0 where nothing is missing.

    Where no document is longer than the window, the branch has nothing to stand in for.
    """
    something = missing > 0
    safe = torch.where(something, missing, torch.ones_like(missing))
    return torch.where(something, left / safe, torch.zeros_like(safe))


def _check_bounds(cu_seqlens: Tensor, batch: int, num_tokens: int) -> None:
    if batch != 1:
        raise ValueError(
            f"cu_seqlens with {batch} rows: packed documents are one row; flatten tokens to B=1"
        )
    bounds = cu_seqlens.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens or not rising:
        raise ValueError(
            f"cu_seqlens={bounds[:8]} must rise from 0 to the {num_tokens} tokens of the row;"
            " pass document bounds that cover it"
        )


def check_sizes(base: BaseModelConfig, memory: MemoryConfig | None, *, tp: int = 1) -> None:
    """Refuses sizes that do not fit each other or the tensor-parallel ranks.

    Raises: ValueError naming the size, and the number of ranks that would do.
    """
    parts = {
        "vocab_size": base.vocab_size,
        "num_kv_heads": base.num_kv_heads,
        "intermediate_size": base.intermediate_size,
    }
    if memory is not None:
        parts["mixer.memory.num_heads"] = memory.heads(base)
    for name, size in parts.items():
        if size % tp:
            raise ValueError(
                f"{name}={size} does not split over tp={tp} ranks; call"
                f" init_model_parallel(tp={math.gcd(size, tp)}), or with another divisor of it"
            )


def build_model(
    base: BaseModelConfig,
    *,
    branch: str = "none",
    memory: MemoryConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    recompute: bool = False,
    meta: bool = False,
    sequence_parallel: bool = False,
    init_std: float = 0.02,
    embedding_std: float | None = None,
    init_base: bool = True,
) -> AllMemGPTModel:
    """Builds the model with freshly drawn weights, on the CPU; move it with `.to(device)`.

    Args:
        base: sizes of the base model.
        branch: "none", "allmem" or "mamba2": what stands beside window attention.
        memory: the branch's sizes; None: the paper's, where there is a branch.
        dtype: of all parameters.
        seed: of the initial weights; the same weights at any number of ranks.
        recompute: keep only each layer's input, and compute the rest again in backward.
        meta: build without storage, to count parameters.
        sequence_parallel: split the tokens between the layers' projections over the
            tensor-parallel ranks.
        init_std: of projections drawn at random.
        embedding_std: of the token embedding; None: init_std.
        init_base: False fills the base weights with NaN instead of drawing them, which is quicker
            where a checkpoint is loaded anyway.

    Raises:
        ValueError: an unknown branch, or sizes that do not fit each other or the ranks.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch={branch!r} is not known; use one of {', '.join(BRANCHES)}")
    ensure_model_parallel()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    memory = None if branch == "none" else memory or MemoryConfig()
    # here, for core adds the names of its classes to what a layer's constructor raises
    check_sizes(base, memory, tp=tp)
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = AllMemGPTModel(
            base,
            branch=branch,
            memory=memory,
            dtype=dtype,
            sequence_parallel=sequence_parallel and tp > 1,
        )
    if not meta:
        initialise(model, seed=seed, init_std=init_std, embedding_std=embedding_std, base=init_base)
    for layer in model.decoder.layers:
        layer.recompute = recompute
        layer.self_attention.recompute = recompute
    return model
