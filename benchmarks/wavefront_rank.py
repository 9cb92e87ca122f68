"""One rank of benchmarks.wavefront: forward and backward passes of a model, with a trace.

Called as `python -m benchmarks.wavefront_rank CONFIG.json OUT.json` under RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. Every pass is a list of marks in the order in which the rank passed
them, each with the wall clock (the same one for all ranks of a machine) and the CPU time of the
rank's thread, which neither waiting nor another process's turn on the core adds to.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allmem_megatron import exchange
from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.memory import MemoryBranch
from allmem_megatron.model import AllMemGPTModel, build_model
from allmem_megatron.parallel import destroy_model_parallel, init_model_parallel

marks: list[dict[str, Any]] = []


def mark(*names: object) -> None:
    """Notes that the rank has come to the place that `names` tell."""
    marks.append({"name": names, "wall": time.perf_counter(), "cpu": time.thread_time()})


class Mark(torch.autograd.Function):
    """Identity that marks both passes."""

    @staticmethod
    def forward(ctx: Any, layer: int, place: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.names = (layer, place)
        mark("forward", layer, place)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        mark("backward", *ctx.names)
        return None, None, *grads


def instrument(model: AllMemGPTModel) -> None:
    """Marks the start and the end of every layer and of its memory's scan, in both passes."""
    for number, layer in enumerate(model.decoder.layers):

        def begin(_: Any, args: Any, kwargs: dict[str, Any], number: int = number) -> Any:
            x = kwargs.pop("hidden_states")
            return args, {"hidden_states": Mark.apply(number, "start", x)[0], **kwargs}

        def end(_: Any, __: Any, out: Any, number: int = number) -> Any:
            return (*Mark.apply(number, "end", out[0]), *out[1:])

        layer.register_forward_pre_hook(begin, with_kwargs=True)
        layer.register_forward_hook(end)
        branch = layer.self_attention.memory
        assert isinstance(branch, MemoryBranch)
        inner = branch._scan

        def scan(streams: Any, *rest: Any, number: int = number, inner: Any = inner) -> Tensor:
            streams = Mark.apply(number, "scan", *streams)
            return Mark.apply(number, "scanned", inner(streams, *rest))[0]

        branch._scan = scan  # type: ignore[method-assign]


def one_pass(model: AllMemGPTModel, config: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A forward and a backward pass; all ranks start together.

    `core_share` is the rank's CPU time over the time in which it did not wait for other ranks, the
    least of all ranks: well below 1, other processes had their cores.
    """
    settings = MixerSettings(
        mode="allmem",
        window_size=config["window_size"],
        num_sinks=config["num_sinks"],
        chunk_size=config["chunk_size"],
    )
    model.zero_grad(set_to_none=True)
    marks.clear()
    exchange.drain()
    exchange.trace = []
    dist.barrier()
    mark("begin")
    cp_mode = config["mode"] if config["ranks"] > 1 else None
    with model.mixer(settings):
        hidden = model.hidden_states(tokens, cp_mode=cp_mode)
    mark("between")
    hidden.float().square().mean().backward()
    mark("done")
    waits = [event for event in exchange.trace if event.name.startswith(("wait", "all-to-all"))]
    exchange.trace = None
    busy = marks[-1]["wall"] - marks[0]["wall"] - sum(stop - start for _, start, stop in waits)
    had = torch.tensor((marks[-1]["cpu"] - marks[0]["cpu"]) / busy)
    dist.all_reduce(had, dist.ReduceOp.MIN)
    return {"marks": list(marks), "waits": waits, "core_share": float(had)}


def wait_for_idle(share: float, patience: float) -> float:
    """Rank 0 waits until the machine's cores were idle for `share` of half a second.

    The others wait for it at the start of the pass. Gives back how many of the seconds of
    `patience` are left; nothing is waited for where there are none, or no /proc/stat (Linux).
    """
    path = Path("/proc/stat")
    begin = time.monotonic()
    while dist.get_rank() == 0 and path.exists() and time.monotonic() - begin < patience:
        first, second = (_cpu_ticks(path, pause) for pause in (0.0, 0.5))
        if second[0] - first[0] >= share * (second[1] - first[1]):
            break
    return patience - (time.monotonic() - begin)


def _cpu_ticks(path: Path, pause: float) -> tuple[int, int]:
    """After a pause, (idle, all) ticks of all cores since the machine started."""
    time.sleep(pause)
    ticks = [int(word) for word in path.read_text(encoding="utf-8").splitlines()[0].split()[1:]]
    return ticks[3] + ticks[4], sum(ticks)


def num_quiet(config: dict[str, Any], passes: list[dict[str, Any]]) -> int:
    """Passes after warming up in which every rank had a core while it computed."""
    return sum(one["core_share"] >= config["quiet"] for one in passes[config["warmup"] :])


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    init_model_parallel(cp=config["ranks"])
    base = BaseModelConfig(family="qwen3", qk_norm=True, vocab_size=256, **config["base"])
    memory = MemoryConfig(eta_init=0.01, **config["memory"])
    model = build_model(base, branch="allmem", memory=memory, seed=1)
    with torch.no_grad():
        for mixer in model.mixers():
            if mixer.memory is not None:
                mixer.memory.alpha.fill_(0.1)
    instrument(model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, 256, (1, config["tokens_per_rank"]), generator=generator)
    passes: list[dict[str, Any]] = []
    patience = config["patience_s"]
    while len(passes) < config["most_passes"] and num_quiet(config, passes) < config["repeats"]:
        patience = wait_for_idle(config["idle"], patience)
        passes.append(one_pass(model, config, tokens))
        if dist.get_rank() == 0 and len(passes) % 10 == 0:
            print(f"{len(passes)} passes, {num_quiet(config, passes)} undisturbed", flush=True)
    found: list[Any] = [None] * config["ranks"]
    dist.all_gather_object(found, passes[config["warmup"] :])
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
    exchange.drain()
    dist.barrier()
    destroy_model_parallel()


if __name__ == "__main__":
    main()
