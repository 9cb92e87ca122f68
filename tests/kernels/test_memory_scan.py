"""The memory scan against a loop over tokens: outputs, state and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.ttt_memory import FastWeights, memory_scan

Fixture = Any


@pytest.mark.parametrize(
    ("tokens", "chunk"), [(63, 8), (63, 63), (63, 64), (64, 16), (7, 1), (1, 4), (40, 5)]
)
def test_scan_matches_a_loop_over_tokens(
    tokens: int, chunk: int, memory_loop: Fixture, memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(2, tokens, 2, 4, 8)
    out, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=chunk)
    for row in range(2):
        want, matrices, momenta = memory_loop([x[row] for x in inputs], weights, chunk)
        close(out[row], want)
        for i in range(3):
            close(state.weights[i][row], matrices[i])
            close(state.momentum[i][row], momenta[i])
    rest = tokens % chunk
    assert state.pending_length.tolist() == [rest, rest]
    for stream, held in zip(inputs[1:], state.pending(), strict=True):
        assert torch.equal(held, stream[:, tokens - rest :])


def test_scan_matches_a_loop_over_a_thousand_tokens(
    memory_loop: Fixture, memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(1, 1000, 1, 3, 6)
    out, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=48)
    want, matrices, _ = memory_loop([x[0] for x in inputs], weights, 48)
    close(out[0], want)
    close(state.weights.down[0], matrices[2])


@pytest.mark.parametrize(("clip", "decay"), [(None, 0.0), (0.3, 0.0), (0.3, 0.1)])
def test_gradients_match_those_through_the_loop(
    clip: float | None, decay: float, memory_loop: Fixture, memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(1, 23, 2, 3, 5)
    mix = torch.randn(inputs[0].shape, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*inputs, *weights)]
    settings = {"clip": clip, "decay": decay or None}
    out, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=5, **settings)
    want, matrices, momenta = memory_loop([x[0] for x in inputs], weights, 5, clip, decay, True)
    close(out[0], want)
    tail = sum((w**2).sum() for w in (*state.weights, *state.momentum))
    tail_want = sum((w**2).sum() for w in (*matrices, *momenta))
    got = torch.autograd.grad((out * mix).sum() + tail, leaves)
    for grad, expected in zip(
        got, torch.autograd.grad((want * mix[0]).sum() + tail_want, leaves), strict=True
    ):
        close(grad, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_holds_for_every_input_and_the_state(
    packed: bool, memory_inputs: Fixture
) -> None:
    inputs, weights = memory_inputs(1 if packed else 2, 10 if packed else 5, 1, 2, 3)
    cu = torch.tensor([0, 1, 6, 10]) if packed else None
    rows = 3 if packed else 2
    before, _ = memory_inputs(rows, 3, 1, 2, 3, seed=1)
    _, state = memory_scan(*before, FastWeights(*weights), chunk_size=2)
    held = [*state.weights, *state.momentum, *state.pending()]
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *weights, *held)]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start = type(state)(
            FastWeights(*tensors[8:11]), FastWeights(*tensors[11:14]), *tensors[14:],
            state.pending_length,
        )  # fmt: skip
        out, after = memory_scan(
            *tensors[:5], FastWeights(*tensors[5:8]), start, chunk_size=2, cu_seqlens=cu, clip=0.5
        )
        return (out, *after.weights, *after.momentum, *after.pending())

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(("clip", "decay"), [(0.2, 0.0), (None, 0.05), (5.0, 0.2)])
def test_clip_and_decay_match_the_loop(
    clip: float | None, decay: float, memory_loop: Fixture, memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(1, 33, 2, 4, 8)
    settings = {"clip": clip, "decay": torch.full((2,), decay, dtype=torch.float64)}
    out, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=6, **settings)
    want, matrices, _ = memory_loop([x[0] for x in inputs], weights, 6, clip, decay)
    close(out[0], want)
    close(state.weights.gate[0], matrices[0])


def test_padding_tokens_write_nothing_and_leave_the_mean(
    memory_loop: Fixture, memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(1, 24, 2, 4, 8)
    q, k, v, eta, mu = inputs
    padding = torch.zeros(24, dtype=torch.bool)
    padding[[3, 7, *range(12, 18), 20, 22, 23]] = True  # one chunk of nothing else, 12 to 17
    eta[:, padding] = 0
    out, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=6)
    want, _, momenta = memory_loop([x[0] for x in inputs], weights, 6)
    close(out[0], want)
    close(state.momentum.up[0], momenta[1])
    noise = [x.clone() for x in (q, k, v, eta, mu)]
    for x in (noise[1], noise[2], noise[4]):
        x[:, padding] = torch.randn_like(x[:, padding])
    again, same = memory_scan(*noise, FastWeights(*weights), chunk_size=6)
    close(again, out)
    close(same.weights.gate, state.weights.gate)


def test_gradients_stay_finite_where_rates_and_rows_are_zero(memory_inputs: Fixture) -> None:
    inputs, weights = memory_inputs(1, 16, 2, 4, 8, dtype=torch.float32)
    inputs[3].zero_()
    weights[0][:, 2] = 0
    leaves = [x.requires_grad_() for x in (*inputs, *weights)]
    out, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=4, clip=1.0)
    loss = out.square().sum() + sum(w.square().sum() for w in state.weights)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))


def test_scan_at_chunk_one_is_the_rule_per_token(memory_inputs: Fixture, close: Fixture) -> None:
    inputs, weights = memory_inputs(1, 9, 2, 4, 8)
    out, _ = memory_scan(*inputs, FastWeights(*weights), chunk_size=1)
    state, pieces = None, []
    for t in range(9):
        token = [x[:, t : t + 1] for x in inputs]
        piece, state = memory_scan(*token, FastWeights(*weights), state, chunk_size=1)
        pieces.append(piece)
        assert state.pending_length.tolist() == [0]
    close(torch.cat(pieces, 1), out)


def test_tokens_read_only_what_earlier_chunks_wrote(memory_inputs: Fixture) -> None:
    inputs, weights = memory_inputs(1, 24, 1, 4, 8)
    out, _ = memory_scan(*inputs, FastWeights(*weights), chunk_size=8)
    changed = [x.clone() for x in inputs]
    for x in changed[1:]:
        x[:, 9:16] = x[:, 9:16].flip(1)
        x[:, 11] += 0.1
    again, _ = memory_scan(*changed, FastWeights(*weights), chunk_size=8)
    assert torch.equal(again[:, :16], out[:, :16])
    assert not torch.allclose(again[:, 16:], out[:, 16:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_and_keeps_a_float32_state(
    dtype: torch.dtype, memory_inputs: Fixture, close: Fixture
) -> None:
    inputs, weights = memory_inputs(2, 100, 2, 8, 16)
    want, _ = memory_scan(*inputs, FastWeights(*weights), chunk_size=16)
    low = [x.to(dtype) for x in inputs]
    low_weights = FastWeights(*(w.to(dtype) for w in weights))
    with torch.autocast("cpu", torch.bfloat16):
        out, state = memory_scan(*low, low_weights, chunk_size=16)
    close(out, want)
    assert out.dtype == dtype
    assert {w.dtype for w in (*state.weights, *state.momentum)} == {torch.float32}
    assert state.pending_k.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_sequence_stays_finite_in_little_memory(dtype: torch.dtype) -> None:
    tokens, chunk = 131_072, 2048
    shape = (1, tokens, 1, 8)
    q = torch.nn.functional.normalize(torch.randn(shape), dim=-1).to(dtype)
    v, eta = torch.randn(shape).to(dtype), torch.full((1, tokens, 1, 3), 8 / chunk)
    weights = FastWeights(torch.randn(1, 16, 8), torch.randn(1, 16, 8), torch.randn(1, 8, 16))
    made = LargeTensors(at_least=chunk * 64)
    with torch.no_grad(), made:
        out, _ = memory_scan(q, q, v, eta, eta[..., 0], weights, chunk_size=chunk)
    assert out.isfinite().all()
    given = {x.untyped_storage().data_ptr() for x in (q, v, eta)}
    assert len(made.storages - given) <= 1, "only the result is as long as the sequence"


class LargeTensors(TorchDispatchMode):
    """Collects the storages of all tensors that any operator returns from a size on."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least = at_least
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.at_least:
            self.storages.add(result.untyped_storage().data_ptr())
        return result
