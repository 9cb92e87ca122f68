"""What the inputs of ``memory_scan`` must look like, whatever the backend."""

from __future__ import annotations

from torch import Tensor

from kernels.ttt_memory.reference import FastWeights, MemoryState


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, weights: FastWeights,
    state: MemoryState | None, chunk_size: int, clip: float | None,
    decay: float | Tensor | None,
) -> None:  # fmt: skip
    """Refuse inputs whose shapes, dtypes or settings do not fit each other.

    Raises:
        ValueError: with the value, the rule and the mend.
    """
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(
            f"q of shape {list(q.shape)} and {q.dtype} is not [B, T, heads, width] of a float "
            "dtype; reshape it to heads"
        )
    shape = tuple(q.shape)
    heads, width = shape[2:]
    hidden = weights.gate.shape[-2]
    for name, tensor, want in (
        ("k", k, shape),
        ("v", v, shape),
        ("eta", eta, (*shape[:3], 3)),
        ("mu", mu, shape[:3]),
        ("weights.gate", weights.gate, (heads, hidden, width)),
        ("weights.up", weights.up, (heads, hidden, width)),
        ("weights.down", weights.down, (heads, width, hidden)),
    ):
        if tuple(tensor.shape) != want:
            raise ValueError(
                f"{name} of shape {list(tensor.shape)} does not fit q of shape {list(shape)}; "
                f"give it {list(want)}"
            )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is below 1; set it to at least one token")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} is not above 0; give a bound, or None for no clipping")
    if isinstance(decay, Tensor):
        if tuple(decay.shape) not in ((), (heads,)):
            raise ValueError(
                f"decay of shape {list(decay.shape)} does not fit {heads} heads; give it [{heads}]"
            )
    elif decay is not None and not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} is no share of the weights; set it from 0 to 1, or None")
    if state is not None and state.weights.gate.shape[1:] != weights.gate.shape:
        raise ValueError(
            f"state with gate matrices {list(state.weights.gate.shape[1:])} does not fit weights "
            f"{list(weights.gate.shape)}; go on with the weights the state was made with"
        )
