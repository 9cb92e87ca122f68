"""What stands before and after the scan: convolution, norms, rates, output gate."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ttt_memory import branch

Fixture = Any


def conv_inputs(tokens: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(rows, tokens, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(5, 4, generator=generator, dtype=torch.float64)


def conv_loop(x: Tensor, weight: Tensor) -> Tensor:
    """One document [T, C], tap by tap."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for tap in range(4):
            if t - 3 + tap >= 0:
                out[t] += weight[:, tap] * x[t - 3 + tap]
    return out


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_convolution_matches_a_loop(tokens: int, close: Fixture) -> None:
    x, weight = conv_inputs(tokens)
    y, tail = branch.causal_conv(x, weight)
    for row in range(2):
        close(y[row], conv_loop(x[row], weight))
    padded = torch.cat([torch.zeros(2, 3, 5, dtype=torch.float64), x], 1)
    assert torch.equal(tail, padded[:, -3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_starts_as_the_identity_to_the_bit(dtype: torch.dtype) -> None:
    x, weight = conv_inputs(9, rows=1)
    weight.zero_()[:, -1] = 1
    for cu in (None, torch.tensor([0, 2, 9])):
        y, _ = branch.causal_conv(x.to(dtype), weight, cu_seqlens=cu)
        assert torch.equal(y, x.to(dtype))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 14), cuts=st.lists(st.integers(0, 14), max_size=5))
def test_convolution_of_a_split_sequence_equals_one_call(
    close: Fixture, tokens: int, cuts: list[int]
) -> None:
    x, weight = conv_inputs(tokens)
    want, want_tail = branch.causal_conv(x, weight)
    tail, pieces = None, []
    for begin, end in pairwise([0, *sorted(min(cut, tokens) for cut in cuts), tokens]):
        y, tail = branch.causal_conv(x[:, begin:end], weight, tail=tail)
        pieces.append(y)
    close(torch.cat(pieces, 1), want)
    assert torch.equal(tail, want_tail)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(calls=st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=4))
def test_convolution_never_looks_across_documents(
    close: Fixture, calls: list[tuple[int, ...]]
) -> None:
    x, weight = conv_inputs(24, rows=3)
    at, tail = [0, 0, 0], None
    pieces: list[list[Tensor]] = [[], [], []]
    for lengths in calls:
        packed = torch.cat([x[row, at[row] : at[row] + n] for row, n in enumerate(lengths)])[None]
        cu = torch.tensor([0, *lengths]).cumsum(0)
        y, tail = branch.causal_conv(packed, weight, tail=tail, cu_seqlens=cu)
        for row, n in enumerate(lengths):
            pieces[row].append(y[0, cu[row] : cu[row + 1]])
            at[row] += n
    for row in range(3):
        want, want_tail = branch.causal_conv(x[row : row + 1, : at[row]], weight)
        close(torch.cat(pieces[row]), want[0])
        assert torch.equal(tail[row], want_tail[0])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_the_convolution(packed: bool) -> None:
    x, weight = conv_inputs(7, rows=1)
    cu = torch.tensor([0, 2, 7]) if packed else None
    tail = torch.randn(2 if packed else 1, 3, 5, dtype=torch.float64)
    leaves = [z.requires_grad_() for z in (x, weight, tail)]
    assert torch.autograd.gradcheck(
        lambda x, w, tail: branch.causal_conv(x, w, tail=tail, cu_seqlens=cu), leaves
    )


def test_unfit_convolutions_are_refused() -> None:
    x, weight = conv_inputs(6)
    with pytest.raises(ValueError, match=r"weight of shape \[4, 4\] .*give x \[B, T, C\]"):
        branch.causal_conv(x, weight[:4])
    with pytest.raises(ValueError, match=r"tail of shape .*give it \[2, 3, 5\]"):
        branch.causal_conv(x, weight, tail=x[:, :2])
    with pytest.raises(ValueError, match="does not rise from 0 to T=6"):
        branch.causal_conv(x[:1], weight, cu_seqlens=torch.tensor([0, 5]))


def test_queries_and_keys_have_unit_length(close: Fixture) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    weight = torch.rand(8, dtype=torch.float64) + 0.5
    got = branch.memory_qk(x, weight, 1e-6)
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    close(got, normed / normed.norm(dim=-1, keepdim=True))
    low = branch.memory_qk(x.bfloat16(), weight.bfloat16(), 1e-6)
    assert low.dtype == torch.bfloat16
    close(low, got)


def test_zero_vectors_stay_zero_with_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = branch.memory_qk(x, torch.ones(8), 1e-6)
    assert torch.equal(y, torch.zeros(2, 8))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("eta_init", [1e-6, 1e-3, 0.5, 30.0])
def test_the_bias_gives_the_rate_it_is_asked_for(eta_init: float) -> None:
    bias = torch.tensor(branch.eta_bias(eta_init), dtype=torch.float64)
    assert branch.eta_from(bias).item() == pytest.approx(eta_init, rel=1e-6)
    assert branch.eta_from(bias.to(torch.bfloat16)).dtype == torch.float32


def test_a_rate_that_softplus_cannot_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eta_init=0.0 is not above 0.*set it to 1e-3"):
        branch.eta_bias(0.0)


def test_momentum_coefficients_start_at_a_half() -> None:
    assert branch.mu_from(torch.zeros(3)).tolist() == [0.5] * 3


def test_memory_output_gates_and_norms_each_head(close: Fixture) -> None:
    v_hat = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    weight, logits = torch.rand(4, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64)
    got = branch.memory_output(v_hat, weight, logits, 1e-6)
    assert got.shape == (1, 3, 8)
    for head in range(2):
        x = v_hat[0, 1, head]
        rms = math.sqrt(float((x * x).mean()) + 1e-6)
        gate = 1 / (1 + math.exp(-float(logits[0, 1, head])))
        close(got[0, 1, head * 4 : head * 4 + 4], gate * x / rms * weight)
