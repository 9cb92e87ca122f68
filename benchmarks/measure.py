"""Clocks, ceilings and the machine: how the kernel and model benchmarks measure.

On a CUDA device a call is timed by device events, after its second-level cache was overwritten, so
that inputs of an earlier repeat do not lie in it. On a CPU both wall and CPU seconds of the process
are taken: on a machine that others use, the second hardly depends on them. Repeats of several calls
are interleaved, and medians reported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
_FLUSH_BYTES = 256 * 2**20  # several times the second-level cache of a Hopper GPU


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call over its repeats."""

    seconds: float
    """Median by the wall clock (CPU) or the device's events (CUDA)."""
    least: float
    most: float
    cpu_seconds: float | None
    """Median CPU time of the process, on a CPU."""
    repeats: int

    @property
    def steady(self) -> float:
        """The figure that others on the machine disturb least."""
        return self.seconds if self.cpu_seconds is None else self.cpu_seconds


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine reaches in a large matrix product and a large copy, in this run."""

    flops: float
    """FLOP/s."""
    bandwidth: float
    """Bytes/s, bytes read plus bytes written."""
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that a call must do: every FLOP of its formula, every input and output once."""

    flops: float
    bytes: float

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds that no version can be faster than, and which of the two sets them."""
        arithmetic, movement = self.flops / ceilings.flops, self.bytes / ceilings.bandwidth
        return max(arithmetic, movement), "FLOPs" if arithmetic >= movement else "bytes"


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if cuda else None

    def once(self, call: Callable[[], object]) -> tuple[float, float | None]:
        """Seconds of one call, by the device's clock, and CPU seconds on a CPU."""
        if self._flush is None:
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            return time.perf_counter() - wall, time.process_time() - cpu
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) * 1e-3, None

    def interleaved(
        self,
        calls: Mapping[str, Callable[[], object]],
        *,
        budget_s: float = 2.0,
        least: int = 3,
        most: int = 50,
        warmup: int = 2,
    ) -> dict[str, Timing]:
        """Times the calls in turns: first of all, then all again.

        Args:
            calls: by name.
            budget_s: for all repeats together; the warming up tells how many these are.
            least: repeats of each call at least.
            most: repeats at most.
            warmup: calls before, the first of which may compile.
        """
        turn = 0.0
        for number in range(warmup):
            lasted = [self.once(call)[0] for call in calls.values()]
            if number == warmup - 1:
                turn = sum(lasted)
        repeats = min(most, max(least, int(budget_s / max(turn, 1e-9))))
        found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                found[name].append(self.once(call))
        return {name: summary(values) for name, values in found.items()}


def summary(values: list[tuple[float, float | None]]) -> Timing:
    """Median, least and most of repeats."""
    walls = [wall for wall, _ in values]
    cpus = [cpu for _, cpu in values if cpu is not None]
    return Timing(
        seconds=statistics.median(walls),
        least=min(walls),
        most=max(walls),
        cpu_seconds=statistics.median(cpus) if cpus else None,
        repeats=len(walls),
    )


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    """A large matrix product of random numbers, and a copy of memory far beyond the caches.

    Args:
        device: where.
        dtype: of the product.
        quick: a small product and copy, for tests.
    """
    cuda = device.type == "cuda"
    size, copied = (8192, 2 * 2**30) if cuda else (2048, 256 * 2**20)
    if quick:
        size, copied = 256, 16 * 2**20
    watch = Stopwatch(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(copied, dtype=torch.int8, device=device).random_(-128, 127)
    target = torch.empty_like(source)
    timings = watch.interleaved(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)},
        budget_s=2.0 if not quick else 0.1,
        least=5,
    )
    product, copy = (timings[name] for name in ("product", "copy"))
    if not cuda:  # by CPU seconds, as everything that is compared with them
        return Ceilings(
            flops=2.0 * size**3 / product.steady,
            bandwidth=2.0 * copied / copy.steady,
            dtype=str(dtype).removeprefix("torch."),
        )
    return Ceilings(
        flops=2.0 * size**3 / product.least,
        bandwidth=2.0 * copied / copy.least,
        dtype=str(dtype).removeprefix("torch."),
    )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| in float64; infinite where a number is not finite."""
    found, wanted = found.detach().double(), wanted.detach().double()
    error = (found - wanted).norm() / wanted.norm().clamp(min=1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, with which software and commit."""
    found: dict[str, Any] = {
        "device": "cpu",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "sources": sources(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory_bytes"] = properties.total_memory
        found["processors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def sources() -> str:
    """A hash of the code that is measured, and that measures."""
    digest = hashlib.sha256()
    for folder in ("kernels", "allmem_hf", "allmem_megatron", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The checkout's commit, or "unknown" outside of one."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return asked.stdout.strip() if asked.returncode == 0 else "unknown"
