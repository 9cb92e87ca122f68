"""What a training stage minimises, as modules around the model.

An objective's forward takes one micro-batch and gives sums over loss tokens, so that the engine can
divide by the global number of loss tokens whatever the number of ranks and micro-batches.
The student's mixer is set by `active` around forward **and** backward, because recomputed
activations run the layers again in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from allmem_megatron.config import MixerSettings
from allmem_megatron.model import AllMemGPTModel
from pipeline.batches import MicroBatch
from pipeline.losses import distillation_loss, next_token_loss


class Objective(nn.Module):
    """A model and the loss it is trained with."""

    def __init__(self, model: AllMemGPTModel, *, max_elements: int) -> None:
        super().__init__()
        self.model = model
        self.max_elements = max_elements

    def loss_count(self, batch: MicroBatch) -> int:
        """Number by which the summed loss is normalised: the loss tokens."""
        return int(batch.targets.sum())

    @contextlib.contextmanager
    def active(self, settings: MixerSettings) -> Iterator[None]:
        """Set the student's mixer for a forward and its backward pass."""
        with self.model.mixer(settings):
            yield

    def output_weight(self) -> Tensor:
        """[V, D] weight of the output projection, tied or not."""
        if self.model.share_embeddings_and_output_weights:
            weight = self.model.shared_embedding_or_output_weight()
        else:
            weight = self.model.output_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def next_tokens(self, batch: MicroBatch) -> Tensor:
        """[N] tokens that follow the predicting positions."""
        return batch.tokens[:, 1:][batch.targets[:, :-1]]


class NextToken(Objective):
    """Next-token cross-entropy."""

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the micro-batch's loss tokens, and what to report of it."""
        hidden = self.model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens)
        sums = next_token_loss(
            hidden[batch.targets],
            self.output_weight(),
            self.next_tokens(batch),
            max_elements=self.max_elements,
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
    ) -> None:
        super().__init__(model, max_elements=max_elements)
        self.kl_weight = kl_weight
        self.ce_weight = ce_weight

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the micro-batch's loss tokens, and KL and CE for the report."""
        with torch.no_grad(), self.model.mixer(self.teacher):
            teacher = self.model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens)
            teacher = teacher[batch.targets]
        student = self.model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens)
        sums = distillation_loss(
            student[batch.targets],
            teacher,
            self.output_weight(),
            self.next_tokens(batch),
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
            max_elements=self.max_elements,
        )
        return sums.total, {"train/kl": sums.kl, "train/ce": sums.ce}


class Align(Objective):
    """Each layer's memory learns what its window lacks of full attention, relative to the lack."""

    def loss_count(self, batch: MicroBatch) -> int:
        """All tokens: the layers' errors are means over positions."""
        return batch.tokens.numel()

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over layers of the relative error, times the number of tokens."""
        self.model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens)
        losses = self.model.align_losses()
        total = torch.stack(losses).mean() * batch.tokens.numel()
        return total, {}
