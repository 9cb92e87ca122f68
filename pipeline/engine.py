"""The only place that imports DeepSpeed: ZeRO around an objective, one optimizer step at a time.

The optimizer is torch's AdamW, given to DeepSpeed as the client's, so that the same update runs
with and without a GPU, and moments have the names everyone knows. The learning rate is set from
outside before each step. Full float32 weights and moments go out and come in under the model's own
parameter names, whatever the ZeRO stage and the number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.batches import MicroBatch
from pipeline.distributed import Ranks, sum_over_ranks
from pipeline.objectives import Objective
from pipeline.schema import OptimSettings

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

# DeepSpeed would compile a shared-memory all-reduce at the first start on a CPU; gloo has one.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed 0.19 calls collectives by names that PyTorch 2.13 would rather not see.
warnings.filterwarnings(
    "ignore",
    message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    category=FutureWarning,
    module=r"torch\.distributed\.c10d_logger",
)

MOMENTS = ("exp_avg", "exp_avg_sq")

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step reports."""

    loss: float
    """Mean loss over all loss tokens of the step, over all ranks."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    loss_tokens: int
    """Loss tokens of the step, over all ranks."""
    metrics: dict[str, float]
    """Further means of the same kind, by name."""
    skipped: bool = False
    """The loss or the gradient was not finite: no weight and no moment has changed."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's start-up lines are not for users; its errors are."""
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "deepspeed")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(max(level, logging.ERROR))


class Engine:
    """An objective, its optimizer, and ZeRO."""

    def __init__(
        self,
        objective: Objective,
        trained: Mapping[str, nn.Parameter],
        *,
        ranks: Ranks,
        optim: OptimSettings,
        zero_stage: int,
        dtype: torch.dtype,
        micro_batch_size: int,
        num_micro_batches: int,
    ) -> None:
        """Give the parameters to DeepSpeed.

        Args:
            objective: module whose forward gives a summed loss and further sums.
            trained: the parameters to train by name; all others are left as they are.
            ranks: this process among the others.
            optim: AdamW and clipping.
            zero_stage: 0, 1 or 2.
            dtype: float32 or bfloat16, the type of weights and activations.
            micro_batch_size: sequences of one forward pass on this rank.
            num_micro_batches: forward passes of an optimizer step on this rank.

        Raises:
            ValueError: nothing is trained, or stage 0 with bfloat16.
        """
        if not trained:
            raise ValueError("no parameter is trained; check the stage's branch and sft.train")
        if zero_stage == 0 and dtype != torch.float32:
            raise ValueError(
                f"parallel.zero_stage=0 keeps no float32 weights beside {dtype}; "
                "set parallel.zero_stage=1 or parallel.dtype=float32"
            )
        self.ranks = ranks
        self.objective = objective
        self._trained = dict(trained)
        self._zero_stage = zero_stage
        self._grad_clip = optim.grad_clip
        decayed = [p for p in trained.values() if p.ndim >= 2]
        plain = [p for p in trained.values() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        config = self._deepspeed_config(dtype, micro_batch_size, num_micro_batches)
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=objective,
                optimizer=self._adamw,
                model_parameters=list(trained.values()),
                config=config,
                dist_init_required=False,
            )
        # DeepSpeed links moments after the first parameter group's first step, when the second
        # group's do not exist yet; made now, both are linked.
        self._create_moments()

    def _deepspeed_config(
        self, dtype: torch.dtype, micro_batch_size: int, num_micro_batches: int
    ) -> dict[str, Any]:
        on_cuda = self.ranks.device.type == "cuda"
        return {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": num_micro_batches,
            "train_batch_size": micro_batch_size * num_micro_batches * self.ranks.world_size,
            # Without ZeRO DeepSpeed does not tell the norm, so `_clip` clips there.
            "gradient_clipping": self._grad_clip if self._zero_stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self._zero_stage,
                "overlap_comm": on_cuda and self.ranks.world_size > 1,
                "contiguous_gradients": self.ranks.world_size > 1,
            },
            "bf16": {"enabled": dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
            "timers": {"throughput": {"enabled": False}},
        }

    def train_step(self, batches: Sequence[MicroBatch], *, lr: float) -> StepResult:
        """Forward, backward and one AdamW step over the step's micro-batches.

        The summed losses are divided by the number of loss tokens of all micro-batches on all
        ranks. DeepSpeed averages gradients over ranks, hence the factor `world_size`.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        local_count = sum(self.objective.loss_count(batch) for batch in batches)
        count = sum_over_ranks([local_count], self.ranks.device)[0]
        if count == 0:
            raise ValueError(
                "a step has no loss token at all; check the loss masks of the shards or take a "
                "larger batch_size"
            )
        scale = self.ranks.world_size / count
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            total, extra = self._engine(batch)
            self._engine.backward(total * scale, scale_wrt_gas=False)
            loss_sum += total.detach()
            for name, value in extra.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if batch is batches[-1] and not self._zero_stage:
                grad_norm = self._clip()
            self._engine.step()
        if self._zero_stage:
            grad_norm = float(self._engine.get_global_grad_norm())
        values = torch.stack([loss_sum, *(value.float() for value in sums.values())]).tolist()
        totals = [value / count for value in sum_over_ranks(values, self.ranks.device)]
        if not (math.isfinite(totals[0]) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"the loss is {totals[0]} and the gradient norm {grad_norm}; lower the stage's lr "
                "or mixer.memory.eta_init, or set mixer.memory.clip=1, and give it another run.dir "
                "or delete the stage's folder: checkpoints go on with their own settings only"
            )
        return StepResult(
            loss=totals[0],
            grad_norm=grad_norm,
            loss_tokens=int(count),
            metrics=dict(zip(sums, totals[1:], strict=True)),
        )

    def _clip(self) -> float:
        """Clip the gradient where DeepSpeed does not; its norm before."""
        limit = self._grad_clip or math.inf
        return float(nn.utils.clip_grad_norm_(list(self._trained.values()), limit))

    def tensor(self, name: str, kind: Kind) -> Tensor:
        """One trained parameter, or a moment of it, in float32 on the CPU.

        A collective over the ranks that ZeRO splits over (DP x CP): all of them call it with the
        same arguments and get the same tensor.

        Args:
            name: of a trained parameter, as the model names it.
            kind: the float32 weight, or one of AdamW's moments.

        Returns:
            the tensor of this rank's tensor-parallel part, in the parameter's shape.
        """
        parameter = self._trained[name]
        if not self._zero_stage:
            found = parameter if kind == "weight" else self._adamw.state[parameter][kind]
        elif kind == "weight":
            found = safe_get_full_fp32_param(parameter)
        else:
            found = safe_get_full_optimizer_state(parameter, kind)
        return found.detach().float().cpu()

    def weights(self) -> dict[str, Tensor]:
        """Full float32 trained weights by parameter name; every rank must call it."""
        if not self._zero_stage:
            return {name: p.detach() for name, p in self._trained.items()}
        return {name: safe_get_full_fp32_param(p).cpu() for name, p in self._trained.items()}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Full float32 `exp_avg` and `exp_avg_sq` by parameter name; every rank must call it."""
        return {moment: self._moment(moment) for moment in MOMENTS}

    def _moment(self, moment: str) -> dict[str, Tensor]:
        if not self._zero_stage:
            return {name: self._adamw.state[p][moment] for name, p in self._trained.items()}
        return {
            name: safe_get_full_optimizer_state(p, moment).cpu()
            for name, p in self._trained.items()
        }

    def load(
        self,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Mapping[str, Tensor]],
        *,
        step: int,
    ) -> None:
        """Go on from saved weights and moments after `step` optimizer steps."""
        inner = self._adamw
        for state in inner.state.values():
            state["step"].fill_(float(step))
        device = self.ranks.device
        with torch.no_grad():
            for name, parameter in self._trained.items():
                value = weights[name].to(device)
                parameter.copy_(value)
                if not self._zero_stage:
                    for moment in MOMENTS:
                        inner.state[parameter][moment].copy_(moments[moment][name])
                    continue
                safe_set_full_fp32_param(parameter, value)
                for moment in MOMENTS:
                    safe_set_full_optimizer_state(
                        parameter, moments[moment][name].to(device), moment
                    )

    def _create_moments(self) -> None:
        """Make AdamW's state, which otherwise its first step makes, and tell ZeRO of it."""
        for group in self._adamw.param_groups:
            for tensor in group["params"]:
                self._adamw.state[tensor] = {
                    "step": torch.tensor(0.0),
                    **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
                }
        if self._zero_stage:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Free what DeepSpeed holds, so that the next stage of this process starts clean."""
        self._engine.destroy()
