"""What the machine does while a stage runs: `system/STAGE.jsonl`, a line every few seconds.

A thread of rank 0 writes it, so the training loop pays nothing but the thread's share of a core.
Names begin with `system/`, which MLflow shows under "System metrics". GPUs are those of rank 0's
machine; their numbers need the package `nvidia-ml-py` (extra `gpu`), without which only PyTorch's
own memory is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.metrics_log import MetricsLog, read_lines

SYSTEM_FOLDER = "system"
"""Folder in run.dir; not the stage's own, which an export would ship."""

_GB = 1e9


class SystemSampler:
    """Writes a line of system metrics every `interval_s` seconds until it is stopped."""

    def __init__(self, path: Path, *, interval_s: float) -> None:
        """Args: path: the file; interval_s: seconds between two lines."""
        self._log = MetricsLog(path)
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        self._folder = path.parents[1]
        self._process = psutil.Process()
        self._gpus = _nvml_handles()
        self._before: tuple[float, Any, Any] | None = None
        self.error: Exception | None = None

    def start(self) -> None:
        """Begin; numbers go on after those of an earlier process."""
        self._thread.start()

    def stop(self) -> None:
        """Write a last line and end."""
        self._stop.set()
        self._thread.join(5.0)

    def _work(self) -> None:
        try:
            lines = read_lines(self._log.path)
            number = max((line["step"] for _, line in lines), default=-1) + 1
            psutil.cpu_percent()  # the first call of each only begins the measurement
            self._process.cpu_percent()
            self._sample()
            while not self._stop.wait(self._interval_s):
                self._log.write(number, self._sample())
                number += 1
            self._log.write(number, self._sample())
        except Exception as error:  # noqa: BLE001 - the shipper tells it; it must not stop a run
            self.error = error
        finally:
            self._log.close()

    def _sample(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/process_cpu_percentage": self._process.cpu_percent(),
            "system/process_memory_gb": self._process.memory_info().rss / _GB,
            "system/memory_used_gb": (memory.total - memory.available) / _GB,
            "system/memory_available_gb": memory.available / _GB,
            "system/disk_available_gb": disk.free / _GB,
            **self._rates(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            values["system/gpu_torch_memory_gb"] = torch.cuda.memory_allocated() / _GB
            values["system/gpu_torch_memory_peak_gb"] = torch.cuda.max_memory_allocated() / _GB
        for index, handle in enumerate(self._gpus):
            values |= {f"system/gpu_{index}_{k}": v for k, v in _nvml_values(handle).items()}
        return values

    def _rates(self) -> dict[str, float]:
        """Megabytes a second over the network since the last line."""
        now, network = time.monotonic(), psutil.net_io_counters()
        before, self._before = self._before, (now, network.bytes_recv, network.bytes_sent)
        if before is None:
            return {}
        seconds = max(now - before[0], 1e-3)
        return {
            "system/network_receive_mb_per_s": (network.bytes_recv - before[1]) / 1e6 / seconds,
            "system/network_transmit_mb_per_s": (network.bytes_sent - before[2]) / 1e6 / seconds,
        }


def _nvml_handles() -> list[Any]:
    """NVML's handles of this machine's GPUs; none without a GPU or without the package."""
    if not torch.cuda.is_available():
        return []
    try:
        import pynvml
    except ImportError:
        return []
    pynvml.nvmlInit()
    return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]


def _nvml_values(handle: Any) -> Mapping[str, float]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "memory_used_gb": memory.used / _GB,
        "power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature_celsius": float(
            pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        ),
    }
