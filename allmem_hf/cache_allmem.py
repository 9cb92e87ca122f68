"""Decode state of an AllMem model: its size does not depend on how long the text is.

R rows (sequences), n_kv key-value heads of width h, W window, s sinks, d memory width.

A layer holds the keys and values of the first s tokens and of the last W (after RoPE), the last
inputs of the convolutions, and the branch's state: fast weights, momentum and the unfinished chunk
of `allmem`, or the recurrent state of `mamba2`. Rows may be at different phases of window and
chunk.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.layout_allmem import RowLayout
from kernels.ttt_memory.reference import MemoryState

_FIRST_SLOTS = 64  # the K/V buffer starts with this many slots and doubles up to s + W


class AllMemLayerCache:
    """State of one layer.

    Slot p of the buffer holds the key and value at position p while p < s + W; later ones go round
    the ring of W slots behind the sinks. The slot's position is -1 where it is empty.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = True
    is_initialized = False
    supports_early_init = False

    def __init__(self, window_size: int, num_sinks: int) -> None:
        self.window_size = window_size
        self.num_sinks = num_sinks
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        # keys and values [R, slots, n_kv, h] and positions [R, slots] int64
        self.buffer: tuple[Tensor, Tensor, Tensor] | None = None
        self.tails: tuple[Tensor, ...] = ()  # q, k, v: [R, conv_kernel - 1, width]
        self.state: MemoryState | Tensor | None = None

    def window(self, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of the slots in use when no row is longer than `longest`."""
        if self.buffer is None:
            raise ValueError("the cache is empty; run a prefill before reading its window")
        keys, values, positions = self.buffer
        return keys[:, :longest], values[:, :longest], positions[:, :longest]

    def write(self, keys: Tensor, values: Tensor, layout: RowLayout, longest: int) -> None:
        """Keeps of the new keys and values what later tokens can see.

        Args:
            keys: `[B, T, n_kv, h]` after RoPE, in the layout's shape.
            values: the same shape.
            layout: rows and positions of the tokens.
            longest: an upper bound on the length of any row after this call.
        """
        held_k, held_v, held_positions = self._reserved(keys, layout, longest)
        rows, positions = layout.rows.flatten(), layout.positions.flatten()
        new_k, new_v = keys.detach().flatten(0, 1), values.detach().flatten(0, 1)
        if layout.max_new > 1:
            kept = positions >= layout.lengths[rows] - self.window_size
            kept = (kept | (positions < self.num_sinks)).nonzero().flatten()
            rows, positions, new_k, new_v = rows[kept], positions[kept], new_k[kept], new_v[kept]
        ring = self.num_sinks + (positions - self.num_sinks) % self.window_size
        slots = torch.where(positions < self.num_sinks, positions, ring)
        held_k[rows, slots] = new_k
        held_v[rows, slots] = new_v
        held_positions[rows, slots] = positions

    def _reserved(
        self, like: Tensor, layout: RowLayout, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The buffer, with slots for rows of `longest` tokens; it grows by doubling up to s + W."""
        limit = self.num_sinks + self.window_size
        held = 0 if self.buffer is None else self.buffer[2].shape[1]
        if self.buffer is not None and held >= min(longest, limit):
            return self.buffer
        shape = (len(layout.past), min(limit, max(longest, 2 * held, _FIRST_SLOTS)))
        grown = (
            like.new_zeros(*shape, *like.shape[2:]),
            like.new_zeros(*shape, *like.shape[2:]),
            torch.full(shape, -1, dtype=torch.long, device=like.device),
        )
        if self.buffer is not None:
            for new, old in zip(grown, self.buffer, strict=True):
                new[:, :held] = old
        self.buffer = grown
        return grown

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows `[R']`, in that order; a row may be named several times."""
        if self.buffer is not None:
            rows = rows.to(self.buffer[0].device)
            keys, values, positions = self.buffer
            self.buffer = (keys[rows], values[rows], positions[rows])
        self.tails = tuple(tail[rows] for tail in self.tails)
        if isinstance(self.state, Tensor):
            self.state = self.state[rows]
        elif self.state is not None:
            self.state = self.state.select(rows)

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer holds now."""
        tensors = [*(self.buffer or ()), *self.tails]
        if isinstance(self.state, Tensor):
            tensors.append(self.state)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return size + (self.state.num_bytes if isinstance(self.state, MemoryState) else 0)


class AllMemCache(Cache):
    """Decode state of all layers, for `past_key_values`.

    `generate` makes one by itself. It can be kept between calls, copied with `copy.deepcopy` to go
    on from one prompt several times, and reordered by beam search. It cannot be cropped: the memory
    has absorbed its tokens.

    Attributes:
        lengths: `[R]` real tokens that each row has seen, None before the first call.
        seen: columns seen, padding included.
    """

    def __init__(self, config: AllMemConfig) -> None:
        layers: list[Any] = [
            AllMemLayerCache(config.window_size, config.num_sinks)
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)
        self.lengths: Tensor | None = None
        self.seen = 0

    def advance(self, layout: RowLayout) -> None:
        """Counts the tokens of a finished call."""
        self.lengths = layout.lengths
        self.seen += layout.batch_shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes that the cache holds now."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first call."""
        return -1 if self.lengths is None else len(self.lengths)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: what `generate` cuts its inputs by."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no longest text."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        for layer in self.layers:
            layer.reset()
        self.lengths = None
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes rows `beam_idx` [R] over, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, in that order."""
        if self.lengths is None:
            return
        for layer in self.layers:
            layer.select(indices)
        self.lengths = self.lengths[indices.to(self.lengths.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        if self.lengths is not None:
            rows = torch.arange(len(self.lengths), device=self.lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Only `crop(0)`: nothing can be taken out of the memory again.

        Raises:
            ValueError: another number of tokens.
        """
        if tokens_to_remove != 0:
            self._refuse(f"crop({tokens_to_remove})")

    def activate_past_recording(self) -> None:
        """Refused: earlier states are not kept."""
        self._refuse("assisted decoding")

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the layers write their own state."""
        self._refuse("update()")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{what} does not work on an AllMemCache, whose memory cannot give tokens back; "
            "start from a copy.deepcopy of the cache taken before those tokens"
        )


__all__ = ["AllMemCache", "AllMemLayerCache"]
