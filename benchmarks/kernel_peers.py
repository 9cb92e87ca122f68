"""What the memory is compared with: a plain large-chunk update, and a gated delta rule.

Shape letters: B sequences, T tokens, H heads, K head width, F hidden width, C chunk length.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Leaves


def large_chunk_update(
    leaves: Leaves, chunk_size: int, products: torch.dtype | None = None
) -> Tensor:
    """Large-chunk test-time training (LaCT, arXiv 2505.23884), its plain variant, from the formula.

    f_W(x) = D (SiLU(G x) * U x). A chunk is applied, then written by one gradient step on
    -sum_t <f_W(k_t), eta_t v_t>, after which every row has the norm that it began with. Plain:
    gradient descent without momentum and without Muon. The gradients are written out.

    Args:
        leaves: q, k, v `[B, T, H, K]`, eta `[B, T, H, 3]`, gate, up `[H, F, K]`, down `[H, K, F]`.
        chunk_size: C.
        products: dtype of the matrix products' inputs; None: that of the weights.
    """
    weights = [leaves[name] for name in ("gate", "up", "down")]
    norms = [torch.linalg.vector_norm(w, dim=-1, keepdim=True) for w in weights]
    cast = products or weights[0].dtype
    streams = (leaves[name].transpose(1, 2) for name in ("q", "k", "v", "eta"))
    chunks = list(zip(*(x.split(chunk_size, 2) for x in streams), strict=True))
    out = []
    for number, (q, k, v, eta) in enumerate(chunks):
        gate, up, down = (w.to(cast) for w in weights)
        q, k, v = q.to(cast), k.to(cast), v.to(cast)
        out.append((F.silu(q @ gate.mT) * (q @ up.mT)) @ down.mT)
        if number == len(chunks) - 1:
            break
        rates = eta.to(cast).unsqueeze(-1).unbind(-2)  # three of [B, H, C, 1]
        h_gate, h_up, p = k @ gate.mT, k @ up.mT, v @ down
        sigmoid = torch.sigmoid(h_gate)
        silu = h_gate * sigmoid
        slope = sigmoid + silu * (1 - sigmoid)
        steps = (
            (p * h_up * slope).mT @ (k * rates[0]),
            (p * silu).mT @ (k * rates[1]),
            (v * rates[2]).mT @ (silu * h_up),
        )
        moved = [w + step.to(w.dtype) for w, step in zip(weights, steps, strict=True)]
        weights = [
            n * w / (torch.linalg.vector_norm(w, dim=-1, keepdim=True) + 1e-5)
            for w, n in zip(moved, norms, strict=True)
        ]
    return torch.cat(out, 2).transpose(1, 2)


def large_chunk_update_by_autograd(leaves: Leaves, chunk_size: int) -> Tensor:
    """The same function; each step is what automatic differentiation of the loss gives."""
    start = {name: leaves[name] for name in ("gate", "up", "down")}
    wanted = torch.is_grad_enabled()
    weights = {name: w.expand(leaves["q"].shape[0], *w.shape) for name, w in start.items()}
    out = []

    def apply(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        hidden = F.silu(torch.einsum("bchk,bhfk->bchf", x, w["gate"]))
        hidden = hidden * torch.einsum("bchk,bhfk->bchf", x, w["up"])
        return torch.einsum("bchf,bhkf->bchk", hidden, w["down"])

    for first in range(0, leaves["q"].shape[1], chunk_size):
        q, k, v, eta = (leaves[x][:, first : first + chunk_size] for x in ("q", "k", "v", "eta"))
        out.append(apply(q, weights))
        with torch.enable_grad():
            own = {
                n: w if w.requires_grad else w.detach().requires_grad_() for n, w in weights.items()
            }
            moved = {}
            for place, name in enumerate(own):
                # each matrix has its own rates
                gain = (apply(k, own) * v * eta[..., place, None]).sum()
                (step,) = torch.autograd.grad(gain, own[name], create_graph=wanted)
                moved[name] = own[name] + step
        weights = {
            name: torch.linalg.vector_norm(start[name], dim=-1, keepdim=True)
            * w
            / (torch.linalg.vector_norm(w, dim=-1, keepdim=True) + 1e-5)
            for name, w in moved.items()
        }
        if not wanted:
            weights = {name: w.detach() for name, w in weights.items()}
    return torch.cat(out, 1)


def gated_delta_rule(leaves: Leaves) -> Tensor:
    """Token by token: S <- a S; S <- S + b (v - S k) k^T; o = S q / sqrt(K) (arXiv 2412.06464).

    Args:
        leaves: q, k (of length 1), v `[B, T, H, K]`; g = log a and beta = b `[B, T, H]`.
    """
    q, k, v, decay, beta = (leaves[name] for name in ("q", "k", "v", "g", "beta"))
    state = q.new_zeros(q.shape[0], q.shape[2], v.shape[3], k.shape[3])
    out = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        missing = v[:, t] - (state @ k[:, t, ..., None])[..., 0]
        state = state + (beta[:, t, :, None] * missing)[..., None] * k[:, t, ..., None, :]
        out.append((state @ q[:, t, ..., None])[..., 0] * q.shape[3] ** -0.5)
    return torch.stack(out, 1)


def fla_missing(device: torch.device) -> str:
    """Why flash-linear-attention cannot be measured here; empty where it can."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install flash-linear-attention)"
    return "" if device.type == "cuda" else "flash-linear-attention needs a CUDA device"


def fla_gated_delta_rule(leaves: Leaves) -> Tensor:
    """The same by flash-linear-attention's chunked kernels."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    names = ("q", "k", "v", "g", "beta")
    out: Tensor = chunk_gated_delta_rule(*(leaves[name] for name in names))[0]
    return out


def flash_attn_missing(device: torch.device) -> str:
    """Why the flash-attn package cannot be measured here; empty where it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    return "" if device.type == "cuda" else "flash_attn needs a CUDA device"


def flash_attn_full(leaves: Leaves) -> Tensor:
    """Causal attention by the flash-attn package."""
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(leaves["q"], leaves["k"], leaves["v"], causal=True)
    return out
