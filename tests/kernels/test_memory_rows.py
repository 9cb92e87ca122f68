"""Rows of the memory scan: packed documents, split calls, pending tokens, the state's methods."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kernels.ttt_memory import FastWeights, MemoryState, initial_state, memory_scan

Fixture = Any


def same_state(a: MemoryState, b: MemoryState, close: Fixture) -> None:
    """Equal to rounding; pending slots past a row's length mean nothing."""
    for x, y in zip((*a.weights, *a.momentum), (*b.weights, *b.momentum), strict=True):
        close(x, y)
    assert a.pending_length.tolist() == b.pending_length.tolist()
    for row, length in enumerate(a.pending_length.tolist()):
        for x, y in zip(a.pending(), b.pending(), strict=True):
            assert torch.equal(x[row, :length], y[row, :length])


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 63],
        [0, 1, 2, 3, 63],  # documents shorter than a chunk
        [0, 13, 13, 40, 63],  # an empty one
        [0, 21, 42, 63],  # of one length
        [0, 5, 24, 25, 41, 63],
        [0, 2, 4, 63],
        [0, 30, 36, 37, 63],
    ],
)
def test_packed_documents_equal_documents_alone(
    bounds: list[int], memory_loop: Fixture, memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(1, 63, 2, 4, 8)
    cu = torch.tensor(bounds, dtype=torch.int32)
    out, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=5, cu_seqlens=cu)
    bare, nothing = memory_scan(
        *inputs, FastWeights(*weights), chunk_size=5, cu_seqlens=cu, return_state=False
    )
    assert nothing is None
    assert torch.equal(out, bare)
    for row, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            close(state.weights.gate[row], weights[0])
            continue
        want, matrices, momenta = memory_loop([x[0, begin:end] for x in inputs], weights, 5)
        close(out[0, begin:end], want)
        for i in range(3):
            close(state.weights[i][row], matrices[i])
            close(state.momentum[i][row], momenta[i])
        assert state.pending_length[row] == (end - begin) % 5


def test_packed_gradients_equal_those_of_documents_alone(
    memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(1, 63, 2, 4, 8)
    leaves = [x.requires_grad_() for x in (*inputs, *weights)]
    bounds = [0, 3, 26, 27, 40, 63]
    cu, mix = torch.tensor(bounds), torch.randn(1, 63, 2, 4, dtype=torch.float64)
    out, _ = memory_scan(
        *inputs, FastWeights(*weights), chunk_size=4, cu_seqlens=cu, return_state=False
    )
    alone = [
        memory_scan(*(x[:, a:b] for x in inputs), FastWeights(*weights), chunk_size=4)[0]
        for a, b in pairwise(bounds)
    ]
    want = torch.autograd.grad((torch.cat(alone, 1) * mix).sum(), leaves)
    for grad, expected in zip(torch.autograd.grad((out * mix).sum(), leaves), want, strict=True):
        close(grad, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    chunk=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_split_calls_equal_one_call_wherever_the_split_falls(
    memory_inputs: Fixture, close: Fixture, tokens: int, chunk: int, cuts: list[int]
) -> None:
    inputs, weights = memory_inputs(2, tokens, 1, 3, 4, seed=tokens)
    want, want_state = memory_scan(*inputs, FastWeights(*weights), chunk_size=chunk)
    bounds = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    state, pieces = None, []
    for begin, end in pairwise(bounds):
        part = [x[:, begin:end] for x in inputs]
        piece, state = memory_scan(*part, FastWeights(*weights), state, chunk_size=chunk)
        pieces.append(piece)
    close(torch.cat(pieces, 1), want)
    same_state(state, want_state, close)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    chunk=st.integers(1, 9),
    calls=st.lists(st.tuples(*[st.integers(0, 14)] * 3), min_size=1, max_size=4),
)
def test_rows_of_different_lengths_go_on_from_different_pending_lengths(
    memory_inputs: Fixture, close: Fixture, chunk: int, calls: list[tuple[int, ...]]
) -> None:
    num_rows = len(calls[0])
    inputs, weights = memory_inputs(num_rows, 56, 1, 3, 4, seed=chunk)
    at, state = [0] * num_rows, None
    pieces: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
    for lengths in calls:
        packed = [
            torch.cat([x[row, at[row] : at[row] + n] for row, n in enumerate(lengths)])[None]
            for x in inputs
        ]
        cu = torch.tensor([0, *lengths]).cumsum(0)
        out, state = memory_scan(
            *packed, FastWeights(*weights), state, chunk_size=chunk, cu_seqlens=cu
        )
        for row, n in enumerate(lengths):
            pieces[row].append(out[0, cu[row] : cu[row + 1]])
            at[row] += n
    for row in range(num_rows):
        alone = [x[row : row + 1, : at[row]] for x in inputs]
        want, want_state = memory_scan(*alone, FastWeights(*weights), chunk_size=chunk)
        close(torch.cat(pieces[row]), want[0])
        same_state(state.select([row]), want_state, close)


def test_decoding_rows_token_by_token_equals_prefill(
    memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(3, 30, 2, 4, 8)
    prefixes = [4, 9, 13]
    packed = [torch.cat([x[row, :n] for row, n in enumerate(prefixes)])[None] for x in inputs]
    cu = torch.tensor([0, 4, 13, 26])
    _, state = memory_scan(*packed, FastWeights(*weights), chunk_size=6, cu_seqlens=cu)
    steps = []
    for t in range(17):
        token = [
            torch.stack([x[row, n + t] for row, n in enumerate(prefixes)])[:, None] for x in inputs
        ]
        out, state = memory_scan(*token, FastWeights(*weights), state, chunk_size=6)
        steps.append(out)
    decoded = torch.cat(steps, 1)
    for row, n in enumerate(prefixes):
        alone = [x[row : row + 1, : n + 17] for x in inputs]
        want, want_state = memory_scan(*alone, FastWeights(*weights), chunk_size=6)
        close(decoded[row], want[0, n:])
        same_state(state.select(torch.tensor([row])), want_state, close)


def test_gradients_flow_through_the_state_between_calls(
    memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(1, 25, 2, 4, 8)
    leaves = [x.requires_grad_() for x in (*inputs, *weights)]
    want, _ = memory_scan(*inputs, FastWeights(*weights), chunk_size=4)
    _, state = memory_scan(*(x[:, :10] for x in inputs), FastWeights(*weights), chunk_size=4)
    rest = [x[:, 10:] for x in inputs]
    second, _ = memory_scan(*rest, FastWeights(*weights), state, chunk_size=4)
    expected = torch.autograd.grad(want[:, 10:].square().sum(), leaves, retain_graph=True)
    for grad, target in zip(
        torch.autograd.grad(second.square().sum(), leaves), expected, strict=True
    ):
        close(grad, target)
    cut = state.detach()
    assert not any(x.requires_grad for x in (*cut.weights, *cut.momentum, *cut.pending()))


def test_no_tokens_change_nothing(memory_inputs: Fixture) -> None:
    inputs, weights = memory_inputs(2, 7, 2, 4, 8)
    _, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=4)
    none = [x[:, :0] for x in inputs]
    out, same = memory_scan(*none, FastWeights(*weights), state, chunk_size=4)
    assert out.shape == (2, 0, 2, 4)
    assert torch.equal(same.weights.up, state.weights.up)
    assert torch.equal(same.pending_k, state.pending_k)
    out, fresh = memory_scan(*none, FastWeights(*weights), chunk_size=4)
    assert out.shape == (2, 0, 2, 4)
    assert fresh.pending_length.tolist() == [0, 0]


def test_starting_from_the_initial_state_is_starting_from_none(memory_inputs: Fixture) -> None:
    inputs, weights = memory_inputs(2, 11, 2, 4, 8)
    start = initial_state(FastWeights(*weights), 2, dtype=torch.float64)
    assert start.num_rows == 2
    out, state = memory_scan(*inputs, FastWeights(*weights), start, chunk_size=4)
    want, want_state = memory_scan(*inputs, FastWeights(*weights), chunk_size=4)
    assert torch.equal(out, want)
    assert torch.equal(state.weights.down, want_state.weights.down)


def test_the_state_does_not_grow_with_the_sequence(memory_inputs: Fixture) -> None:
    sizes = []
    for tokens in (19, 59):
        inputs, weights = memory_inputs(2, tokens, 2, 4, 8, dtype=torch.float32)
        _, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=8)
        sizes.append(state.num_bytes)
        storages = [x.untyped_storage().nbytes() for x in state.pending()]
        assert max(storages) <= 2 * 3 * 2 * 4 * 4, "a view would keep the sequence alive"
    # 2 rows: W and M of 2 heads x 3 matrices of 32, 3 pending tokens, the int64 length
    assert sizes == [2 * (2 * 2 * 3 * 32 * 4 + 3 * 2 * (4 + 4 + 3 + 1) * 4 + 8)] * 2


def test_rows_of_a_state_can_be_repeated_and_reordered(memory_inputs: Fixture) -> None:
    inputs, weights = memory_inputs(3, 9, 2, 4, 8)
    _, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=4)
    picked = state.select([2, 0, 2]).to("cpu")
    assert picked.num_rows == 3
    assert torch.equal(picked.weights.gate[0], state.weights.gate[2])
    assert torch.equal(picked.momentum.down[1], state.momentum.down[0])
    assert torch.equal(picked.pending_v[2], state.pending_v[2])


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 600],
        [0, 200, 400, 600],
        [0, 399, *range(400, 601)],  # documents of one token
        [0, 19, *range(28, 601, 11)],  # all wrote, tails of 1 and 9
        [0, 333, 341, 500, 580, 600],
    ],
)
def test_packing_costs_no_padding(bounds: list[int], memory_inputs: Fixture) -> None:
    """Work is linear in tokens: 6 n d_h f to read one, 12 to write one, tails at most doubled."""
    inputs, weights = memory_inputs(1, 600, 2, 4, 8, dtype=torch.float32)
    bounds = sorted({*bounds, 600})
    with FlopCounterMode(display=False) as counter:
        memory_scan(
            *inputs, FastWeights(*weights), chunk_size=10, return_state=False,
            cu_seqlens=torch.tensor(bounds),
        )  # fmt: skip
    tails = sum((end - begin) % 10 for begin, end in pairwise(bounds))
    expected = (18 * (600 - tails) + 6 * tails) * 2 * 4 * 8
    assert expected <= counter.get_total_flops() <= expected + 6 * tails * 2 * 4 * 8
