"""A decode step of a whole layer by fused kernels: thirteen launches (eleven without memory).

R rows (one new token each), D model width, n_q and n_kv heads of width h, n memory heads of width
d_h, d = n d_h.

The plain path of `modeling_allmem` is the reference; this one computes the same function where
`fits` says so. The projections of attention and memory are one product: their weights become parts
of one tensor, so nothing is held twice and a change of a parameter in place is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allmem_hf.cache_allmem import AllMemLayerCache
from allmem_hf.layout_allmem import RowLayout
from kernels.ttt_memory import backend_of

_ALIGNED = 64  # outputs of the joined projection are padded to a multiple of this


def set_decode_backend(model: nn.Module, backend: str) -> None:
    """What makes the decode steps of a model: `auto`, `reference` or `triton`.

    `auto`, the default, takes the fused kernels on a CUDA device.

    Raises:
        ValueError: an unknown backend, or one that cannot run on the model's device.
    """
    backend_of(backend, next(model.parameters()))
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "decode_backend")]
    for layer in layers:
        layer.decode_backend = backend


def fused_steps(model: nn.Module, probe: Tensor) -> bool:
    """Whether decode steps of the model on tensors like `probe` are made by fused kernels."""
    layer = next(module for module in model.modules() if hasattr(module, "decode_backend"))
    return _has_kernels(layer) and backend_of(str(layer.decode_backend), probe) == "triton"


def _has_kernels(layer: Any) -> bool:
    config = layer.self_attn.config
    others = config.full_attention or config.branch == "mamba2"
    return not others and not (layer.use_memory and config.write_off)


def fits(layer: Any, hidden: Tensor, layout: RowLayout, cache: AllMemLayerCache) -> bool:
    """Whether this call of an `AllMemDecoderLayer` is a decode step that has fused kernels.

    The others run as they are: prefill, gradients, full attention, Mamba-2, the control that
    writes nothing, layers whose projections were replaced (quantised, adapted) or are parts of a
    trainer's buffer, torch.compile.
    """
    if not layout.is_step or layer.decode_backend == "reference":
        return False
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _has_kernels(layer):
        return False
    if backend_of(layer.decode_backend, hidden) == "reference" or "keys" not in cache.tensors:
        return False
    if layer.use_memory and "weights_gate" not in cache.tensors:
        return False
    plain = all(
        type(proj) is nn.Linear
        and proj.weight.dtype == hidden.dtype
        and proj.weight.device == hidden.device
        for proj in _projections(layer)
    )
    return plain and _joined(layer) is not None


def fused_step(
    layer: Any, hidden: Tensor, cos_sin: tuple[Tensor, Tensor], layout: RowLayout,
    cache: AllMemLayerCache,
) -> Tensor:  # fmt: skip
    """A layer's decode step, `[R, 1, D]` -> `[R, 1, D]`; the cache moves on in place."""
    from kernels.swa.decode import window_step
    from kernels.ttt_memory.triton_backend.decode import memory_step, sum_norm, swiglu

    attention, config, rows = layer.self_attn, layer.self_attn.config, hidden.shape[0]
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    joined = _joined(layer)
    assert joined is not None  # by `fits`
    stream, normed = sum_norm(hidden[:, 0], before.weight, before.eps)
    projected = F.linear(normed, joined.weight)
    cache.reserve(cache.tensors["keys"], layout)
    norms, eps = None, (0.0, 0.0)
    if config.qk_norm:
        norms = (attention.q_norm.weight, attention.k_norm.weight)
        eps = (attention.q_norm.eps, attention.k_norm.eps)
    num_slots = min(cache.tensors["keys"].shape[1], max(layout.host_lengths))
    attended = window_step(
        projected,
        joined.bias,
        norms,
        cos_sin[0].reshape(rows, -1),
        cos_sin[1].reshape(rows, -1),
        layout.past,
        cache.tensors["keys"],
        cache.tensors["values"],
        num_heads=config.num_attention_heads,
        num_slots=num_slots,
        window_size=config.window_size,
        num_sinks=config.num_sinks,
        eps=eps,
    )
    attended = attention.o_proj(attended)
    remembered = alpha = None
    if layer.use_memory:
        memory = layer.memory
        read = memory_step(
            projected,
            joined.bias,
            layout.past,
            cache.tensors,
            (memory.q_conv.weight, memory.k_conv.weight, memory.v_conv.weight),
            (memory.q_norm.weight, memory.k_norm.weight, memory.o_norm.weight),
            first=joined.starts[3],
            rates=joined.starts[6],
            qk_eps=memory.q_norm.eps,
            out_eps=memory.o_norm.eps,
        )
        remembered, alpha = memory.o_proj(read), memory.alpha
    stream, normed = sum_norm(stream, after.weight, after.eps, attended, remembered, alpha)
    mlp = layer.mlp
    mixed = mlp.down_proj(swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))
    return (stream + mixed)[:, None]


@dataclass(frozen=True)
class _Joined:
    """All projections of a layer's input: of attention q, k, v, of the memory q, k, v, gate, eta,
    mu.

    Attributes:
        weight: `[N, D]`, zero rows at the end.
        bias: `[N]`, zero for projections without one.
        starts: first output of each projection, and the end of the last.
    """

    weight: Tensor
    bias: Tensor
    starts: tuple[int, ...]

    def holds(self, projections: list[nn.Linear]) -> bool:
        """Whether the projections' parameters are still parts of these tensors."""
        if len(projections) >= len(self.starts):
            return False
        size, item, width = self.weight.data_ptr(), self.weight.element_size(), self.weight.shape[1]
        for proj, start in zip(projections, self.starts, strict=False):
            if proj.weight.data_ptr() != size + start * width * item:
                return False
            if (
                proj.bias is not None
                and proj.bias.data_ptr() != self.bias.data_ptr() + start * item
            ):
                return False
        return True


_SHARED: WeakValueDictionary[int, _Joined] = WeakValueDictionary()
"""By the address of their weights' storage."""


def _projections(layer: Any) -> list[nn.Linear]:
    attention = layer.self_attn
    found = [attention.q_proj, attention.k_proj, attention.v_proj]
    if layer.use_memory:
        memory = layer.memory
        found += [memory.q_proj, memory.k_proj, memory.v_proj]
        found += [memory.gate_proj, memory.eta_proj, memory.mu_proj]
    return found


def _joined(layer: Any) -> _Joined | None:
    """The layer's projections as one: made at the first step, and again when they were replaced.

    Models that share their parameters share it too. None where parameters are parts of a tensor
    of someone else's, who would change that tensor and not the parameters (DeepSpeed).
    """
    projections = _projections(layer)
    held: _Joined | None = getattr(layer, "_joined_projections", None)
    if held is not None and held.holds(projections):
        return held
    held = _SHARED.get(projections[0].weight.untyped_storage().data_ptr())
    if held is None or not held.holds(projections):
        storages = [proj.weight.untyped_storage() for proj in projections]
        for proj, storage in zip(projections, storages, strict=True):
            if storage.nbytes() != proj.weight.nbytes and storage.data_ptr() not in _SHARED:
                return None
        with torch.inference_mode(False), torch.no_grad():
            held = _join(projections)
        _SHARED[held.weight.untyped_storage().data_ptr()] = held
    layer._joined_projections = held
    return held


def _join(projections: list[nn.Linear]) -> _Joined:
    starts = [0]
    for proj in projections:
        starts.append(starts[-1] + proj.out_features)
    like = projections[0].weight
    total = -(-starts[-1] // _ALIGNED) * _ALIGNED
    weight, bias = like.new_zeros(total, like.shape[1]), like.new_zeros(total)
    for proj, (start, stop) in zip(projections, pairwise(starts), strict=True):
        weight[start:stop] = proj.weight
        proj.weight.data = weight[start:stop]
        if proj.bias is not None:
            bias[start:stop] = proj.bias
            proj.bias.data = bias[start:stop]
    return _Joined(weight, bias, tuple(starts))


__all__ = ["fits", "fused_step", "fused_steps", "set_decode_backend"]
