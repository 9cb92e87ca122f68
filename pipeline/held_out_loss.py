"""The loss on held-out samples while training goes on: `eval/loss`.

`eval_batches * batch_size` samples, spread evenly over the eval split so that every source has its
share, always the same ones. Each is a forward pass of its own and ends in a sum of its own; the
sums are added in one order, so the mean does not depend on the number of data-parallel ranks.
The stage's own loss is measured: with the window, sinks and chunks that the recipe evaluates and
exports (`mixer`), not with those drawn for a step.
"""

from __future__ import annotations

import math

from allmem_megatron.config import MixerSettings
from data_prep.loader import ShardLoader, collate
from pipeline.batches import MicroBatch, split_batch
from pipeline.context import StageContext
from pipeline.distributed import sum_over_ranks
from pipeline.engine import Engine
from pipeline.objectives import Objective
from pipeline.schema import MixerConfig
from pipeline.train_schema import TrainSettings


class HeldOutLoss:
    """Measures a training stage's loss on samples that it does not train on.

    Args:
        context: the stage.
        settings: its section.
        mixer: the recipe's window, sinks and chunks.
        mode: what every layer computes in training, `full`, `allmem`, `mamba2` or `align`.

    Raises:
        ValueError: the shards have no held-out samples.
    """

    def __init__(
        self, context: StageContext, settings: TrainSettings, mixer: MixerConfig, mode: str
    ) -> None:
        self._ranks, self._name = context.ranks, context.name
        try:
            self._loader = ShardLoader(context.data_dir, split="eval", batch_size=1, shuffle=False)
        except ValueError as error:
            raise ValueError(
                f"{context.name}.eval_every={settings.eval_every} needs held-out samples: {error}; "
                f"set data.eval_samples and prepare again, or {context.name}.eval_every=0"
            ) from error
        last = settings.of_phase(max(len(settings.phases) - 1, 0))
        self._length = last.seq_length
        available = self._loader.num_samples
        count = min(settings.eval_batches * settings.batch_size, available)
        self._numbers = [place * available // count for place in range(count)]
        self._mixer = MixerSettings(mode="full")
        if mode != "full":
            self._mixer = MixerSettings(
                mode=mode,
                window_size=mixer.window_size,
                num_sinks=mixer.num_sinks,
                chunk_size=mixer.chunk_size,
            )

    def measure(self, engine: Engine, objective: Objective) -> dict[str, float]:
        """Means over the held-out loss tokens, `eval/loss` first; every rank calls it.

        Returns:
            the same numbers on every rank.

        Raises:
            ValueError: the samples have no loss token.
        """
        ranks, count = self._ranks, len(self._numbers)
        tokens = [0.0] * count
        sums: dict[str, list[float]] = {}
        with objective.active(self._mixer):
            for turn in range(-(-count // ranks.dp_size)):  # as many on all ranks: ZeRO-3 gathers
                place = turn * ranks.dp_size + ranks.dp_rank
                batch = self._batch(min(place, count - 1))
                found = engine.measure(batch)
                counts = place < count and ranks.tp_rank == 0  # tensor-parallel ranks: all the same
                tokens[min(place, count - 1)] += counts * objective.loss_count(batch)
                for name, value in found.items():
                    values = sums.setdefault(name, [0.0] * count)
                    values[min(place, count - 1)] += value if counts else 0.0
        flat = [number for values in (tokens, *sums.values()) for number in values]
        flat = sum_over_ranks(flat, ranks.device)
        total, *means = (
            math.fsum(flat[first : first + count]) for first in range(0, len(flat), count)
        )
        if total == 0:
            raise ValueError(
                f"the {count} held-out samples of {self._name} have no loss token; raise "
                f"{self._name}.eval_batches, or set {self._name}.eval_every=0"
            )
        keys = [name.removeprefix("train/") for name in sums]
        return {f"eval/{key}": mean / total for key, mean in zip(keys, means, strict=True)}

    def _batch(self, place: int) -> MicroBatch:
        sample = collate([self._loader.sample(self._numbers[place])])
        (batch,) = split_batch(sample, 1, self._length, self._name)
        return batch.shard(self._ranks.cp_rank, self._ranks.cp).to(self._ranks.device)
