"""Every Triton kernel once at small, odd shapes, under NVIDIA's compute-sanitizer.

python -m tests.kernels.sanitize [TOOL ...]     memcheck, racecheck, initcheck, synccheck
python -m tests.kernels.sanitize --run          the shapes alone, without the sanitizer

Prints one line a tool and exits 1 where one found something. Allocations are not cached meanwhile,
so that a read or write past a tensor's end is seen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import torch
from torch import Tensor

from kernels import vocabulary
from kernels.ttt_memory import FastWeights, fused, memory_scan

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype).requires_grad_()


def scan(width: int, tokens: int, chunk: int, bounds: list[int] | None, clip: float | None) -> None:
    """Forward and backward of the memory."""
    heads, hidden = 2, 2 * width
    q, k, v = (random(1, tokens, heads, width) for _ in range(3))
    eta = random(1, tokens, heads, 3, dtype=torch.float32).detach().abs() * 0.01
    mu = random(1, tokens, heads, dtype=torch.float32).detach().sigmoid()
    weights = FastWeights(
        random(heads, hidden, width), random(heads, hidden, width), random(heads, width, hidden)
    )
    out, state = memory_scan(
        q, k, v, eta.requires_grad_(), mu.requires_grad_(), weights, chunk_size=chunk, clip=clip,
        cu_seqlens=None if bounds is None else torch.tensor(bounds), backend="triton",
    )  # fmt: skip
    assert state is not None
    (out.float().sum() + state.weights.gate.sum() + state.momentum.down.sum()).backward()


def around(width: int, tokens: int) -> None:
    """Forward and backward of what stands around the scan."""
    heads = 2
    x, weight = random(1, tokens, heads * width), random(heads * width, 4)
    bounds = torch.tensor([0, 1, tokens // 2, tokens])
    for norm, tail in ((random(width), random(3, 3, heads * width)), (None, None)):
        fused.conv_heads(
            x, weight, heads, norm=norm, eps=1e-6, tail=tail, cu_seqlens=bounds, backend="triton"
        ).float().sum().backward()
    v_hat, gate = random(2, tokens, heads, width), random(2, tokens, heads)
    fused.gated_output(v_hat, random(width), gate, 1e-6, backend="triton").float().sum().backward()
    base, alpha, y = random(tokens, 1, 130), random(130), random(tokens, 1, 130)
    fused.add_scaled(base, alpha, y, backend="triton").float().sum().backward()


def loss(size: int) -> None:
    """Both passes over a slice's logits."""
    student, teacher = random(5, size).detach(), random(5, size).detach()
    sums = []
    for logits in (student, teacher):
        largest, total = vocabulary.statistics(logits)
        sums.append(torch.stack((largest, total.log())))
    targets = torch.arange(5, device=DEVICE) % size
    vocabulary.loss_and_gradient(
        student, teacher, *sums, targets, first=0, kl_weight=1.0, ce_weight=0.5, gradient=True
    )


def decode(width: int, wide: int, taps: int) -> None:
    """What a decode step is made of: rows of odd lengths, at the borders of sinks and window."""
    from kernels.swa.decode import window_step
    from kernels.ttt_memory.triton_backend.decode import memory_step, sum_norm, swiglu

    heads, group, size, chunk = 2, 3, 2 * width, 5
    past = torch.tensor([0, 2, 37, 104], device=DEVICE)
    with torch.no_grad():
        x = random(4, (group + 2) * heads * wide + 3 * size + 5 * heads)
        norms, angles = (random(wide), random(wide)), (random(4, wide), random(4, wide))
        ring = random(2, 4, 35, heads, wide)
        window_step(
            x, x[0].clone(), norms, *angles, past, ring[0], ring[1], num_heads=group * heads,
            num_slots=35, window_size=32, num_sinks=3,
        )  # fmt: skip
        wide_type = {"dtype": torch.float32}
        state = {
            **{f"tail_{name}": random(4, taps - 1, size) for name in "qkv"},
            "weights_gate": random(4, heads, 2 * width, width, **wide_type),
            "weights_up": random(4, heads, 2 * width, width, **wide_type),
            "weights_down": random(4, heads, width, 2 * width, **wide_type),
            "pending_k": random(4, chunk, heads, width),
            "pending_v": random(4, chunk, heads, width),
            "pending_eta": random(4, chunk, heads, 3, **wide_type),
            "pending_mu": random(4, chunk, heads, **wide_type),
        }
        convs = (random(size, taps), random(size, taps), random(size, taps))
        first = (group + 2) * heads * wide
        memory_step(
            x, x[0].clone(), past, state, convs, (random(width), random(width), random(width)),
            first=first, rates=first + 3 * size, qk_eps=1e-6, out_eps=1e-6,
        )  # fmt: skip
        y, z = random(4, 130), random(4, 130)
        sum_norm(y, random(130), 1e-6, z, y.clone(), random(130))
        swiglu(y, z)


def run() -> None:
    on_gpu = DEVICE == "cuda"
    for width in (64, 24, 128) if on_gpu else (16,):
        scan(width, 70 if on_gpu else 21, 16, None, None)
        scan(width, 41 if on_gpu else 15, 10, [0, 3, 3, 14, 41 if on_gpu else 15], 0.5)
        around(width, 37 if on_gpu else 5)
        decode(width, width + 16, 4 if width != 24 else 1)
    loss(1000)
    loss(7)
    if on_gpu:
        torch.cuda.synchronize()
    print("every kernel ran")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", default=list(TOOLS), help=", ".join(TOOLS))
    parser.add_argument("--run", action="store_true", help="without the sanitizer")
    given = parser.parse_args()
    if given.run:
        run()
        return 0
    program = shutil.which("compute-sanitizer")
    if program is None or DEVICE != "cuda":
        sys.exit("compute-sanitizer and a CUDA device are needed; install the CUDA toolkit")
    status = 0
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in given.tools:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
        done = subprocess.run(
            [*command, "tests.kernels.sanitize", "--run"], env=environment, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        clean = done.returncode == 0
        status |= not clean
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        print(f"{tool}: {'clean' if clean else 'FAILED'} {' '.join(lines)}", flush=True)
        if not clean:
            print(done.stdout[-4000:] + done.stderr[-2000:])
    return status


if __name__ == "__main__":
    sys.exit(main())
