"""What one forward pass hands to the mixer of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from allmem_megatron.config import MixerSettings
from allmem_megatron.context_parallel import ContextShard


@dataclass
class MixerInputs(PackedSeqParams):
    """It travels by way of core's arguments.

    With the call, not on the modules, so that a layer recomputed in the backward pass mixes as it
    did in the forward pass, whatever the model is set to by then.
    """

    settings: MixerSettings | None = None
    cu_seqlens: Tensor | None = None
    """int [N + 1] document bounds over T when B = 1 holds N packed documents; over the tokens of
    all ranks if there is a `context`."""
    cos: Tensor | None = None
    """[T, K]"""
    sin: Tensor | None = None
    """[T, K]"""
    context: ContextShard | None = None
    """Where this rank's T tokens lie if context-parallel ranks hold the others."""
