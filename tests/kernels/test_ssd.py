"""The chunked SSD recurrence against the recurrence itself, token by token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ssd import ssd_scan

Fixture = Any


def inputs(tokens: int, rows: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(rows, tokens, 2))
    b, c = normal(rows, tokens, 2, 3), normal(rows, tokens, 2, 3)
    return [normal(rows, tokens, 2, 4), dt, normal(2) * 0.5, b, c]


def loop(
    x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """One document [T, n, ...]: the recurrence as it is written, h [n, d_h, N]."""
    y = []
    for t in range(len(x)):
        decay = torch.exp(-torch.exp(a_log) * dt[t])
        added = torch.einsum("h,hd,hn->hdn", dt[t], x[t], b[t])
        h = decay[:, None, None] * h + added
        y.append(torch.einsum("hdn,hn->hd", h, c[t]))
    return torch.stack(y), h


@pytest.mark.parametrize(("tokens", "chunk"), [(63, 8), (63, 64), (40, 8), (1, 4), (9, 1)])
def test_chunks_match_the_recurrence(tokens: int, chunk: int, close: Fixture) -> None:
    x, dt, a_log, b, c = inputs(tokens)
    start = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    y, state = ssd_scan(x, dt, a_log, b, c, chunk_size=chunk, state=start)
    for row in range(2):
        want, h = loop(x[row], dt[row], a_log, b[row], c[row], start[row])
        close(y[row], want)
        close(state[row], h)


def test_gradients_match_the_recurrence(close: Fixture) -> None:
    leaves = [x.requires_grad_() for x in inputs(21, rows=1)]
    x, dt, a_log, b, c = leaves
    y, state = ssd_scan(*leaves, chunk_size=5)
    want, h = loop(x[0], dt[0], a_log, b[0], c[0], torch.zeros(2, 4, 3, dtype=torch.float64))
    mix = torch.randn_like(want)
    expected = torch.autograd.grad((want * mix).sum() + h.square().sum(), leaves)
    got = torch.autograd.grad((y[0] * mix).sum() + state.square().sum(), leaves)
    for grad, target in zip(got, expected, strict=True):
        close(grad, target)


@pytest.mark.parametrize("bounds", [[0, 1, 20, 20, 50], [0, 25, 50], [0, 50]])
def test_packed_documents_go_their_own_ways(bounds: list[int], close: Fixture) -> None:
    x, dt, a_log, b, c = inputs(50, rows=1)
    start = torch.randn(len(bounds) - 1, 2, 4, 3, dtype=torch.float64)
    cu = torch.tensor(bounds)
    y, state = ssd_scan(x, dt, a_log, b, c, chunk_size=8, state=start, cu_seqlens=cu)
    for row, (i, j) in enumerate(pairwise(bounds)):
        if i < j:
            want, h = loop(x[0, i:j], dt[0, i:j], a_log, b[0, i:j], c[0, i:j], start[row])
            close(y[0, i:j], want)
            close(state[row], h)
        else:
            assert torch.equal(state[row], start[row])


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 29])
def test_split_calls_equal_one_call(cut: int, close: Fixture) -> None:
    x, dt, a_log, b, c = inputs(30)
    want, want_state = ssd_scan(x, dt, a_log, b, c, chunk_size=8)
    first, state = ssd_scan(
        *(z[:, :cut] for z in (x, dt)), a_log, b[:, :cut], c[:, :cut], chunk_size=8
    )
    second, state = ssd_scan(
        x[:, cut:], dt[:, cut:], a_log, b[:, cut:], c[:, cut:], chunk_size=8, state=state
    )
    close(torch.cat([first, second], 1), want)
    close(state, want_state)


def test_padding_with_no_step_changes_nothing(close: Fixture) -> None:
    x, dt, a_log, b, c = inputs(20)
    dt[:, 12:] = 0
    _, state = ssd_scan(x, dt, a_log, b, c, chunk_size=8)
    _, short = ssd_scan(*(z[:, :12] for z in (x, dt)), a_log, b[:, :12], c[:, :12], chunk_size=8)
    close(state, short)


def test_large_steps_stay_finite() -> None:
    x, dt, a_log, b, c = (z.float() for z in inputs(64))
    leaves = [z.requires_grad_() for z in (x, dt * 500, a_log + 3, b, c)]
    y, _ = ssd_scan(*leaves, chunk_size=16)
    assert y.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), leaves))


def test_unfit_shapes_are_refused() -> None:
    x, dt, a_log, b, c = inputs(6)
    with pytest.raises(ValueError, match=r"state of shape \[2, 2\] .*give it \[2, 2, 4, 3\]"):
        ssd_scan(x, dt, a_log, b, c, state=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="give them"):
        ssd_scan(x, dt[:, :, :1], a_log, b, c)
    with pytest.raises(ValueError, match="one state width"):
        ssd_scan(x, dt, a_log, b, c[..., :2])
    with pytest.raises(ValueError, match="chunk_size=0 is not positive; set it"):
        ssd_scan(x, dt, a_log, b, c, chunk_size=0)
    with pytest.raises(ValueError, match="reshape it to heads"):
        ssd_scan(x.flatten(2), dt, a_log, b, c)
    with pytest.raises(ValueError, match=r"does not rise from 0 to T=6 .*\(B=2\)"):
        ssd_scan(x, dt, a_log, b, c, cu_seqlens=torch.tensor([0, 6]))
