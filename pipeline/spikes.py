"""Steps that went wrong: skipped because of numbers that are not finite, or with a spike of loss.

Both leave a line in `STAGE/spikes.jsonl` with the documents that the step was trained on:

    {"step": 12, "kind": "spike" | "skipped", "loss": …, "grad_norm": …, "median": …,
     "threshold": …, "documents": [{"dp_rank": 0, "row": 1, "source": "code", "ids": […]}, …]}

A loss is a spike if it exceeds `median + spike_factor · s` of the last `spike_window` finite losses
of the phase, with `s = max(1.4826 · median |loss − median|, 0.02 · |median|)`: for a normal
distribution the first is its standard deviation, and a few earlier spikes do not move it.

A skipped step changes no weight and no moment; the data goes on to the next batch. After
`run.max_skipped_steps` of them in a row training stops. While steps are being skipped, no
checkpoint is written on schedule: it would hold the weights of the last good step once more, and
push the checkpoints out that are known to be good. It is written after the next good step. Only a
request to stop, and the end of the stage, save at once; the count of skipped steps is saved too.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint import latest_checkpoint
from pipeline.context import StageContext
from pipeline.distributed import sum_over_ranks
from pipeline.metrics_log import MetricsLog
from pipeline.schema import RunSettings

SPIKES_FILE = "spikes.jsonl"
"""Record of a training stage, in its folder."""

_RELATIVE = 0.02
_SHOWN = 3
_KEPT = ("kind", "source", "ids", "offsets")  # of `meta.json`


class SpikeDetector:
    """Compares a loss with those before it."""

    def __init__(self, *, factor: float, window: int) -> None:
        """Args: factor: standard deviations above the median, 0 for never; window: losses kept."""
        self.losses: deque[float] = deque(maxlen=window)
        """The last finite ones, the newest at the end."""
        self._factor = factor
        self._least = max(5, window // 5)

    def limits(self) -> tuple[float, float] | None:
        """(median, threshold) of the losses so far; None while they are too few."""
        if not self._factor or len(self.losses) < self._least:
            return None
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return median, median + self._factor * max(deviation, _RELATIVE * abs(median))

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is far above those before it."""
        limits = self.limits()
        return limits is not None and math.isfinite(loss) and loss > limits[1]


class StepRecord:
    """What goes wrong in the steps of one training stage; the same on all ranks."""

    def __init__(self, context: StageContext, settings: RunSettings) -> None:
        """Args: context: the stage; settings: the section `run`."""
        self._context, self._settings = context, settings
        self._detector = SpikeDetector(factor=settings.spike_factor, window=settings.spike_window)
        self._log = MetricsLog(context.dir / SPIKES_FILE, enabled=context.ranks.is_main)
        self._phase = 0
        self._spike_before = False
        self.num_skipped = 0
        """Skipped steps of the stage so far."""
        self.num_spikes = 0
        """Spikes of the stage so far."""
        self.in_a_row = 0
        """Skipped steps since the last good one."""

    # --- going on ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's `state.json`."""
        return {
            "skipped": self.num_skipped,
            "spikes": self.num_spikes,
            "in_a_row": self.in_a_row,
            "phase": self._phase,
            "losses": list(self._detector.losses),
        }

    def start(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Go on from a checkpoint's state after `step`; None for a checkpoint without one."""
        if state is not None:
            self.num_skipped, self.num_spikes = int(state["skipped"]), int(state["spikes"])
            self.in_a_row, self._phase = int(state["in_a_row"]), int(state["phase"])
            self._detector.losses.extend(state["losses"])
        self._log.truncate_after(step)

    # --- a step -----------------------------------------------------------------------------------

    def take(
        self,
        step: int,
        *,
        phase: int,
        loss: float,
        grad_norm: float,
        skipped: bool,
        documents: Sequence[Mapping[str, Any]],
        stop: bool,
    ) -> tuple[bool, bool]:
        """Judge a step, and record it if it went wrong. Every rank calls it.

        Args:
            step: the step that is done, 1 for the first.
            phase: its phase; losses are compared within one.
            loss: its mean loss.
            grad_norm: of its gradient.
            skipped: whether its update was left out.
            documents: `meta.json` of this rank's samples.
            stop: whether this rank was asked to stop; ranks agree on it here, at no further cost.

        Returns:
            whether the step was recorded, and whether any rank was asked to stop.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        if phase != self._phase:
            self._phase = phase
            self._detector.losses.clear()
        limits, spike = self._detector.limits(), self._detector.is_spike(loss)
        # Replicas may round a loss differently: one that sees a spike speaks for all.
        if grad_norm < 0:  # DeepSpeed's word for one that is not finite
            grad_norm = math.nan
        flags = sum_over_ranks([float(stop), float(spike)], self._context.device)
        spike = flags[1] > 0 and not skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.num_skipped += skipped
        self.num_spikes += spike
        if math.isfinite(loss):
            self._detector.losses.append(loss)
        if skipped or spike:
            self._record(step, loss, grad_norm, None if skipped else limits, documents)
        self._spike_before = spike
        if self.in_a_row >= self._settings.max_skipped_steps:
            raise FloatingPointError(self._given_up(step, loss, grad_norm))
        return skipped or spike, flags[0] > 0

    def metrics(self) -> dict[str, int]:
        """For `metrics.jsonl`."""
        return {"skipped_steps": self.num_skipped, "loss_spikes": self.num_spikes}

    def _record(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        limits: tuple[float, float] | None,
        documents: Sequence[Mapping[str, Any]],
    ) -> None:
        median, threshold = limits if limits is not None else (math.nan, math.nan)
        used = self._of_all_ranks(documents)
        kind = "skipped" if limits is None else "spike"
        values = {"loss": loss, "grad_norm": grad_norm, "median": median, "threshold": threshold}
        self._log.write(step, {"kind": kind, **values, "documents": used})
        what = (
            f"is skipped: the loss is {loss:.4g} and the gradient norm {grad_norm:.4g}"
            if limits is None
            else f"has a loss of {loss:.4g}, above {threshold:.4g} (median {median:.4g})"
        )
        self._context.artifact(self._log.path)
        if self._spike_before and limits is not None:
            return  # the record has every step; the terminal need not
        names = ", ".join(_name(document) for document in used[:_SHOWN])
        more = f" and {len(used) - _SHOWN} more" if len(used) > _SHOWN else ""
        self._context.say(
            f"{self._context.entry}: step {step} {what}; its documents: {names}"
            f"{more} ({self._log.path})"
        )

    def _of_all_ranks(self, documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What every data-parallel rank trained on, in the order of the ranks."""
        ranks = self._context.ranks
        own = [
            {"dp_rank": ranks.dp_rank, "row": row, **{key: d[key] for key in _KEPT if key in d}}
            for row, d in enumerate(documents)
        ]
        if ranks.world_size == 1:
            return own
        parts: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(parts, own)
        of_rank = {part[0]["dp_rank"]: part for part in parts if part}
        return [document for rank in sorted(of_rank) for document in of_rank[rank]]

    def _given_up(self, step: int, loss: float, grad_norm: float) -> str:
        newest = latest_checkpoint(self._context.dir / "checkpoints")
        good = (
            f"the last good checkpoint is {newest}"
            if newest is not None
            else "there is no checkpoint yet"
        )
        return (
            f"{self.in_a_row} steps in a row up to step {step} were skipped (the loss is "
            f"{loss:.4g}, the gradient norm {grad_norm:.4g}); {good}; look at their documents "
            f"in {self._log.path}, lower the stage's lr or mixer.memory.eta_init or set "
            "mixer.memory.clip=1, and give it another run.dir or delete the stage's folder "
            "(checkpoints go on with their own settings only), or set run.max_skipped_steps higher"
        )

    def close(self) -> None:
        """Close the file."""
        self._log.close()


def _name(document: Mapping[str, Any]) -> str:
    """`code: 12, 13`: a document's source and ids as the shards have them."""
    ids = document.get("ids", [])
    shown = ", ".join(str(i) for i in ids[:_SHOWN]) + (", …" if len(ids) > _SHOWN else "")
    return f"{document.get('source', '?')} {shown}".strip()
