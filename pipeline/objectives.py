"""What a training stage minimises, as modules around the model.

An objective's forward takes one micro-batch and gives sums over loss tokens, so that the engine can
divide by the global number of loss tokens whatever the number of ranks and micro-batches.
The student's mixer is set by `active` around forward **and** backward, because recomputed
activations run the layers again in the backward pass.

Over context-parallel ranks each rank has its part of every sequence and gives the sums over its own
tokens; over tensor-parallel ranks all have the same tokens and give the same sums.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from allmem_megatron.config import MixerSettings
from allmem_megatron.model import AllMemGPTModel, relative_errors
from pipeline.batches import MicroBatch
from pipeline.losses import LossSums, distillation_loss, next_token_loss

Forward = Callable[[MicroBatch], Any]
"""An objective's forward."""


class OutputLayer(nn.Module):
    """Calls a loss with the model's output projection.

    A module of its own, so that ZeRO-3 gathers the split weight for this call and for its backward
    pass only. It owns no parameter: the weight stays the model's.
    """

    def __init__(self, model: AllMemGPTModel) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: no submodule, whose parameters would be ours too

    def forward(self, loss: Callable[..., LossSums], *states: Tensor, **options: Any) -> LossSums:
        """`loss(*states, weight=…, **options)`; the weight is [V / tp, D]."""
        return loss(*states, weight=self.weight(), **options)

    def weight(self) -> Tensor:
        """[V / tp, D] weight of the output projection, tied or not."""
        (model,) = self._model
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        else:
            weight = model.output_layer.weight
        assert isinstance(weight, Tensor)
        return weight


class Objective(nn.Module):
    """A model and the loss it is trained with."""

    def __init__(
        self,
        model: AllMemGPTModel,
        *,
        max_elements: int,
        cp_mode: Literal["wavefront", "a2a"] | None = None,
    ) -> None:
        """Put a loss over a model.

        Args:
            model: with any mixer.
            max_elements: logits held at once on a rank.
            cp_mode: how context-parallel ranks exchange, if micro-batches are parts of sequences.
        """
        super().__init__()
        self.model = model
        self.output = OutputLayer(model)
        self.max_elements = max_elements
        self.cp_mode = cp_mode
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.tp_group = None if tp_size == 1 else parallel_state.get_tensor_model_parallel_group()

    def loss_count(self, batch: MicroBatch) -> int:
        """Number by which the summed loss is normalised: the loss tokens."""
        return int(batch.targets.sum())

    @contextlib.contextmanager
    def active(self, settings: MixerSettings) -> Iterator[None]:
        """Set the student's mixer for a forward and its backward pass."""
        with self.model.mixer(settings):
            yield

    @contextlib.contextmanager
    def step(self, run: Forward, batches: Sequence[MicroBatch], count: float) -> Iterator[None]:
        """Surround the passes of an optimizer step.

        Args:
            run: calls this objective's forward, through the engine.
            batches: this rank's micro-batches of the step.
            count: the sum of `loss_count` over all of them and all ranks.
        """
        del run, batches, count
        yield

    def whole_modules(self) -> list[nn.Module]:
        """Modules in which context-parallel ranks need not do the same: layers and branches."""
        layers: list[nn.Module] = list(self.model.decoder.layers)
        branches = [mixer.memory for mixer in self.model.mixers() if mixer.memory is not None]
        return layers + branches

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """[B, T, D] final states at this rank's tokens."""
        return self.model.hidden_states(
            batch.tokens, cu_seqlens=batch.cu_seqlens, cp_mode=self.cp_mode
        )


class NextToken(Objective):
    """Next-token cross-entropy."""

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the micro-batch's loss tokens, and what to report of it."""
        sums = self.output(
            next_token_loss,
            self.hidden_states(batch)[batch.targets],
            targets=batch.labels[batch.targets],
            max_elements=self.max_elements,
            tp_group=self.tp_group,
        )
        return sums.total, {}


class Distill(Objective):
    """Forward KL from the full-attention model to the same model under the student's mixer."""

    teacher = MixerSettings(mode="full")

    def __init__(
        self,
        model: AllMemGPTModel,
        *,
        max_elements: int,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        cp_mode: Literal["wavefront", "a2a"] | None = None,
    ) -> None:
        super().__init__(model, max_elements=max_elements, cp_mode=cp_mode)
        self.kl_weight = kl_weight
        self.ce_weight = ce_weight

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the micro-batch's loss tokens, and KL and CE for the report."""
        with torch.no_grad(), self.model.mixer(self.teacher):
            teacher = self.hidden_states(batch)[batch.targets]
        sums = self.output(
            distillation_loss,
            self.hidden_states(batch)[batch.targets],
            teacher,
            targets=batch.labels[batch.targets],
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
            max_elements=self.max_elements,
            tp_group=self.tp_group,
        )
        return sums.total, {"train/kl": sums.kl, "train/ce": sums.ce}


class Align(Objective):
    """Each layer's memory learns what its window lacks of full attention, relative to the lack.

    The lack is that of all tokens of a step: so the loss does not depend on how a step's sequences
    are split over ranks and passes. With several passes it takes another one of each without the
    memory, before them, to know it.
    """

    _step: tuple[float, Tensor | None] | None = None
    """Tokens of the step, and the lack of each layer; None for it where one pass is the step."""
    _lacks: list[Tensor] | None = None
    """The lack of each pass, while it is measured."""

    def loss_count(self, batch: MicroBatch) -> int:
        """All tokens: the layers' errors are means over positions."""
        return batch.tokens.numel()

    @contextlib.contextmanager
    def step(self, run: Forward, batches: Sequence[MicroBatch], count: float) -> Iterator[None]:
        """Measure what the windows lack in the whole step first."""
        lack = None
        if len(batches) > 1:
            self._lacks = []
            settings = dataclasses.replace(self.model.settings, memory_off=True)
            with torch.no_grad(), self.model.mixer(settings):
                for batch in batches:
                    run(batch)
            lack, self._lacks = self._over_dp(torch.stack(self._lacks).sum(0)), None
        self._step = (count, lack)
        try:
            yield
        finally:
            self._step = None

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over layers of the relative error, times the number of tokens."""
        self.hidden_states(batch)
        left, missing = self.model.align_squares().unbind(1)
        num_tokens: float = batch.tokens.numel()
        if self._lacks is not None:
            self._lacks.append(missing)
        elif self._step is not None:
            count, lack = self._step
            missing = self._over_dp(missing.detach()) if lack is None else lack
            # `left` is that of a data-parallel group; its context-parallel ranks share it
            num_tokens = count / parallel_state.get_context_parallel_world_size()
        return relative_errors(left, missing).mean() * num_tokens, {}

    @staticmethod
    def _over_dp(values: Tensor) -> Tensor:
        values = values.clone()
        torch.distributed.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return values
