"""The only place that imports DeepSpeed: ZeRO around an objective, one optimizer step at a time.

The optimizer is torch's AdamW, given to DeepSpeed as the client's, so that the same update runs
with and without a GPU, and moments have the names everyone knows. The learning rate is set from
outside before each step. Full float32 weights and moments go out and come in under the model's own
parameter names, whatever the ZeRO stage and the number of ranks.

ZeRO reduces and splits over DP x CP (`pipeline.mpu`). Gradients of what tensor-parallel ranks hold
in common are already whole on each of them: the model sums them where it uses such a parameter.
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

from allmem_megatron.parallel import ensure_model_parallel
from allmem_megatron.sharding import set_part
from pipeline.adamw import MOMENTS, GuardedAdamW
from pipeline.batches import MicroBatch
from pipeline.distributed import Ranks, sum_over_ranks
from pipeline.gradients import GradientOrder, clip_gradients, fill_gradient
from pipeline.mpu import ModelParallelUnit
from pipeline.objectives import Objective
from pipeline.schema import OptimSettings
from pipeline.whole_layers import WholeLayers
from pipeline.zero import check_zero, reduce_bucket

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
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

PERSISTENT_ELEMENTS = 100_000
"""Elements up to which ZeRO-3 keeps a parameter whole on every rank: gathering it costs more."""

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


LR_FACTOR = "lr_factor"
"""Key of a parameter group: its learning rate as a multiple of the step's."""


def parameter_groups(
    trained: Mapping[str, nn.Parameter], optim: OptimSettings
) -> list[dict[str, Any]]:
    """AdamW's groups: tensors with weight decay, vectors without, alpha with a rate of its own."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decay = optim.weight_decay if parameter.ndim >= 2 else 0.0
        factor = optim.alpha_lr_factor if name.endswith(".memory.alpha") else 1.0
        groups.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, LR_FACTOR: factor}
        for (decay, factor), parameters in groups.items()
    ]


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
        persistent_elements: int = PERSISTENT_ELEMENTS,
    ) -> None:
        """Give the parameters to DeepSpeed; Megatron-Core's groups say over whom it splits them.

        Args:
            objective: module whose forward gives a summed loss and further sums.
            trained: the parameters to train by name; all others are left as they are.
            ranks: this process among the others.
            optim: AdamW and clipping.
            zero_stage: 0, 1, 2 or 3.
            dtype: float32 or bfloat16, the type of weights and activations.
            micro_batch_size: sequences of one forward pass on this rank.
            num_micro_batches: forward passes of an optimizer step on this rank.
            persistent_elements: size up to which ZeRO-3 leaves a parameter whole.

        Raises:
            ValueError: nothing is trained, or stage 0 with bfloat16.
        """
        if not trained:
            raise ValueError("no parameter is trained; check the stage's branch and sft.train")
        check_zero(zero_stage, dtype)
        ensure_model_parallel()
        mpu = ModelParallelUnit()
        self.ranks = ranks
        self.objective = objective
        self._zero_size = mpu.get_data_parallel_world_size()
        self._tp_size = mpu.get_tensor_model_parallel_world_size()
        self._tp_group = mpu.get_tensor_model_parallel_group()
        self._trained = dict(trained)
        self._zero_stage = zero_stage
        self._grad_clip = optim.grad_clip
        self._adamw = GuardedAdamW(
            parameter_groups(trained, optim),
            lr=0.0,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        config = self._deepspeed_config(
            dtype, micro_batch_size, num_micro_batches, persistent_elements
        )
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=objective,
                optimizer=self._adamw,
                model_parameters=list(trained.values()),
                config=config,
                mpu=mpu,
                dist_init_required=False,
            )
        # DeepSpeed links moments after the first parameter group's first step, when the second
        # group's do not exist yet; made now, both are linked.
        self._create_moments()
        if zero_stage and not isinstance(self._engine.optimizer, BF16_Optimizer):
            self._order_gradients()  # that one has a place for each and reduces all, in order
        self._loss_is_finite = False
        self._grad_norm = math.nan
        self._adamw.guard = self._may_update

    def _deepspeed_config(
        self,
        dtype: torch.dtype,
        micro_batch_size: int,
        num_micro_batches: int,
        persistent_elements: int,
    ) -> dict[str, Any]:
        on_cuda = self.ranks.device.type == "cuda"
        return {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": num_micro_batches,
            "train_batch_size": micro_batch_size * num_micro_batches * self._zero_size,
            # Without ZeRO DeepSpeed does not tell the norm, so `_update` clips there.
            "gradient_clipping": self._grad_clip if self._zero_stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self._zero_stage,
                "overlap_comm": on_cuda and self._zero_size > 1,
                "contiguous_gradients": self._zero_size > 1,
                "reduce_bucket_size": reduce_bucket(sum(p.numel() for p in self._trained.values())),
                "stage3_param_persistence_threshold": persistent_elements,
            },
            "bf16": {"enabled": dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
            "timers": {"throughput": {"enabled": False}},
        }

    def _order_gradients(self) -> None:
        """Let all ranks hand the same gradients to ZeRO in the same order."""
        layers = None
        if self._zero_stage == 3 and self.ranks.cp > 1:
            modules = self.objective.whole_modules()
            layers = WholeLayers(self._engine.optimizer, self._engine.module, modules)
        GradientOrder(
            self._engine,
            list(self._trained.values()),
            at_end=self.ranks.cp > 1,
            after_backward=None if layers is None else layers.finish,
        )

    def train_step(self, batches: Sequence[MicroBatch], *, lr: float) -> StepResult:
        """Forward, backward and one AdamW step over the step's micro-batches.

        The summed losses are divided by the number of loss tokens of all micro-batches on all
        ranks (tensor-parallel ranks see the same ones, which count once). Where the loss or the
        gradient is not finite, nothing is updated, on any rank, and the result says `skipped`.

        Raises:
            ValueError: the step has no loss token at all.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get(LR_FACTOR, 1.0)
        local_count = sum(self.objective.loss_count(batch) for batch in batches)
        count = self._sum([local_count])[0]
        if count == 0:
            raise ValueError(
                "a step has no loss token at all; check the loss masks of the shards, take a "
                "larger batch_size, or, with loss_beyond_window, documents longer than the window"
            )
        with self.objective.step(self._engine, batches, count):
            sums = self._accumulate(batches, count)
        totals = [value / count for value in self._sum(list(sums.values()))]
        grad_norm = self._update(loss=totals[0])
        return StepResult(
            loss=totals[0],
            grad_norm=grad_norm,
            loss_tokens=int(count),
            metrics=dict(zip(list(sums)[1:], totals[1:], strict=True)),
            skipped=not self._may_update(),
        )

    def measure(self, batch: MicroBatch) -> dict[str, float]:
        """Summed `loss`, and further sums, at this rank's tokens of a micro-batch; no gradient.

        Under ZeRO-3 a collective: every rank calls it equally often.
        """
        with torch.no_grad():
            total, extra = self._engine(batch)
        return {name: float(value) for name, value in {"loss": total, **extra}.items()}

    @property
    def num_updates(self) -> int:
        """Optimizer steps that changed weights: those that were skipped do not count."""
        return int(next(iter(self._adamw.state.values()))["step"])

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Sum over the ranks that see different tokens, the same numbers on every rank.

        Over all of them, so that what is not finite on any rank is so on each; tensor-parallel
        ranks give the same values, which count once.
        """
        return [value / self._tp_size for value in sum_over_ranks(values, self.ranks.device)]

    def _accumulate(self, batches: Sequence[MicroBatch], count: float) -> dict[str, float]:
        """Forward and backward of all micro-batches; this rank's sums, the loss first.

        DeepSpeed averages gradients over DP x CP, hence the factor of their number.
        """
        scale = self._zero_size / count
        sums: dict[str, Tensor] = {}
        for batch in batches:
            total, extra = self._engine(batch)
            self._engine.backward(total * scale, scale_wrt_gas=False)
            for name, value in {"loss": total, **extra}.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if batch is not batches[-1]:
                self._engine.step()
        values = torch.stack([value.float() for value in sums.values()]).tolist()
        return dict(zip(sums, values, strict=True))

    def _update(self, *, loss: float) -> float:
        """The optimizer's step after the last backward pass; the gradient's norm."""
        self._loss_is_finite = math.isfinite(loss)
        self._grad_norm = math.nan
        if not self._zero_stage:  # DeepSpeed does not tell a norm then, so it does not clip either
            parameters = list(self._trained.values())
            for parameter in parameters:
                fill_gradient(parameter)  # AdamW passes over what has none
            self._grad_norm = clip_gradients(parameters, self._grad_clip, group=self._tp_group)
        self._engine.step()
        if self._zero_stage:
            self._grad_norm = float(self._engine.get_global_grad_norm())
        return self._grad_norm

    def _may_update(self) -> bool:
        """Whether loss and gradient are finite; asked in the optimizer's step and after it."""
        norm = self._grad_norm
        if self._zero_stage and math.isnan(norm):  # DeepSpeed knows it, and we will soon
            norm = float(self._engine.optimizer._global_grad_norm)
        # a negative norm is DeepSpeed's word for one that is not finite
        return self._loss_is_finite and math.isfinite(norm) and norm >= 0.0

    def tensor(self, name: str, kind: Kind) -> Tensor:
        """One trained parameter, or a moment of it, in float32 on the CPU.

        A collective over the ranks that ZeRO splits over (DP x CP): all of them call it with the
        same arguments and get the same tensor.

        Args:
            name: of a trained parameter, as the model names it.
            kind: the float32 weight, or one of AdamW's moments.

        Returns:
            a copy of this rank's tensor-parallel part, in the parameter's shape.
        """
        parameter = self._trained[name]
        if not self._zero_stage:
            found = parameter if kind == "weight" else self._adamw.state[parameter][kind]
        elif kind == "weight":
            found = safe_get_full_fp32_param(parameter)
        else:
            found = safe_get_full_optimizer_state(parameter, kind)
        return found.detach().to("cpu", torch.float32, copy=True)

    def gradient(self, name: str) -> Tensor:
        """A trained parameter's gradient between the backward passes and the update, unclipped.

        Float32, of this rank's tensor-parallel part; a collective over DP x CP, as `tensor`.
        """
        parameter = self._trained[name]
        found = safe_get_full_grad(parameter) if self._zero_stage else parameter.grad
        if found is None:
            raise ValueError(f"{name} has no gradient; call it after the last backward pass")
        return found.detach().to("cpu", torch.float32, copy=True)

    def weights(self) -> dict[str, Tensor]:
        """Float32 trained weights by parameter name (see `tensor`); every rank must call it."""
        return {name: self.tensor(name, "weight") for name in self._trained}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Float32 `exp_avg` and `exp_avg_sq` by parameter name; every rank must call it."""
        kinds: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
        return {kind: {name: self.tensor(name, kind) for name in self._trained} for kind in kinds}

    def load(
        self,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Mapping[str, Tensor]],
        *,
        step: int,
    ) -> None:
        """Go on from saved weights and moments after `step` optimizer steps that changed them.

        Args:
            weights: this rank's tensor-parallel part of each trained parameter.
            moments: of the same shapes, by moment and parameter name.
            step: optimizer steps that they stand for.
        """
        for state in self._adamw.state.values():
            state["step"].fill_(float(step))
        device = self.ranks.device
        for name, parameter in self._trained.items():
            value = weights[name].to(device)
            set_part(parameter, value)
            if not self._zero_stage:
                for moment in MOMENTS:
                    self._adamw.state[parameter][moment].copy_(moments[moment][name])
                continue
            safe_set_full_fp32_param(parameter, value.float())
            for moment in MOMENTS:
                saved = moments[moment][name].to(device)
                safe_set_full_optimizer_state(parameter, saved, moment)

    def _create_moments(self) -> None:
        """Make AdamW's state, which otherwise its first step makes, and tell ZeRO of it."""
        zero = self._engine.optimizer
        if self._zero_stage == 3:
            tensors = list(zero.fp32_partitioned_groups_flat)
        else:
            tensors = [p for group in self._adamw.param_groups for p in group["params"]]
        for tensor in tensors:
            self._adamw.state[tensor] = {
                "step": torch.tensor(0.0),
                **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
            }
        if self._zero_stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Free what DeepSpeed holds, so that the next stage of this process starts clean."""
        self._engine.destroy()
