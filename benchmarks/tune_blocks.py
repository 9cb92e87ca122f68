"""Times other blocks for the memory's Triton kernels on this GPU, one kernel after the other.

python -m benchmarks.tune_blocks [--width 64] [--tokens 24576] [--chunk 2048] [--kernels NAME ...]

The blocks in `kernels/ttt_memory/triton_backend/blocks.py` were chosen from what the compiler says;
this is how they are chosen by a clock. For each kernel it tries blocks of tokens and hidden units,
warps and stages, checks the result against that of the blocks in force (1e-2), times forward and
backward of the whole scan, and keeps the best for the kernels after it. It prints a line for each
try and, last, the table's entries for this width; it changes no file.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from kernels.ttt_memory import FastWeights, memory_scan
from kernels.ttt_memory.triton_backend.blocks import BLOCKS, Blocks, padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 1e-2


def inputs(tokens: int, width: int, chunk: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, eta, mu and the three matrices, as a model at its start gives them."""
    generator = torch.Generator().manual_seed(0)
    heads, hidden = max(1, 512 // width), 2 * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(1, tokens, heads, width) for _ in range(3))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    eta, mu = torch.rand(1, tokens, heads, 3) * 8 / chunk, torch.rand(1, tokens, heads)
    gate, up = (normal(heads, hidden, width) / width**0.5 for _ in range(2))
    down = normal(heads, width, hidden) / hidden**0.5
    low = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)]
    return [*low, *(x.to(DEVICE).requires_grad_() for x in (eta, mu, gate, up, down))]


def runner(leaves: list[Tensor], chunk: int) -> Callable[[], list[Tensor]]:
    """Forward and backward; gives the output and all gradients."""
    q, k, v, eta, mu, *matrices = leaves

    def run() -> list[Tensor]:
        out, _ = memory_scan(
            q, k, v, eta, mu, FastWeights(*matrices), chunk_size=chunk, return_state=False,
            backend="triton",
        )  # fmt: skip
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    return run


def wrong(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether any tensor is further than `BOUND` from what it should be; NaN is."""
    return any(
        not (a.float() - b.float()).norm() <= BOUND * b.float().norm()
        for a, b in zip(found, wanted, strict=True)
    )


def milliseconds(run: Callable[[], list[Tensor]]) -> float:
    """Median, by device events."""
    return float(triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median"))


def candidates(given: argparse.Namespace) -> list[Blocks]:
    return [
        Blocks(*sizes)
        for sizes in itertools.product(
            given.block_tokens, given.block_hidden, given.warps, given.stages
        )
    ]


def tune(given: argparse.Namespace, timer: Callable[..., float]) -> dict[str, Blocks]:
    """The best blocks of each kernel; `BLOCKS` is left with them."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    run = runner(inputs(given.tokens, given.width, given.chunk, dtype), given.chunk)
    wanted, best = run(), timer(run)
    place = max(32, padded(given.width))
    print(f"blocks in force: {best:.3f} ms")
    for kernel in given.kernels:
        kept = BLOCKS[kernel][place]
        for blocks in candidates(given):
            BLOCKS[kernel][place] = blocks
            try:
                found = run()
            except triton.runtime.errors.OutOfResources as error:
                print(f"{kernel} {tuple(blocks)}: does not fit ({error})")
                continue
            if wrong(found, wanted):
                print(f"{kernel} {tuple(blocks)}: WRONG, left out")
                continue
            time = timer(run)
            print(f"{kernel} {tuple(blocks)}: {time:.3f} ms", flush=True)
            if time < 0.99 * best:  # less is noise
                best, kept = time, blocks
        BLOCKS[kernel][place] = kept
    print(f"best: {best:.3f} ms")
    return {kernel: BLOCKS[kernel][place] for kernel in BLOCKS}


def main(arguments: list[str] | None = None, timer: Callable[..., float] = milliseconds) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64, help="of a memory head; d is 512")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--kernels", nargs="*", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--block-tokens", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--block-hidden", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--warps", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    given = parser.parse_args(arguments)
    if timer is milliseconds and DEVICE != "cuda":
        sys.exit("no CUDA device: blocks are timed on the GPU that they are for")
    place = max(32, padded(given.width))
    for kernel, blocks in tune(given, timer).items():
        print(f'"{kernel}": {place}: {blocks}')


if __name__ == "__main__":
    main()
