"""The loop that all training stages share: batches, steps, metrics, checkpoints, resuming.

All that a step does is decided by configuration, seed, step, loader state, weights and moments, and
a checkpoint holds the last four, so a killed run goes on as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from allmem_megatron.config import MixerSettings
from data_prep.loader import Batch, ShardLoader
from pipeline.batches import MicroBatch, split_batch, split_over_ranks
from pipeline.console import Advance
from pipeline.context import StageContext
from pipeline.distributed import on_main, seed_everything
from pipeline.engine import Engine
from pipeline.flops import step_flops
from pipeline.held_out_loss import HeldOutLoss
from pipeline.models import check_length, choose_dtype
from pipeline.objectives import Objective
from pipeline.peak import peak_flops
from pipeline.retention import HELD_OUT, TRAINING, Retention
from pipeline.saving import Saver
from pipeline.schedule import phase_seed, step_seed, wsd_lr
from pipeline.schema import RunConfig
from pipeline.spikes import StepRecord
from pipeline.survival import StopRequested, stop, stop_if_asked
from pipeline.train_schema import TrainSettings
from pipeline.watchdog import note_step, watching

MEMORY_STATISTICS_EVERY = 20
"""Lines of `metrics.jsonl` between those with the memory's statistics."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training stage adds to the shared loop."""

    objective: Objective
    """The model and its loss."""
    trained: dict[str, nn.Parameter]
    """Parameters to train by the model's own names."""
    settings: TrainSettings
    """Steps, batch, schedule, checkpoints."""
    mixer_of_step: Callable[[int], MixerSettings]
    """The student's mixer at each step."""
    loss_beyond_window: bool = False
    """Only positions count that have tokens of their document outside the step's window."""


def train(config: RunConfig, context: StageContext, plan: Plan) -> None:
    """Train until `steps`, from the newest checkpoint if there is one.

    Raises:
        ValueError: the batch does not split over the ranks, or the checkpoint is of another
            configuration.
        StopRequested: SIGTERM or SIGUSR1 came; the state is on disk.
        FloatingPointError: too many steps in a row were not finite.
    """
    _Trainer(config, context, plan).run()


class _Trainer:
    def __init__(self, config: RunConfig, context: StageContext, plan: Plan) -> None:
        self.config, self.context, self.plan = config, context, plan
        self.settings = plan.settings
        self.model = plan.objective.model
        settings = plan.settings
        self.phases = [settings.of_phase(i) for i in range(max(len(settings.phases), 1))]
        self.splits = split_over_ranks(context.section, self.phases, context.ranks.dp_size)
        self._enter_phase(settings.phase_at(0))
        self.trains_base = any(".memory." not in name for name in plan.trained)
        stored = self.loader.manifest.seq_length
        check_length(context.section, settings, stored, self.model.base_config)
        self.engine = Engine(
            plan.objective,
            plan.trained,
            ranks=context.ranks,
            optim=config.optim,
            zero_stage=config.parallel.zero_stage,
            dtype=choose_dtype(config.parallel, context.device),
            micro_batch_size=self.splits[0].micro_batch_size,
            num_micro_batches=self.splits[0].num_micro_batches,
        )
        self.saver = Saver(
            context,
            self.model,
            plan.trained,
            self.engine,
            retention=Retention(
                keep_last=settings.keep_last,
                keep_best=settings.keep_best,
                metric=HELD_OUT if settings.eval_every else TRAINING,
            ),
            asynchronous=config.run.async_checkpoints,
        )
        self.held_out = None
        if settings.eval_every:
            mode = plan.mixer_of_step(0).mode
            self.held_out = HeldOutLoss(context, settings, config.mixer, mode)
        self.peak = peak_flops(
            context.device,
            choose_dtype(config.parallel, context.device),
            world_size=context.ranks.world_size,
        )
        self.step = self.tokens = self.loss_tokens = 0
        self.record = StepRecord(context, config.run)
        self.put_off = False

    def _enter_phase(self, number: int) -> None:
        """Load what phase `number` trains on, from its first sample on."""
        self.phase = number
        settings, split = self.phases[number], self.splits[number]
        self.loader = ShardLoader(
            self.context.data_dir,
            split="train",
            batch_size=split.micro_batch_size * split.num_micro_batches,
            seed=phase_seed(self.config.run.seed, number),
            dp_rank=self.context.ranks.dp_rank,
            dp_size=self.context.ranks.dp_size,
            weights=settings.weights or None,
            weights_key=self._weights_key(number),
        )
        self.length = settings.seq_length or self.loader.manifest.seq_length

    def _weights_key(self, number: int) -> str:
        """The setting that a phase's weights come from."""
        phases = self.settings.phases
        own = bool(phases) and phases[number].weights is not None
        return f"{self.context.section}.{f'phases[{number}].' if own else ''}weights"

    def run(self) -> None:
        self._resume()
        on_main(self.context.ranks, lambda: self.context.metrics.truncate_after(self.step))
        title = f"{self.context.entry}:"
        with (
            watching(enabled=self.context.ranks.world_size > 1),
            self.context.reporter.progress(title, self.settings.steps) as advance,
        ):
            stop.rescue = self.saver.salvage
            try:
                stop_if_asked(self.context.ranks, f"{self.context.entry} stopped")
                self._loop(advance)
                self.saver.wait()
                after = f"{self.context.entry} stopped after step {self.step}"
                stop_if_asked(self.context.ranks, after)  # the next stages are not to begin
            except BaseException:
                self.saver.salvage()
                raise
            finally:
                stop.rescue = None
                self.engine.close()
                self.context.metrics.close()
                self.record.close()

    def _resume(self) -> None:
        saved = self.saver.resume()
        if saved is None:
            self.record.start(None, 0)
            return
        self.step = saved.step
        self.tokens = int(saved.state["tokens"])
        self.loss_tokens = int(saved.state["loss_tokens"])
        self._enter_phase(int(saved.state["phase"]))
        self.loader.load_state_dict(saved.state["loader"])
        self.record.start(saved.state.get("record"), self.step)
        name = saved.path.name
        self.context.say(f"{self.context.entry}: going on after step {self.step} ({name})")

    def _loop(self, advance: Advance) -> None:
        steps, log_every = self.settings.steps, self.settings.log_every
        last_time, last_tokens, lines, flops = time.perf_counter(), self.tokens, 0, 0.0
        while self.step < steps:
            if (phase := self.settings.phase_at(self.step)) != self.phase:
                self._enter_phase(phase)
            lr = wsd_lr(self.step, self.settings)
            seed_everything(step_seed(self.config.run.seed, self.step, self.context.ranks.dp_rank))
            note_step(self.step + 1)
            batch = next(self.loader)
            mixer = self.plan.mixer_of_step(self.step)
            micro_batches = self._micro_batches(batch, mixer)
            last = self.step + 1 == steps
            logged = (self.step + 1) % log_every == 0 or last
            spread = logged and (lines % MEMORY_STATISTICS_EVERY == 0 or last)
            with self.plan.objective.active(mixer), self.model.noting_spread(spread):
                result = self.engine.train_step(micro_batches, lr=lr)
            num_tokens = sum(b.tokens.numel() for b in micro_batches) * self._replicas
            self.step += 1
            self.tokens += num_tokens
            self.loss_tokens += result.loss_tokens
            wrong, stopping = self.record.take(
                self.step,
                phase=self.phase,
                loss=result.loss,
                grad_norm=result.grad_norm,
                skipped=result.skipped,
                documents=batch.meta,
                stop=stop.requested,
            )
            if not result.skipped:
                self.saver.note_loss(result.loss, result.loss_tokens)
            flops += self._flops(mixer, num_tokens, result.loss_tokens)
            values: dict[str, Any] = {}
            if logged or wrong:
                now = time.perf_counter()
                values = {
                    "tokens": self.tokens,
                    "loss_tokens": self.loss_tokens,
                    "train/loss": result.loss,
                    "train/grad_norm": result.grad_norm,
                    "train/lr": lr,
                    "tokens_per_s": (self.tokens - last_tokens) / (now - last_time),
                    "flops_per_s": flops / (now - last_time),
                    **self._mfu(flops / (now - last_time)),
                    **self.record.metrics(),
                    **result.metrics,
                }
                if lines % MEMORY_STATISTICS_EVERY == 0 or self.step == steps:
                    statistics = self.model.memory_statistics()
                    values.update({f"memory/{key}": value for key, value in statistics.items()})
                lines += 1
                note = f"loss {result.loss:.4f}  {values['tokens_per_s']:.0f} tokens/s"
                advance(self.step, note)
                last_time, last_tokens, flops = now, self.tokens, 0.0
            before = time.perf_counter()
            if values := values | self._held_out_loss():
                self.context.log(self.step, values)
            self.saver.poll()
            if self._saves or stopping:
                self.saver.save(self.step, self._state())
                if stopping:
                    self.saver.wait()
            self.put_off = self._due and not self._saves
            last_time += time.perf_counter() - before
            if stopping:
                raise StopRequested(
                    f"{self.context.entry} stopped after step {self.step}; the same command goes on"
                )

    @property
    def _due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.step % self.settings.checkpoint_every == 0 or self.put_off

    @property
    def _saves(self) -> bool:
        """Whether a checkpoint is written after this step: not while steps are being skipped."""
        return self.step == self.settings.steps or (self._due and not self.record.in_a_row)

    def _held_out_loss(self) -> dict[str, float]:
        """`eval/loss` where it is due: every `eval_every` steps, and to judge a checkpoint by."""
        if self.held_out is None:
            return {}
        judges = self._saves and self.settings.keep_best > 0
        if self.step % self.settings.eval_every and not judges:
            return {}
        found = self.held_out.measure(self.engine, self.plan.objective)
        self.saver.note_held_out(self.step, found[HELD_OUT])
        return found

    def _mfu(self, flops_per_s: float) -> dict[str, float]:
        """Share of the devices' peak that is used, where the peak is known."""
        return {} if self.peak is None else {"mfu": flops_per_s / self.peak}

    def _flops(self, mixer: MixerSettings, num_tokens: int, loss_tokens: int) -> float:
        return step_flops(
            self.context.name,
            self.model.base_config,
            self.model.memory_config,
            mixer,
            length=self.length,
            num_tokens=num_tokens,
            loss_tokens=loss_tokens,
            trains_base=self.trains_base,
        )

    @property
    def _replicas(self) -> int:
        return self.context.ranks.num_replicas

    def _micro_batches(self, batch: Batch, mixer: MixerSettings) -> list[MicroBatch]:
        largest, vocab_size = int(batch.tokens.max()), self.model.base_config.vocab_size
        if largest >= vocab_size:
            raise ValueError(
                f"the shards hold token {largest}, the model's vocab_size is {vocab_size}; set "
                "data.tokenizer to the model's own and prepare again"
            )
        split = split_batch(
            batch,
            self.splits[self.phase].micro_batch_size,
            self.phases[self.phase].seq_length,
            self.context.section,
        )
        if self.plan.loss_beyond_window:
            split = [part.beyond(mixer.window_size) for part in split]
        ranks = self.context.ranks
        return [part.shard(ranks.cp_rank, ranks.cp).to(self.context.device) for part in split]

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and moments."""
        return {
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "phase": self.phase,
            "record": self.record.state_dict(),
            "loader": self.loader.state_dict(),
            "config": dict(self.context.fingerprint),
            "commit": self.context.commit,
        }
