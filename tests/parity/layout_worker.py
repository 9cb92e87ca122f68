"""One of several ranks that train a tiny model in any layout, again and again.

python layout_worker.py; rank, world and rendezvous come by environment. Each line of its input is a
case (see `run`); rank 0 writes what came out to the case's file, and every rank answers with a line
of its own: `null`, or the error's text. Groups and processes are kept for the next case.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.convert import model_to_hf
from allmem_megatron.model import AllMemGPTModel, build_model
from allmem_megatron.parallel import init_model_parallel
from data_prep.loader import Batch
from pipeline.batches import MicroBatch, split_batch
from pipeline.distributed import Ranks, init_distributed
from pipeline.engine import Engine
from pipeline.losses import distillation_loss, next_token_loss
from pipeline.models import trained_parameters
from pipeline.objectives import Align, Distill, NextToken, Objective
from pipeline.schema import OptimSettings

VOCABULARY = 64
LR = 1e-2
OPTIM = OptimSettings(weight_decay=0.1, grad_clip=0.02, eps=1e-5)
"""eps: what is rounding in a gradient must not become a whole step of size lr by AdamW's division.
grad_clip: below every gradient here, so that the norm over all ranks shows in the weights."""


class RecordingEngine(Engine):
    """An engine that keeps the first step's gradients as the optimizer would get them."""

    gradients: dict[str, Tensor] | None = None

    def _update(self, *, loss: float) -> float:
        if self.gradients is None:
            self.gradients = {name: self.gradient(name) for name in self._trained}
        return super()._update(loss=loss)


def model_of(task: dict[str, Any], layout: dict[str, Any]) -> AllMemGPTModel:
    """The same weights in every layout; alpha and norms are not at their start."""
    base = BaseModelConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=8,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        head_dim=8,
        **task["base"],
    )
    model = build_model(
        base,
        branch=task["branch"],
        memory=MemoryConfig(memory_size=32, num_heads=4, eta_init=0.2),
        dtype=getattr(torch, task["dtype"]),
        seed=4,
        recompute=task["recompute"],
        sequence_parallel=layout["sp"],
        init_std=0.2,
        embedding_std=0.5,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "norm.weight")):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def objective_of(task: dict[str, Any], layout: dict[str, Any], model: AllMemGPTModel) -> Objective:
    options: dict[str, Any] = {
        "max_elements": 5 * VOCABULARY,  # several slices, the last one shorter
        "cp_mode": None if layout["cp"] == 1 else layout["cp_mode"],
    }
    if task["objective"] == "distill":
        return Distill(model, kl_weight=0.8, ce_weight=0.2, **options)
    kind = {"align": Align, "sft": NextToken, "pretrain": NextToken}[task["objective"]]
    return kind(model, **options)


def mixer_of(task: dict[str, Any]) -> MixerSettings:
    mode = {"align": "align", "pretrain": "full"}.get(task["objective"], task["branch"])
    sizes = {key: task[key] for key in ("window_size", "num_sinks", "chunk_size")}
    return MixerSettings(mode=mode, **sizes)


def batches_of(task: dict[str, Any], step: int, ranks: Ranks) -> list[MicroBatch]:
    """What this rank gets of a step's sequences, as the training loop makes it."""
    generator = torch.Generator().manual_seed(100 + step)
    rows, length = task["num_rows"], task["length"]
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    loss_mask = torch.rand(rows, length, generator=generator) < 0.6
    share = rows // ranks.dp_size
    mine = slice(ranks.dp_rank * share, (ranks.dp_rank + 1) * share)
    borders = None
    if task["documents"] is not None:  # lengths of each row's documents
        ends = [0]
        for row in range(mine.start, mine.stop):
            for size in task["documents"][(row + step) % len(task["documents"])]:
                ends.append(ends[-1] + size)
        borders = torch.tensor(ends, dtype=torch.int32)
    batch = Batch(tokens=tokens[mine], loss_mask=loss_mask[mine], cu_seqlens=borders, meta=[])
    micro_batch_size = max(share // task["num_micro_batches"], 1)
    return [
        part.shard(ranks.cp_rank, ranks.cp).to(ranks.device)
        for part in split_batch(batch, micro_batch_size, None, "test")
    ]


def train(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Some steps of a task in a layout; what must not depend on the layout."""
    task, layout = case["task"], case["layout"]
    model = model_of(task, layout)
    objective = objective_of(task, layout, model)
    trained = trained_parameters(model, task["train"])
    steps = [batches_of(task, step, ranks) for step in range(task["num_steps"])]
    engine = RecordingEngine(
        objective,
        trained,
        ranks=ranks,
        optim=OPTIM,
        zero_stage=layout["zero"],
        dtype=getattr(torch, task["dtype"]),
        micro_batch_size=1,
        num_micro_batches=len(steps[0]),
        persistent_elements=100,
    )
    with objective.active(mixer_of(task)):
        results = [engine.train_step(batches, lr=LR) for batches in steps]
    assert engine.gradients is not None
    out = {
        "losses": [result.loss for result in results],
        "metrics": [result.metrics for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "loss_tokens": [result.loss_tokens for result in results],
        "gradients": model_to_hf(model, engine.gradients),
        "weights": model_to_hf(model, engine.weights()),
        "model": model_to_hf(model),
        "differing_replicas": differing_replicas(engine, trained),
    }
    engine.close()
    return out


def skip(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Three steps with a bad one before the second: what it reports, changes and leaves behind."""
    task, layout = case["task"], case["layout"]
    states, engines = [], []
    for _ in range(2):
        model = model_of(task, layout)
        objective = objective_of(task, layout, model)
        engine = Engine(
            objective,
            trained_parameters(model, task["train"]),
            ranks=ranks,
            optim=OPTIM,
            zero_stage=layout["zero"],
            dtype=torch.float32,
            micro_batch_size=1,
            num_micro_batches=len(batches_of(task, 0, ranks)),
            persistent_elements=100,
        )
        engines.append(engine)
    results = []
    for number, engine in enumerate(engines):
        objective = engine.objective
        with objective.active(mixer_of(task)):
            for step in range(3):
                if step == 1 and number == 0:
                    before = state_of(engine)
                    # in one rank's tokens only: the others must come to know
                    hurt = objective.register_forward_hook(spoil(case["kind"], ranks.rank == 1))
                    results.append(engine.train_step(batches_of(task, step, ranks), lr=LR))
                    hurt.remove()
                    changed = differing(before, state_of(engine))
                results.append(engine.train_step(batches_of(task, step, ranks), lr=LR))
        states.append(state_of(engine))
        engine.close()
    mine = {
        "skipped": [result.skipped for result in results],
        "finite": [math.isfinite(result.loss) for result in results],
        "changed": changed,
        "left": differing(*states),
    }
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, mine)
    return {"ranks": everyone}


def spoil(kind: str, here: bool) -> Callable[..., Any]:
    """A hook that makes an objective's loss, or only its gradient, infinite."""

    def hook(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        total, extra = output
        if here and kind == "gradient":
            total.register_hook(lambda gradient: gradient * float("inf"))
        return (total * float("nan"), extra) if here and kind == "loss" else output

    return hook


def state_of(engine: Engine) -> dict[str, Tensor]:
    """All weights and moments of this rank's tensor-parallel part."""
    found = engine.weights()
    for moment, values in engine.moments().items():
        found.update({f"{moment}.{name}": value for name, value in values.items()})
    return found


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bits."""
    return [name for name in before if not torch.equal(before[name], after[name])]


def differing_replicas(engine: Engine, trained: dict[str, Any]) -> list[str]:
    """Parameters kept whole on tensor-parallel ranks that are not the same bits on all of them."""
    group = parallel_state.get_tensor_model_parallel_group()
    differing = []
    for name, parameter in trained.items():
        if parameter.tensor_model_parallel:
            continue
        mine = engine.tensor(name, "weight")
        copies = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(copies, mine, group=group)
        if not all(torch.equal(copy, mine) for copy in copies):
            differing.append(name)
    return differing


def losses(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Both losses in float64 with the vocabulary over the tensor-parallel ranks."""
    del ranks
    generator = torch.Generator().manual_seed(5)
    num_tokens, width = case["task"]["num_tokens"], 7
    student, teacher = torch.randn(2, num_tokens, width, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(VOCABULARY, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (num_tokens,), generator=generator)
    world = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    group = parallel_state.get_tensor_model_parallel_group() if world > 1 else None
    rows = weight.chunk(world)[rank].clone().requires_grad_()
    hidden = student.clone().requires_grad_()
    options: dict[str, Any] = {"max_elements": case["task"]["max_elements"], "tp_group": group}
    if case["task"]["objective"] == "distill":
        weights = {"kl_weight": 0.7, "ce_weight": 0.3}
        sums = distillation_loss(hidden, teacher, rows, targets, **weights, **options)
    else:
        sums = next_token_loss(hidden, rows, targets, **options)
    (2.5 * sums.total).backward()
    assert rows.grad is not None
    parts = [torch.empty_like(rows.grad) for _ in range(world)]
    dist.all_gather(parts, rows.grad, group=parallel_state.get_tensor_model_parallel_group())
    return {
        "sums": torch.stack(sums).detach(),
        "hidden": hidden.grad,
        "weight": torch.cat(parts),
    }


def run(case: dict[str, Any], world: Ranks) -> None:
    """Go over to the layout's groups and do what the case says.

    Args:
        case: `do` ("train", "losses" or "skip"), `layout` (tp, sp, cp, cp_mode, zero), `task`,
            and `path`.
        world: this process among all.
    """
    layout = case["layout"]
    ranks = world.with_layout(tp=layout["tp"], cp=layout["cp"])
    enter_layout(layout["tp"], layout["cp"])
    out = {"train": train, "losses": losses, "skip": skip}[case["do"]](case, ranks)
    if world.is_main:
        torch.save(out, case["path"])


_NO_GROUPS = {n: v for n, v in vars(parallel_state).items() if n.startswith("_") and n[1].isupper()}
_groups: dict[tuple[int, int], dict[str, Any]] = {}


def enter_layout(tp: int, cp: int) -> None:
    """Groups of the layout, made once: groups that are made anew leave hundreds of threads."""
    held = vars(parallel_state)
    if (tp, cp) not in _groups:
        held.update(copy.deepcopy(_NO_GROUPS))
        init_model_parallel(tp, cp)
        _groups[tp, cp] = {name: held[name] for name in _NO_GROUPS}
    held.update(_groups[tp, cp])


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    torch.set_num_threads(1)
    world = init_distributed(device="cpu", timeout_s=60)
    for line in sys.stdin:
        error = None
        try:
            run(json.loads(line), world)
        except Exception:  # noqa: BLE001 - the test that asked tells it
            error = traceback.format_exc()
        answers.write(json.dumps(error) + "\n")


if __name__ == "__main__":
    main()
