"""The Triton kernels against the reference in float64: interpreted on a CPU, compiled on a GPU.

Every tensor that the kernels are to fill is NaN before: what they leave out shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ttt_memory import FastWeights, memory_scan, reference

pytest.importorskip("triton", reason="pip install triton (Linux) to test the Triton kernels")
from kernels.ttt_memory.triton_backend import backward, backward_reads, blocks, forward, launch
from kernels.ttt_memory.triton_backend import scan as triton_scan

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BOUND = 1e-5
"""‖out − ref‖ / ‖ref‖ in float32."""


def everything(
    run: Callable[..., Any], tensors: list[Tensor], *, split: int | None, **options: Any
) -> list[Tensor]:
    """Output, state and the gradients of all inputs, for one random linear loss of them all."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    inputs, weights = leaves[:5], FastWeights(*leaves[5:])
    if split is None:
        out, state = run(*inputs, weights, **options)
    else:
        first, state = run(*(x[:, :split] for x in inputs), weights, **options)
        second, state = run(*(x[:, split:] for x in inputs), weights, state, **options)
        out = torch.cat([first, second], 1)
    found = [out, *state.weights, *state.momentum, *state.pending()]
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64, device=out.device)
    for x in found:
        factor = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x.double() * factor.to(x.device)).sum()
    return [*found, *torch.autograd.grad(loss, leaves)]


CASES = {
    "rows": {"rows": 2, "tokens": 40},
    "rest-of-a-chunk": {"tokens": 37},
    "shorter-than-a-chunk": {"tokens": 5},
    "packed": {"tokens": 50, "bounds": [0, 5, 5, 23, 50]},
    "packed-no-chunk-complete": {"tokens": 14, "bounds": [0, 6, 14], "chunk": 16},
    "width-24": {"tokens": 20, "width": 24},
    "hidden-of-one-width": {"tokens": 20, "hidden": 16},
    "clip": {"tokens": 34, "clip": 0.5},
    "clip-never-reached": {"tokens": 18, "clip": 1e4},
    "decay": {"tokens": 34, "decay": 0.1},
    "chunk-beyond-a-block": {"tokens": 150, "chunk": 70, "heads": 1},
    "two-calls": {"rows": 2, "tokens": 41, "split": 19},
    "two-calls-within-a-chunk": {"tokens": 12, "split": 3},
    "chunk-of-one-token": {"tokens": 6, "chunk": 1},
    "states-made-again": {"tokens": 100, "rows": 2, "state_bytes": 1},
    "states-made-again-packed": {
        "tokens": 150,
        "bounds": [0, 5, 70, 150],
        "state_bytes": 1,
        "heads": 1,
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("nan_memory")
def test_outputs_states_and_gradients_equal_the_reference_in_float64(
    memory_inputs: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    settings = {"rows": 1, "heads": 2, "width": 16, "chunk": 8, "split": None, **CASES[case]}
    if "state_bytes" in settings:
        monkeypatch.setattr(triton_scan, "STATE_BYTES", settings["state_bytes"])
    width = settings["width"]
    inputs, weights = memory_inputs(
        settings["rows"], settings["tokens"], settings["heads"], width,
        settings.get("hidden", 2 * width),
    )  # fmt: skip
    inputs[3][:, 2:4] = 0.0  # padding
    bounds = settings.get("bounds")
    options = {
        "chunk_size": settings["chunk"],
        "cu_seqlens": None if bounds is None else torch.tensor(bounds),
        "clip": settings.get("clip"),
        "decay": settings.get("decay"),
        "split": settings["split"],
    }
    tensors = [*inputs, *weights]
    wanted = everything(reference.memory_scan, tensors, **options)
    single = [x.float().to(DEVICE) for x in tensors]
    found = everything(triton_scan.memory_scan, single, **options)
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.shape == expected.shape
        error = (actual.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= BOUND


def test_two_runs_are_equal_bit_by_bit(memory_inputs: Callable[..., Any]) -> None:
    inputs, weights = memory_inputs(1, 40, 2, 16, 32, dtype=torch.float32)
    tensors = [x.to(DEVICE) for x in (*inputs, *weights)]
    first, second = (
        everything(triton_scan.memory_scan, tensors, chunk_size=8, split=None) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_blocks_are_tuned_by_what_is_right_and_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune_blocks = pytest.importorskip("benchmarks.tune_blocks")
    monkeypatch.setattr(tune_blocks, "DEVICE", DEVICE)
    monkeypatch.setattr(blocks, "BLOCKS", BLOCKS := {k: dict(v) for k, v in blocks.BLOCKS.items()})
    monkeypatch.setattr(tune_blocks, "BLOCKS", BLOCKS)
    times = iter([3.0, 2.0, 4.0])
    settings = "--width 16 --tokens 20 --chunk 20 --kernels read_kernel --block-tokens 16 32"
    sizes = " --block-hidden 16 --warps 4 --stages 1"
    tune_blocks.main([*(settings + sizes).split()], lambda run: next(times))
    printed = capsys.readouterr().out
    assert "best: 2.000 ms" in printed
    assert '"read_kernel": 32: Blocks(tokens=16, hidden=16, warps=4, stages=1)' in printed


@pytest.mark.parametrize("chunks", [3, 9])
def test_a_step_costs_two_launches_each_way(
    memory_inputs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    launches = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            launches.append(self.kernel)
            return self.kernel[grid]

    for module in (forward, backward, backward_reads):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    inputs, weights = memory_inputs(1, 4 * chunks, 1, 16, 16, dtype=torch.float32)
    leaves = [x.to(DEVICE).requires_grad_() for x in (*inputs, *weights)]
    out, _ = triton_scan.memory_scan(
        *leaves[:5], FastWeights(*leaves[5:]), chunk_size=4, return_state=False
    )
    assert len(launches) == 2 * chunks + 2, "and the means of mu, and the reads"
    torch.autograd.grad(out.sum(), leaves)
    assert len(launches) == 4 * chunks + 6, "and W~, two gradients of the reads, one of the tokens"


def test_no_gradient_reaches_a_decay_and_the_error_says_so(
    memory_inputs: Callable[..., Any],
) -> None:
    inputs, weights = memory_inputs(1, 8, 2, 16, 32, dtype=torch.float32)
    decay = torch.tensor([0.1, 0.2], requires_grad=True)
    inputs = [x.to(DEVICE) for x in inputs]
    with pytest.raises(ValueError, match="gives decay no gradient; set backend='reference'"):
        triton_scan.memory_scan(*inputs, FastWeights(*weights), chunk_size=4, decay=decay)


def test_a_cpu_is_refused_unless_interpreted(
    memory_inputs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    inputs, weights = memory_inputs(1, 8, 2, 16, 32, dtype=torch.float32)
    with pytest.raises(ValueError, match="cannot run on cpu; move the tensors to a CUDA device"):
        memory_scan(*inputs, FastWeights(*weights), chunk_size=4, backend="triton")


def bfloat16_case(
    memory_inputs: Callable[..., Any], tokens: int, width: int, chunk: int, rows: int = 2
) -> list[Tensor]:
    """q, k, v in bfloat16; rates, coefficients and weights in float32, at eta c = 8."""
    inputs, weights = memory_inputs(rows, tokens, 512 // width or 1, width, 2 * width)
    inputs[3] *= 8 / chunk
    low = [x.to("cuda", torch.bfloat16) for x in inputs[:3]]
    return [*low, *(x.to("cuda", torch.float32) for x in (*inputs[3:], *weights))]


def assert_within_one_per_cent(tensors: list[Tensor], **options: Any) -> None:
    exact = [x.double() for x in tensors]
    wanted = everything(reference.memory_scan, exact, **options)
    found = everything(memory_scan, tensors, backend="triton", **options)
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.isfinite().all()
        error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("chunk", [16, 32, 64, 512, 1000, 2048])
@pytest.mark.usefixtures("nan_memory")
def test_bfloat16_on_a_gpu_is_within_one_per_cent(
    memory_inputs: Callable[..., Any], width: int, chunk: int
) -> None:
    tensors = bfloat16_case(memory_inputs, min(2100, 40 * chunk + 7), width, chunk)
    assert_within_one_per_cent(tensors, chunk_size=chunk, split=None)


@pytest.mark.gpu
def test_chunks_of_4096_on_a_gpu_are_within_one_per_cent(
    memory_inputs: Callable[..., Any],
) -> None:
    tensors = bfloat16_case(memory_inputs, 9001, 64, 4096, rows=1)
    assert_within_one_per_cent(tensors, chunk_size=4096, split=None)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 15, 63, 1000, 1023])
@pytest.mark.parametrize("width", [64, 128])
def test_odd_lengths_in_bfloat16_on_a_gpu(
    memory_inputs: Callable[..., Any], tokens: int, width: int
) -> None:
    tensors = bfloat16_case(memory_inputs, tokens, width, 100)
    assert_within_one_per_cent(tensors, chunk_size=100, split=None)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [16, 100, 512])
def test_packed_documents_in_bfloat16_on_a_gpu(
    memory_inputs: Callable[..., Any], chunk: int
) -> None:
    tensors = bfloat16_case(memory_inputs, 3000, 64, chunk, rows=1)
    bounds = torch.tensor([0, 5, 5, 700, 701, 1999, 3000])
    assert_within_one_per_cent(tensors, chunk_size=chunk, split=None, cu_seqlens=bounds)


@pytest.mark.gpu
def test_two_calls_in_bfloat16_on_a_gpu(memory_inputs: Callable[..., Any]) -> None:
    tensors = bfloat16_case(memory_inputs, 1500, 64, 256)
    assert_within_one_per_cent(tensors, chunk_size=256, split=777)


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 5, 30, 700, 701, 20_000]])
def test_two_large_runs_on_a_gpu_are_equal_bit_by_bit(
    memory_inputs: Callable[..., Any], bounds: list[int] | None
) -> None:
    tensors = bfloat16_case(memory_inputs, 20_000, 64, 512, rows=1)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    first, second = (
        everything(memory_scan, tensors, backend="triton", chunk_size=512, split=None,
                   cu_seqlens=cu_seqlens)
        for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_second_call_does_not_wait_for_the_gpu(memory_inputs: Callable[..., Any]) -> None:
    tensors = bfloat16_case(memory_inputs, 4000, 64, 512, rows=1)
    leaves = [x.requires_grad_() for x in tensors]

    def call() -> None:
        out, _ = memory_scan(
            *leaves[:5], FastWeights(*leaves[5:]), chunk_size=512, return_state=False,
            cu_seqlens=torch.tensor([0, 1300, 4000]), backend="triton",
        )  # fmt: skip
        torch.autograd.grad(out.float().square().sum(), leaves)

    call()  # plans and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
