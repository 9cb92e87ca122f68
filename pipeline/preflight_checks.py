"""The single questions of `pipeline.preflight`; each answers with lines that say what is wrong."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from pipeline.config import PROJECT_ROOT, split_entry
from pipeline.preflight_place import Place
from pipeline.schema import TRAINING_STAGES, RunConfig

SCRATCH_GB = 1.0
"""Room that each node's scratch (TMPDIR) must have: caches of compiled kernels, samples."""
RUN_DIR_GB = 1.0
"""Room in run.dir beside what is counted: metrics, reports, MLflow."""
FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free; less means that another process is on it."""
REDUCE_TIMEOUT_S = 15
"""Seconds that the ranks have to meet, and an all-reduce to come back."""
_PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "triton")
_NUMBERS = 1 << 20


def import_packages(place: Place) -> None:
    """What the checks import, beforehand; what cannot be imported they tell."""
    with contextlib.suppress(ImportError, OSError):
        if place.rank == 0:
            importlib.import_module("pipeline.planning.plan")
        elif place.world_size > 1:
            importlib.import_module("pipeline.distributed")


def gpu_problems(config: RunConfig, place: Place) -> list[str]:
    """Are there GPUs if Slurm gave some; is this task's free, and does it calculate?"""
    device = config.parallel.device
    if device == "cpu" or config.stage.name == "prepare":
        return []
    import torch

    asked = int(os.environ.get("SLURM_GPUS_ON_NODE", "0") or 0)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built = f"torch {torch.__version__}"
    if seen == 0 and (asked or device == "cuda"):
        return [
            f"Slurm gave {asked} GPU(s) but PyTorch sees none ({built}); look at nvidia-smi there, "
            "install a CUDA build of torch, or set parallel.device=cpu"
        ]
    if seen == 0:
        return []
    index = place.local_rank % seen
    try:
        torch.cuda.set_device(index)
        free, total = torch.cuda.mem_get_info()
        ones = torch.ones(256, 256, device="cuda")
        result = float((ones @ ones).sum())
    except RuntimeError as error:
        return [f"GPU {index} does not calculate: {' '.join(str(error).split())[:200]}"]
    problems = []
    if result != 256.0**3:
        problems.append(f"GPU {index} calculates wrongly: {result} instead of {256.0**3}")
    if free < FREE_SHARE * total:
        gib = 2**30
        problems.append(
            f"GPU {index} has {free / gib:.1f} of {total / gib:.1f} GiB free: another process is "
            "on it"
        )
    return problems


def gpu_identity(config: RunConfig, place: Place) -> str:
    """What tells this task's GPU from the others of its node; empty without one."""
    if config.parallel.device == "cpu" or config.stage.name == "prepare":
        return ""
    import torch

    if not torch.cuda.is_available():
        return ""
    index = place.local_rank % torch.cuda.device_count()
    return str(torch.cuda.get_device_properties(index).uuid)


def room_problems(place: Place) -> list[str]:
    """Is the node's scratch writable, with room?"""
    if place.local_rank:
        return []
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return [f"scratch {folder} is not writable: {error}; set ALLMEM_SCRATCH"]
    free = shutil.disk_usage(folder).free
    if free < SCRATCH_GB * 1e9:
        return [f"scratch {folder} has {free / 1e9:.2f} GB free, less than {SCRATCH_GB:g}"]
    return []


def versions(config: RunConfig, place: Place) -> dict[str, str]:
    """What must be the same on all nodes; asked of one task of each."""
    if place.local_rank:
        return {}
    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["project"] = str(PROJECT_ROOT)
    if config.parallel.device != "cpu" and config.stage.name != "prepare":
        import torch

        if torch.cuda.is_available():
            found["GPU"] = torch.cuda.get_device_name()
            found["CUDA"] = str(torch.version.cuda)
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
            driver = Path("/proc/driver/nvidia/version")
            if driver.is_file():
                number = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text())
                found["driver"] = number.group() if number else "unknown"
    return found


def recipe_problems(config: RunConfig, place: Place) -> list[str]:
    """What a run would say to the recipe on so many ranks, whether it fits, and room in run.dir."""
    from pipeline.models import check_base

    try:
        check_base(config)
        if config.stage.name in ("prepare", "plan") or not _training(config):
            return room_in_run_dir(config, needed=0.0)
        return _plan_problems(config, place)
    except ValueError as error:
        return [f"the recipe is refused: {' '.join(str(error).split())}"]


def _training(config: RunConfig) -> list[str]:
    """Training entries of this call that are not complete."""
    from pipeline.context import DONE_FILE, folder_name

    wanted = config.stages if config.stage.name == "all" else (config.stage.name,)
    run_dir = Path(config.run.dir)
    return [
        entry
        for entry in wanted
        if split_entry(entry)[0] in TRAINING_STAGES
        and not (run_dir / folder_name(entry) / DONE_FILE).is_file()
    ]


def _plan_problems(config: RunConfig, place: Place) -> list[str]:
    """The checks of `stage=plan`, for the ranks and the GPU that are here.

    Raises:
        ValueError: a layout that a run would refuse.
    """
    import torch

    from pipeline.models import base_config, choose_dtype
    from pipeline.planning.estimate import estimate_memory
    from pipeline.planning.layouts import check, configured
    from pipeline.planning.parameters import parameters
    from pipeline.planning.work import find_work

    cuda = torch.cuda.is_available() and config.parallel.device != "cpu"
    plan = replace(config.plan, num_gpus=place.world_size, stage=None)
    plan = plan if cuda else replace(plan, gpu="cpu")
    stages = tuple(dict.fromkeys((*config.stages, *_training(config))))
    config = replace(config, plan=plan, stages=stages)
    device = torch.device("cuda" if cuda else "cpu")
    dtype = str(choose_dtype(config.parallel, device)).removeprefix("torch.")
    problems, needed = [], 0.0
    for work in find_work(config, base_config(config)):
        if work.entry not in _training(config):
            continue
        layout = configured(config, work)
        splits = check(config, work, layout)
        trained = sum(kind.count for kind in parameters(work) if kind.trained)
        kept = work.settings.keep_last + work.settings.keep_best + 1
        needed += 12.0 * trained * kept  # float32 weights and two moments
        if cuda:
            memory = estimate_memory(work, layout, splits, plan=plan, dtype=dtype)
            capacity = torch.cuda.get_device_properties(0).total_memory
            if memory.total > capacity:
                problems.append(
                    f"{work.entry} needs {memory.total / 2**30:.1f} GiB a rank by stage=plan, this "
                    f"GPU has {capacity / 2**30:.1f}; python -m pipeline.run stage=plan … shows "
                    "layouts that fit"
                )
    return problems + room_in_run_dir(config, needed=needed)


def room_in_run_dir(config: RunConfig, *, needed: float) -> list[str]:
    """Is there room for so many bytes of checkpoints?"""
    free = shutil.disk_usage(config.run.dir).free
    wanted = needed + RUN_DIR_GB * 1e9
    if free < wanted:
        return [
            f"run.dir={config.run.dir} has {free / 1e9:.1f} GB free; checkpoints and the rest need "
            f"{wanted / 1e9:.1f}; free space, lower keep_last or set ALLMEM_RUNS"
        ]
    return []


def all_reduce(config: RunConfig, place: Place) -> str | None:
    """Let all ranks meet as a run does, and sum numbers; what is wrong, or None."""
    import torch
    import torch.distributed as dist

    from pipeline.distributed import init_distributed

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        ranks = init_distributed(device=config.parallel.device, timeout_s=REDUCE_TIMEOUT_S)
        numbers = torch.full((_NUMBERS,), float(place.rank + 1), device=ranks.device)
        dist.all_reduce(numbers)
        low, high = float(numbers.min()), float(numbers.max())
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        return f"no all-reduce with the other ranks (rank 0 at {where}): {text}"
    right = place.world_size * (place.world_size + 1) / 2
    if not (math.isclose(low, right) and math.isclose(high, right)):
        return f"an all-reduce gave {low} to {high} instead of {right}"
    return None
