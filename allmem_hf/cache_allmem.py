"""Decode state of an AllMem model: its size does not depend on how long the text is.

R rows (sequences), n_kv key-value heads of width h, W window, s sinks, c chunk length, n memory
heads of width d_h.

A layer holds the keys and values of the first s tokens and of the last W (after RoPE), the last
inputs of the convolutions, and the branch's state: fast weights, momentum and the unfinished chunk
of `allmem`, or the recurrent state of `mamba2`. Rows may be of any lengths, at different phases of
window and chunk. Every tensor is allocated once and changed in place: a decode step copies nothing
that it does not change. With full attention (the base model) the keys and values grow by doubling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.layout_allmem import RowLayout
from kernels.ttt_memory.reference import FastWeights, MemoryState

_FIRST_SLOTS = 64  # the K/V buffer starts with this many slots and doubles up to s + W
_KEY_VALUE = ("keys", "values")


class AllMemLayerCache:
    """State of one layer, by name in `tensors`; each tensor's first dimension is R.

    Names: `keys`, `values` `[R, slots, n_kv, h]`; `tail_q`, `tail_k`, `tail_v`
    `[R, conv_kernel - 1, width]`; `weights_*` and `momentum_*` (`gate`, `up`, `down`, float32), and
    the unfinished chunk `pending_k`, `pending_v` `[R, c, n, d_h]`, `pending_eta` `[R, c, n, 3]`,
    `pending_mu` `[R, c, n]`; or `recurrent` `[R, n, d_h, N]`.

    Slot p of keys and values holds position p while p < s + W; later ones go round the ring of W
    slots behind the sinks. So a row of L tokens fills the first min(L, s + W) slots, which are
    exactly what its next token sees.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = True
    is_initialized = False
    supports_early_init = False

    def __init__(self, window_size: int | None, num_sinks: int, chunk_size: int) -> None:
        self.window_size = window_size
        self.num_sinks = num_sinks
        self.chunk_size = chunk_size
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.tensors: dict[str, Tensor] = {}

    def keep(self, name: str, value: Tensor) -> None:
        """Stores a tensor of the state, in the place of the one that is there."""
        held = self.tensors.get(name)
        if held is not None and held.shape == value.shape and held.dtype == value.dtype:
            held.copy_(value.detach())
        else:  # a copy: it may be a view of a parameter, and is written to later
            self.tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)

    # ------------------------------------------------------------------------------- attention

    def write(self, keys: Tensor, values: Tensor, layout: RowLayout) -> None:
        """Keeps of the new keys and values what later tokens can see.

        Args:
            keys: `[B, T, n_kv, h]` after RoPE, in the layout's shape.
            values: the same shape.
            layout: rows and positions of the tokens.
        """
        self.reserve(keys, layout)
        rows, positions = layout.rows.flatten(), layout.positions.flatten()
        new = [x.detach().flatten(0, 1) for x in (keys, values)]
        if layout.max_new > 1 and self.window_size is not None:
            kept = positions >= layout.lengths[rows] - self.window_size
            kept = (kept | (positions < self.num_sinks)).nonzero().flatten()
            rows, positions, new = rows[kept], positions[kept], [x[kept] for x in new]
        slots = self.slots_of(positions)
        for name, values_ in zip(_KEY_VALUE, new, strict=True):
            self.tensors[name][rows, slots] = values_

    def slots_of(self, positions: Tensor) -> Tensor:
        """The slot of each position."""
        if self.window_size is None:
            return positions
        ring = self.num_sinks + (positions - self.num_sinks) % self.window_size
        return torch.where(positions < self.num_sinks, positions, ring)

    def positions(self, lengths: Tensor) -> Tensor:
        """Position in each slot `[R, slots]` of rows of `lengths` `[R]` tokens; -1: empty."""
        slot = torch.arange(self.tensors["keys"].shape[1], device=lengths.device)
        last = lengths[:, None] - 1
        held = slot.expand(len(lengths), -1)
        if self.window_size is not None:
            held = torch.where(slot < self.num_sinks, slot, last - (last - slot) % self.window_size)
        return held.masked_fill(slot > last, -1)

    def reserve(self, like: Tensor, layout: RowLayout) -> None:
        """Makes slots for the rows' new lengths; their number doubles up to s + W."""
        longest = max(layout.host_lengths)
        limit = None if self.window_size is None else self.num_sinks + self.window_size
        held = self.tensors["keys"].shape[1] if "keys" in self.tensors else 0
        wanted = longest if limit is None else min(longest, limit)
        if held >= wanted and held:
            return
        slots = max(wanted, 2 * held, _FIRST_SLOTS)
        slots = slots if limit is None else min(slots, limit)
        for name in _KEY_VALUE:
            grown = like.new_zeros(len(layout.past), slots, *like.shape[2:])
            if held:
                grown[:, :held] = self.tensors[name]
            self.tensors[name] = grown

    # ------------------------------------------------------------------------------- memory

    def memory_state(self, pending: Sequence[int]) -> MemoryState | None:
        """The memory's state as `memory_scan` takes it; `pending` tokens of each row's chunk."""
        held = self.tensors
        if "weights_gate" not in held:
            return None
        most = max(pending, default=0)
        return MemoryState(
            weights=FastWeights(*(held[f"weights_{name}"] for name in FastWeights._fields)),
            momentum=FastWeights(*(held[f"momentum_{name}"] for name in FastWeights._fields)),
            **{f"pending_{x}": held[f"pending_{x}"][:, :most] for x in ("k", "v", "eta", "mu")},
            pending_length=torch.tensor(list(pending), dtype=torch.int64),
        )

    def keep_memory(self, state: MemoryState) -> None:
        """Stores what `memory_scan` returned."""
        for name, weight, momentum in zip(
            FastWeights._fields, state.weights, state.momentum, strict=True
        ):
            self.keep(f"weights_{name}", weight)
            self.keep(f"momentum_{name}", momentum)
        for x, rest in zip(("k", "v", "eta", "mu"), state.pending(), strict=True):
            name = f"pending_{x}"
            if name not in self.tensors:
                shape = (rest.shape[0], self.chunk_size, *rest.shape[2:])
                self.tensors[name] = rest.new_zeros(shape)
            self.tensors[name][:, : rest.shape[1]] = rest.detach()

    # ------------------------------------------------------------------------------- rows

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows `[R']`, in that order; a row may be named several times."""
        self.tensors = {
            name: x.index_select(0, rows.to(x.device)) for name, x in self.tensors.items()
        }

    def cat(self, layers: Sequence[AllMemLayerCache]) -> None:
        """Takes over the rows of `layers`, one after the other."""
        names = {frozenset(layer.tensors) for layer in layers}
        if len(names) != 1:
            raise ValueError(
                "caches of different branches, or an empty one, cannot be joined; join caches of "
                "one model after each has seen a token"
            )
        for name in layers[0].tensors:
            parts = [layer.tensors[name] for layer in layers]
            if name in _KEY_VALUE:  # these alone differ in their number of slots
                slots = max(part.shape[1] for part in parts)
                parts = [_padded(part, slots) for part in parts]
            self.tensors[name] = torch.cat(parts)

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer holds now."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())


def _padded(x: Tensor, slots: int) -> Tensor:
    missing = slots - x.shape[1]
    if not missing:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)


class AllMemCache(Cache):
    """Decode state of all layers, for `past_key_values`.

    `generate` makes one by itself. It can be kept between calls, copied with `copy.deepcopy` to go
    on from one prompt several times, cut into rows and joined (`take`, `cat`), and reordered by
    beam search. It cannot be cropped: the memory has absorbed its tokens.

    Attributes:
        lengths: `[R]` real tokens that each row has seen, None before the first call.
        host_lengths: the same numbers as a tuple, known without waiting for the device.
        seen: columns seen, padding included.
    """

    def __init__(self, config: AllMemConfig) -> None:
        self.config = config
        layers: list[Any] = [
            AllMemLayerCache(config.attention_window, config.num_sinks, config.chunk_size)
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)
        self.lengths: Tensor | None = None
        self.host_lengths: tuple[int, ...] = ()
        self.seen = 0

    def advance(self, layout: RowLayout) -> None:
        """Counts the tokens of a finished call."""
        self.lengths = layout.lengths
        self.host_lengths = layout.host_lengths
        self.seen += layout.batch_shape[1]

    @classmethod
    def cat(cls, caches: Iterable[AllMemCache]) -> AllMemCache:
        """One cache with the rows of several, whose lengths and phases may differ.

        Raises:
            ValueError: no cache, or caches of different models.
        """
        parts = list(caches)
        if not parts or any(part.lengths is None for part in parts):
            raise ValueError(
                f"{len(parts)} caches, one of them empty or none at all, cannot be joined; join "
                "caches that have seen a token"
            )
        if (
            len({(len(p.layers), p.config.attention_window, p.config.chunk_size) for p in parts})
            > 1
        ):
            raise ValueError("caches of different models cannot be joined; join those of one model")
        joined = cls(parts[0].config)
        for index, layer in enumerate(joined.layers):
            layer.cat([part.layers[index] for part in parts])
        joined.lengths = torch.cat([part.lengths for part in parts if part.lengths is not None])
        joined.host_lengths = tuple(n for part in parts for n in part.host_lengths)
        joined.seen = max(part.seen for part in parts)
        return joined

    def take(self, rows: Sequence[int] | Tensor) -> AllMemCache:
        """A new cache with copies of the given rows, in that order; a row may repeat."""
        taken = AllMemCache(self.config)
        for new, old in zip(taken.layers, self.layers, strict=True):
            new.tensors = old.tensors
        taken.lengths, taken.host_lengths, taken.seen = self.lengths, self.host_lengths, self.seen
        taken.batch_select_indices(torch.as_tensor(rows, dtype=torch.int64))
        return taken

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
        self.host_lengths = ()
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
        self.host_lengths = tuple(self.host_lengths[row] for row in indices.tolist())

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
