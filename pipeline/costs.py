"""What token mixers cost: FLOPs a token, and bytes of decode state (spec section 6).

Symbols of the specification: D model width, n_q, n_kv, h base heads and their width, n, d, d_h, f
memory heads, memory width, memory head width and hidden width, W window, s sinks, c chunk.
A multiply-add is two FLOPs. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

FLOAT32_BYTES = 4


class BaseShape(Protocol):
    """The fields of `allmem_megatron.config.BaseModelConfig` that costs depend on."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """Sizes of one layer's token mixer; defaults are the paper's memory."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    memory_size: int = 512
    """d."""
    memory_heads: int = 8
    """n."""
    expansion: int = 2
    """f / d_h."""
    conv_kernel: int = 4
    state_size: int | None = None
    """`mamba2`: columns of a head's state; default d_h."""
    window_size: int
    num_sinks: int
    chunk_size: int

    @property
    def memory_head_dim(self) -> int:
        """d_h."""
        return self.memory_size // self.memory_heads

    @property
    def key_size(self) -> int:
        """n N: width of the `mamba2` B and C projections (its keys and queries)."""
        return self.memory_heads * (self.state_size or self.memory_head_dim)

    @property
    def recurrent_state_elements(self) -> int:
        """n d_h N: elements of the `mamba2` state of a layer."""
        return self.key_size * self.memory_head_dim

    @property
    def fast_weight_elements(self) -> int:
        """3 n d_h f: elements of the three fast matrices of all heads of a layer."""
        return 3 * self.memory_heads * self.memory_head_dim**2 * self.expansion

    @classmethod
    def of(
        cls,
        base: BaseShape,
        *,
        window_size: int,
        num_sinks: int,
        chunk_size: int,
        memory_size: int = 512,
        memory_heads: int | None = None,
        expansion: int = 2,
        conv_kernel: int = 4,
        state_size: int | None = None,
    ) -> MixerShape:
        """The shape for a base model; memory heads default to its key-value heads."""
        return cls(
            hidden_size=base.hidden_size,
            num_layers=base.num_layers,
            num_heads=base.num_heads,
            num_kv_heads=base.num_kv_heads,
            head_dim=base.head_dim,
            memory_size=memory_size,
            memory_heads=memory_heads or base.num_kv_heads,
            expansion=expansion,
            conv_kernel=conv_kernel,
            state_size=state_size,
            window_size=window_size,
            num_sinks=num_sinks,
            chunk_size=chunk_size,
        )


def flops_per_token(mixer: str, shape: MixerShape, length: int) -> float:
    """FLOPs of one layer's token mixer, a token, averaged over a prefill of `length` tokens.

    `allmem` is the formula of spec section 6, `4 D h (n_q + n_kv) + 4 n_q h (W + s)
    + 2 D (4 d + 5 n + 1) + 18 n d_h f`, where 5 n + 1 = 41 for n = 8 (three learning rates,
    momentum and gate for each head, and alpha); its last term is read 6, write 12. `full` attends
    to `length / 2` keys on average. A window never sees more keys than full attention does.
    `mamba2` reads and writes a d_h x N state for each head (6 n d_h N).

    Raises:
        ValueError: an unknown mixer.
    """
    _check_mixer(mixer)
    projections = 4 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    keys = length / 2
    if mixer != "full":
        keys = min(keys, shape.window_size + shape.num_sinks)
    flops = projections + 4 * shape.num_heads * shape.head_dim * keys
    heads, width = shape.memory_heads, shape.memory_size
    if mixer == "allmem":
        flops += 2 * shape.hidden_size * (4 * width + 5 * heads + 1)
        flops += 6 * shape.fast_weight_elements
    if mixer == "mamba2":
        flops += 2 * shape.hidden_size * (2 * width + 2 * shape.key_size + 2 * heads + 1)
        flops += 6 * shape.recurrent_state_elements
    return flops


def flops_ratio(mixer: str, shape: MixerShape, length: int) -> float:
    """A mixer's FLOPs a token over those of causal full attention, in a prefill of `length`."""
    return flops_per_token(mixer, shape, length) / flops_per_token("full", shape, length)


def key_value_bytes(shape: MixerShape, num_tokens: int, element_bytes: int = 2) -> int:
    """Bytes of one layer's keys and values of `num_tokens` positions of one sequence."""
    return 2 * shape.num_kv_heads * shape.head_dim * num_tokens * element_bytes


def fast_weight_bytes(shape: MixerShape) -> int:
    """Bytes of W and M of one layer and sequence, float32."""
    return 2 * shape.fast_weight_elements * FLOAT32_BYTES


def pending_bytes(shape: MixerShape, num_tokens: int, element_bytes: int = 2) -> int:
    """Bytes of k, v, eta and mu of `num_tokens` tokens of an unfinished chunk, of one layer."""
    elements = 2 * shape.memory_size + 3 * shape.memory_heads + shape.memory_heads
    return elements * num_tokens * element_bytes


def convolution_tail_bytes(mixer: str, shape: MixerShape, element_bytes: int = 2) -> int:
    """Bytes of the last `conv_kernel - 1` projected q, k and v of one layer and sequence."""
    key_size = shape.key_size if mixer == "mamba2" else shape.memory_size
    return (2 * key_size + shape.memory_size) * (shape.conv_kernel - 1) * element_bytes


def cache_bytes(
    mixer: str, shape: MixerShape, length: int, *, element_bytes: int = 2, layers: bool = True
) -> int:
    """Largest decode state of one sequence of `length` tokens, in bytes.

    `full` keeps every key and value; the others keep the window's ring and the sinks; `allmem`
    also keeps W and M in float32, at most one chunk of pending inputs and the convolution tail;
    `mamba2` an n x d_h x N float32 state and the convolution tail.

    Args:
        mixer: `full`, `swa`, `mamba2` or `allmem`.
        shape: sizes of the layer.
        length: tokens of the sequence.
        element_bytes: bytes of a cached key, value or pending element; 2 for bfloat16.
        layers: whether to count all layers, or one.

    Raises:
        ValueError: an unknown mixer.
    """
    _check_mixer(mixer)
    visible = length if mixer == "full" else min(length, shape.window_size + shape.num_sinks)
    total = key_value_bytes(shape, visible, element_bytes)
    if mixer == "allmem":
        total += fast_weight_bytes(shape)
        total += pending_bytes(shape, min(length, shape.chunk_size), element_bytes)
        total += convolution_tail_bytes(mixer, shape, element_bytes)
    if mixer == "mamba2":
        total += shape.recurrent_state_elements * FLOAT32_BYTES
        total += convolution_tail_bytes(mixer, shape, element_bytes)
    return total * (shape.num_layers if layers else 1)


def _check_mixer(mixer: str) -> None:
    known = ("full", "swa", "mamba2", "allmem")
    if mixer not in known:
        raise ValueError(f"mixer={mixer!r} has no cost formula; use one of {', '.join(known)}")
