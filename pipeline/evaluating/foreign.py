"""The control "state shuffled" in generation: a prompt reads what another prompt wrote.

The memory of each layer holds the fast weights that another example of the task left behind, and
nothing is written; whatever an answer gets right then, it gets through window, sinks and chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from allmem_hf import AllMemForCausalLM
from pipeline.generation import Generator

_NAMES = {part: f"fast_{part}" for part in ("gate", "up", "down")}


class ForeignMemory:
    """Puts one prompt's memory under another prompt.

    Args:
        writer: generator of the model as it is: reads and writes.
        reader: the same weights with `write_off`; its initial fast weights are replaced.
    """

    def __init__(self, writer: Generator, reader: AllMemForCausalLM) -> None:
        self._writer, self._reader = writer, reader
        for layer in reader.model.layers:  # weights of its own, in the state's precision
            for name in _NAMES.values():
                own = getattr(layer.memory, name).detach().float().clone()
                setattr(layer.memory, name, nn.Parameter(own, requires_grad=False))

    @torch.no_grad()
    def install(self, donor: Sequence[int]) -> None:
        """Read the donor's prompt, and let the reader's layers hold what it wrote.

        A donor shorter than a chunk has written nothing; the reader then has the initial weights.
        The tensors stay where they are, for a decode step that was captured on a GPU reads them.
        """
        cache = self._writer.read(donor).cache
        for layer, held, own in zip(
            self._reader.model.layers, cache.layers, self._writer.model.model.layers, strict=True
        ):
            for part, name in _NAMES.items():
                written = held.tensors.get(f"weights_{part}")
                value = getattr(own.memory, name) if written is None else written[0]
                getattr(layer.memory, name).copy_(value)


def donor_of(index: int, num_examples: int) -> int:
    """Whose memory an example reads: the next one's, the last one the first's."""
    return (index + 1) % num_examples
