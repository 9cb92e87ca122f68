"""Devices that a plan can be for. Numbers are the makers' data sheets', dense, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9
"""Data sheets and `plan.*_gb` count in powers of ten."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device as its data sheet has it."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 FLOP/s (float32 for the CPU)."""
    bandwidth: float
    """Memory, bytes/s."""
    link: float
    """To the other GPUs of the machine, bytes/s in one direction."""
    processors: int = 0
    """Streaming multiprocessors."""
    launch_s: float = 4e-6
    """Seconds that starting one kernel takes: the least time of an operation, however small."""
    device: str = "cuda"

    @property
    def dtype(self) -> str:
        """What `parallel.dtype=auto` comes to there."""
        return "bfloat16" if self.device == "cuda" else "float32"


def _gib(number: float) -> float:
    return number * 2**30


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # Memory is what the driver offers on cards sold as 80 GB and so on.
        Gpu(
            name="h100",
            memory=_gib(79.1),
            flops=989e12,
            bandwidth=3.35e12,
            link=450e9,
            processors=132,
        ),
        Gpu(
            name="h200",
            memory=_gib(139.8),
            flops=989e12,
            bandwidth=4.8e12,
            link=450e9,
            processors=132,
        ),
        Gpu(
            name="b200",
            memory=_gib(178.4),
            flops=2250e12,
            bandwidth=8.0e12,
            link=900e9,
            processors=148,
        ),
        Gpu(
            name="a100-80gb",
            memory=_gib(79.1),
            flops=312e12,
            bandwidth=2.04e12,
            link=300e9,
            processors=108,
        ),
        Gpu(
            name="a100-40gb",
            memory=_gib(39.4),
            flops=312e12,
            bandwidth=1.55e12,
            link=300e9,
            processors=108,
        ),
        Gpu(
            name="l40s",
            memory=_gib(44.4),
            flops=362e12,
            bandwidth=0.864e12,
            link=32e9,
            processors=142,
        ),
        Gpu(
            name="rtx4090",
            memory=_gib(23.6),
            flops=165e12,
            bandwidth=1.01e12,
            link=16e9,
            processors=128,
        ),
        # One core of a server; memory is what the machine has for one rank.
        Gpu(
            name="cpu",
            memory=16 * GB,
            flops=60e9,
            bandwidth=10e9,
            link=5e9,
            launch_s=5e-6,
            device="cpu",
        ),
    )
}
"""By the name that `plan.gpu` takes."""
