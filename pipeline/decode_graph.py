"""Decode steps of an `allmem_hf` model as one CUDA graph.

Once every row's window is full, a step works on the same buffers with the same shapes each time:
its kernels can be recorded once and started together, which saves the time in which the host starts
them one by one (several milliseconds a step, whatever the model's size). What a step decides on the
host stays there: after the step that completes a row's chunk the memory is written by ordinary
calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from allmem_hf import AllMemCache, AllMemForCausalLM

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a step that is recorded and not executed; gives what executes the recording."""

_EAGER_CALLS = 2
"""Steps before the recording: libraries set themselves up, and kernels are compiled."""


def record(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph. Raises: ValueError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError("a CUDA graph needs a CUDA device; decode without one (cuda_graph=false)")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def is_steady(cache: AllMemCache) -> bool:
    """Whether a step no longer changes the cache's shapes: every row has W + s tokens."""
    window = cache.config.attention_window
    if window is None or not cache.host_lengths:
        return False
    return min(cache.host_lengths) >= window + cache.config.num_sinks


class GraphedDecoder:
    """`decoder(tokens)` is a decode step of all rows of a cache; the same as `model(tokens)`.

    The first calls run as they are, then the step is recorded. While the decoder is used nothing
    else may change the cache.

    Args:
        model: in evaluation mode.
        cache: of rows that all have W + s tokens (`is_steady`).
        capture: how a step is recorded; default: a CUDA graph.
        compiled: have torch.compile make a layer's step (one program for all layers), which leaves
            a fraction of the operations to record; takes a minute or so at the first call.

    Raises:
        ValueError: a cache that still grows, or chunks of a single token.
    """

    def __init__(
        self,
        model: AllMemForCausalLM,
        cache: AllMemCache,
        *,
        capture: Capture = record,
        compiled: bool = False,
    ) -> None:
        config = cache.config
        if not is_steady(cache):
            raise ValueError(
                f"rows of {list(cache.host_lengths)} tokens do not fill window_size="
                f"{config.attention_window} and num_sinks={config.num_sinks} yet, so that steps "
                "have other shapes; decode without a graph until they do"
            )
        if config.branch == "allmem" and config.chunk_size == 1:
            raise ValueError(
                "chunk_size=1 writes the memory at every step, which a graph leaves to the host; "
                "decode without a graph"
            )
        assert cache.lengths is not None
        self.model, self.cache, self.compiled = model, cache, compiled
        self._capture = capture
        self._tokens = torch.zeros(len(cache.host_lengths), 1, dtype=torch.long).to(model.device)
        self._lengths = cache.lengths.clone()
        self._logits: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._calls = 0

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Reads one token a row.

        Args:
            tokens: `[R, 1]` int64.

        Returns:
            `[R, V]` logits of the next token, in a buffer that the next call writes over.
        """
        self._tokens.copy_(tokens)
        if self._replay is not None:
            self._replay()
        elif self._calls < _EAGER_CALLS:
            with self._frozen():
                self._step()
        else:
            with self._frozen():
                self._replay = self._capture(self._step)
            self._replay()
        self._calls += 1
        self._count()
        assert self._logits is not None
        return self._logits

    def _step(self) -> None:
        out = self.model(self._tokens, past_key_values=self.cache, use_cache=True)
        self._logits = out.logits[:, -1]
        assert self.cache.lengths is not None
        self._lengths.copy_(self.cache.lengths)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """The numbers that the host knows stand still: kernels read the device's."""
        cache, config = self.cache, self.cache.config
        lengths, seen, size = cache.host_lengths, cache.seen, config.chunk_size
        assert config.attention_window is not None
        steady = config.attention_window + config.num_sinks
        # a length at which the window is full, and no chunk becomes complete
        steady += 1 if size > 1 and (steady + 1) % size == 0 else 0
        cache.host_lengths, cache.seen = (steady,) * len(lengths), steady
        cache.lengths = self._lengths
        layers: list[Any] = list(self.model.model.layers) if self.compiled else []
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward
            cache.host_lengths, cache.seen = lengths, seen
            cache.lengths = self._lengths

    def _count(self) -> None:
        """What the host does after a step: numbers of tokens, and complete chunks."""
        cache = self.cache
        cache.host_lengths = tuple(length + 1 for length in cache.host_lengths)
        cache.seen += 1
        size = cache.config.chunk_size
        rows = [row for row, length in enumerate(cache.host_lengths) if length % size == 0]
        if not rows:
            return
        layers: list[Any] = list(self.model.model.layers)
        for layer, layer_cache in zip(layers, cache.layers, strict=True):
            if layer.use_memory:
                layer.memory.finish_chunk(layer_cache, rows)
