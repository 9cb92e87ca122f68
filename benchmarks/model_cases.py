"""Models of the benchmark with random weights: how they read a text, and write on.

B sequences, T tokens, V vocabulary. The four mixers run through `allmem_hf`; full attention has a
cache of its own here, whose keys and values are allocated once, so that what `allmem` is compared
with neither copies its cache nor looks for space.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from allmem_hf import AllMemCache, AllMemConfig, AllMemForCausalLM
from allmem_hf.layers_allmem import rotate
from benchmarks.measure import Stopwatch, relative_error
from benchmarks.shapes import Shape
from pipeline.decode_graph import GraphedDecoder

MIXERS = ("allmem", "full", "swa", "mamba2")
_CHECK_STEPS = 5


def build(
    shape: Shape, mixer: str, device: torch.device, dtype: torch.dtype, *, window: int | None = None
) -> AllMemForCausalLM:
    """A model with random weights, made on the device.

    Args:
        shape: sizes.
        mixer: one of `MIXERS`; `full` and `swa` have no branch.
        device: where.
        dtype: of all weights.
        window: W in the place of the shape's.
    """
    config = AllMemConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=1 << 21,
        branch=mixer if mixer in ("allmem", "mamba2") else "none",
        memory_size=shape.memory_size,
        num_memory_heads=shape.memory_heads,
        expansion=shape.expansion,
        eta_init=8 / shape.chunk_size,
        chunk_size=shape.chunk_size,
        window_size=window or shape.window_size,
        num_sinks=shape.num_sinks,
    )
    torch.manual_seed(0)
    with device, _default_dtype(dtype):
        model = AllMemForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("memory.alpha"):
                    parameter.normal_(std=0.3)
    return model.requires_grad_(False)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class ConstantReader:
    """A model of constant state: `swa`, `mamba2`, `allmem`.

    Args:
        model: of `build`.
        piece: tokens that are read at once.
    """

    def __init__(self, model: AllMemForCausalLM, piece: int) -> None:
        self.model, self.piece = model, piece
        self.start(1, 0)

    def start(self, rows: int, capacity: int) -> None:
        """Forgets; neither number matters to a state that does not grow."""
        del rows, capacity
        self.cache = AllMemCache(self.model.config)
        self._decoder: GraphedDecoder | None = None

    def record(self, *, compiled: bool) -> None:
        """From here on steps of one token are a CUDA graph. Raises: ValueError, as its decoder."""
        self._decoder = GraphedDecoder(self.model, self.cache, compiled=compiled)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Reads `[B, T]`; logits `[B, V]` of the last token."""
        if self._decoder is not None:
            return self._decoder(tokens)
        out = None
        for part in tokens.split(self.piece, 1):
            out = self.model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        assert out is not None
        logits: Tensor = out.logits[:, -1]
        return logits

    def repeat(self, rows: int) -> None:
        """The one row's state, `rows` times."""
        self._decoder = None
        self.cache.batch_repeat_interleave(rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the state of all rows."""
        return self.cache.num_bytes


class FullReader:
    """The same base weights with full attention and keys and values allocated beforehand.

    Args:
        model: of `build` with mixer `full`.
        backend: of PyTorch's attention over many tokens; None: PyTorch's own choice.
    """

    def __init__(self, model: AllMemForCausalLM, backend: SDPBackend | None = None) -> None:
        self.model, self.backend = model, backend
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def bytes_for(self, rows: int, capacity: int) -> int:
        """Bytes of keys and values."""
        config = self.model.config
        each = rows * capacity * config.kv_heads * config.head_width * self.model.dtype.itemsize
        return 2 * config.num_hidden_layers * each

    def start(self, rows: int, capacity: int) -> None:
        """Room for `capacity` tokens of `rows` rows."""
        config = self.model.config
        self.length, self.keys, self.values = 0, [], []
        like = self.model.lm_head.weight
        size = (rows, config.kv_heads, capacity, config.head_width)
        self.keys = [like.new_empty(size) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_empty(size) for _ in range(config.num_hidden_layers)]

    def fill(self, tokens: int) -> None:
        """Random keys and values, as if `tokens` had been read: their numbers change no time."""
        for held in (*self.keys, *self.values):
            for row in held:
                row[:, :tokens].normal_()
        self.length = tokens

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Reads `[B, T]` at once; logits `[B, V]` of the last token.

        Raises:
            ValueError: several tokens after others; only one at a time goes on.
        """
        num = tokens.shape[1]
        if self.length and num > 1:
            raise ValueError(f"{num} tokens after {self.length} others; feed them one by one")
        inner = self.model.model
        hidden = inner.embed_tokens(tokens)
        positions = torch.arange(self.length, self.length + num, device=tokens.device)
        cos_sin = inner.rotary_emb(positions[None], hidden.dtype)
        for index, layer in enumerate(inner.layers):
            mixed = self._attend(layer.self_attn, layer.input_layernorm(hidden), cos_sin, index)
            hidden = hidden + mixed
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.length += num
        logits: Tensor = self.model.lm_head(inner.norm(hidden[:, -1]))
        return logits

    def _attend(self, layer: Any, x: Tensor, cos_sin: tuple[Tensor, Tensor], index: int) -> Tensor:
        heads = (*x.shape[:2], -1, layer.head_dim)
        q = rotate(layer.q_norm(layer.q_proj(x).view(heads)), *cos_sin).transpose(1, 2)
        k = rotate(layer.k_norm(layer.k_proj(x).view(heads)), *cos_sin).transpose(1, 2)
        v = layer.v_proj(x).view(heads).transpose(1, 2)
        end = self.length + x.shape[1]
        self.keys[index][:, :, self.length : end] = k
        self.values[index][:, :, self.length : end] = v
        if self.length == 0:
            return layer.o_proj(full_prefill(q, k, v, self.backend).transpose(1, 2).flatten(2))
        # the query heads of a group as queries of their key-value head: keys are read once
        grouped = q[:, :, 0].unflatten(1, (k.shape[1], -1))  # [B, n_kv, n_q / n_kv, h]
        held = (self.keys[index][:, :, :end], self.values[index][:, :, :end])
        out = F.scaled_dot_product_attention(grouped, *held)
        return layer.o_proj(out.flatten(1, 2).flatten(1)[:, None])

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are in use."""
        held = (*self.keys, *self.values)
        return sum(x[:, :, : self.length].numel() * x.element_size() for x in held)


def full_prefill(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
    """Causal attention `[B, heads, T, h]`; cuDNN gets key-value heads repeated."""
    if backend is SDPBackend.CUDNN_ATTENTION:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


def fastest_backend(shape: Shape, watch: Stopwatch, dtype: torch.dtype) -> SDPBackend | None:
    """Which of PyTorch's attention kernels is fastest at 16,384 tokens here; None on a CPU."""
    if watch.device.type != "cuda":
        return None
    sizes = [(1, n, 16384, shape.head_dim) for n in (shape.num_heads, *[shape.num_kv_heads] * 2)]
    q, k, v = (torch.randn(size, device=watch.device, dtype=dtype) for size in sizes)
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        call = _call(q, k, v, backend)
        try:
            call()
        except RuntimeError as error:
            print(f"{backend}: {str(error).splitlines()[0]}")
            continue
        found[backend] = watch.interleaved({"it": call}, budget_s=0.2)["it"].seconds
    return min(found, key=lambda backend: found[backend]) if found else None


def _call(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Any:
    return lambda: full_prefill(q, k, v, backend)


Reader = ConstantReader | FullReader


def make_reader(
    model: AllMemForCausalLM, mixer: str, piece: int, backend: SDPBackend | None
) -> Reader:
    """What reads and writes on with this model."""
    return FullReader(model, backend) if mixer == "full" else ConstantReader(model, piece)


def check_error(
    shape: Shape,
    mixer: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    times: float = 1.0,
    graph: bool = False,
    compiled: bool = False,
) -> float:
    """Error of two layers of this shape on the device, against plain PyTorch in higher precision.

    A text of several windows and chunks is read in odd pieces and continued token by token; the
    logits are compared with those of one call over the whole text without a cache, on the CPU in
    float32 (float64 for float32 models), with the same weights. `times` makes the logits
    wrong, for tests; `graph` continues by a CUDA graph, of a step that is
    `compiled` or not.
    """
    window = min(shape.window_size, 512)
    small = replace(
        shape,
        num_layers=min(shape.num_layers, 2),
        vocab_size=min(shape.vocab_size, 512),
        window_size=window,
        chunk_size=min(shape.chunk_size, window // 2),
        num_sinks=min(shape.num_sinks, window // 8),
    )
    tokens = 2 * window + small.chunk_size // 2 + 7
    model = build(small, mixer, device, dtype)
    exact_dtype = torch.float64 if dtype == torch.float32 else torch.float32
    exact = build(
        small, mixer, torch.device("cpu"), exact_dtype, window=tokens if mixer == "full" else None
    )
    exact.load_state_dict({name: x.to(exact_dtype) for name, x in model.state_dict().items()})
    ids = torch.randint(0, small.vocab_size, (2, tokens))
    with torch.no_grad():
        wanted = exact(ids, use_cache=False).logits[:, -_CHECK_STEPS - 1 :]
    reader = make_reader(model, mixer, window - window // 5, None)
    reader.start(2, tokens)
    there = ids.to(device)
    logits = [reader.feed(there[:, :-_CHECK_STEPS])]
    if graph and isinstance(reader, ConstantReader):
        reader.record(compiled=compiled)
    for at in range(tokens - _CHECK_STEPS, tokens):
        logits.append(reader.feed(there[:, at : at + 1]).clone())
    return relative_error(times * torch.stack(logits, 1).cpu(), wanted)
