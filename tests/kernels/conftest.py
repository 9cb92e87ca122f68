"""What the kernel tests compare with: loops over tokens in float64, written from the equations.

They share no code with `kernels`: sums are explicit, and the derivatives of the inner loss (7) come
from automatic differentiation, not from the formulas (10).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def _network(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Equation (6) for one token x [d_h] and one head."""
    hidden = gate @ x
    return down @ (hidden * torch.sigmoid(hidden) * (up @ x)) + x


def _unit_rows(matrix: Tensor, initial: Tensor) -> Tensor:
    """Equation (9), row by row."""
    rows = [
        row * (start.norm() / (row.norm() + 1e-5))
        for row, start in zip(matrix, initial, strict=True)
    ]
    return torch.stack(rows)


def loop_head(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, initial: list[Tensor],
    chunk_size: int, clip: float | None, decay: float, create_graph: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Equations (8) to (11) for one head of one document, token by token: out, W, M."""
    matrices = list(initial)
    momenta = [torch.zeros_like(matrix) for matrix in initial]
    out = []
    for begin in range(0, len(q), chunk_size):
        tokens = range(begin, min(begin + chunk_size, len(q)))
        out.extend(_network(q[t], *matrices) for t in tokens)
        if len(tokens) < chunk_size:
            break
        bases = [_unit_rows(w, w0) for w, w0 in zip(matrices, initial, strict=True)]
        if not create_graph:
            bases = [base.detach().requires_grad_() for base in bases]
        elif not bases[0].requires_grad:
            bases = [base.requires_grad_() for base in bases]
        steps = [torch.zeros_like(base) for base in bases]
        for t in tokens:
            loss = -(_network(k[t], *bases) * v[t]).sum()
            grads = torch.autograd.grad(loss, bases, create_graph=create_graph)
            for i, grad in enumerate(grads):
                steps[i] = steps[i] - eta[t, i] * grad
        if clip is not None:
            steps = [s * min(1.0, clip / s.norm()) if s.norm() > 0 else s for s in steps]
        real = [t for t in tokens if (eta[t] != 0).any()]
        mean = sum((mu[t] for t in real), torch.zeros((), dtype=mu.dtype)) / max(1, len(real))
        momenta = [mean * m + s for m, s in zip(momenta, steps, strict=True)]
        matrices = [(1 - decay) * b + m for b, m in zip(bases, momenta, strict=True)]
        if not create_graph:
            matrices = [matrix.detach() for matrix in matrices]
            momenta = [momentum.detach() for momentum in momenta]
    return torch.stack(out), matrices, momenta


def loop_row(
    inputs: list[Tensor], weights: Any, chunk_size: int,
    clip: float | None = None, decay: float = 0.0, create_graph: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """One document, q, k, v [T, n, d_h], eta [T, n, 3], mu [T, n]: out [T, n, d_h] and W, M."""
    heads = [
        loop_head(
            *(x[:, head] for x in inputs), [w[head] for w in weights],
            chunk_size, clip, decay, create_graph,
        )
        for head in range(inputs[0].shape[1])
    ]  # fmt: skip
    out = torch.stack([head[0] for head in heads], 1)
    matrices = [torch.stack([head[1][i] for head in heads]) for i in range(3)]
    momenta = [torch.stack([head[2][i] for head in heads]) for i in range(3)]
    return out, matrices, momenta


def random_inputs(
    rows: int, tokens: int, heads: int, width: int, hidden: int, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Unit queries and keys, values, rates that matter, coefficients, and weights as they start."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(rows, tokens, heads, width) for _ in range(3))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    eta = torch.rand(rows, tokens, heads, 3, generator=generator, dtype=torch.float64) * 0.4
    mu = torch.rand(rows, tokens, heads, generator=generator, dtype=torch.float64)
    gate, up = (normal(heads, hidden, width) / width**0.5 for _ in range(2))
    down = normal(heads, width, hidden) / hidden**0.5
    weights = tuple(w.to(dtype) for w in (gate, up, down))
    return [x.to(dtype) for x in (q, k, v, eta, mu)], weights  # type: ignore[return-value]


@pytest.fixture(scope="session")
def memory_loop() -> Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]]:
    return loop_row


@pytest.fixture(scope="session")
def memory_inputs() -> Callable[..., tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    return random_inputs


@pytest.fixture(scope="session")
def close() -> Callable[[Any, Any], None]:
    """Equal to rounding, with the tolerance of the dtype; all tests take it from here."""
    tolerances = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 3e-2}

    def check(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
        bound = tolerances[dtype or actual.dtype]
        torch.testing.assert_close(
            actual.double(), expected.double(), atol=bound, rtol=bound, equal_nan=False
        )

    return check


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
