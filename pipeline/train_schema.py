"""Sections of the training stages: `pretrain`, `align`, `convert`, `sft`.

Every field is documented under it; `python -m pipeline.run --help SECTION` prints these texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self


def at_least(section: str, values: dict[str, float], minimum: float) -> None:
    """Refuse values below a minimum. Raises: ValueError naming the key."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(
                f"{section}.{name}={value} must be at least {minimum}; "
                f"set {section}.{name}={minimum}"
            )


def fractions(section: str, values: dict[str, float]) -> None:
    """Refuse values outside [0, 1]. Raises: ValueError naming the key."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"{section}.{name}={value} must lie in [0, 1]; set {section}.{name}=0.1 for a tenth"
            )


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """A part of a stage's steps with settings of its own; what is not set is the stage's."""

    fraction: float
    """Share of the stage's steps."""

    batch_size: int | None = None
    """Sequences of one step, over all ranks."""

    seq_length: int | None = None
    """Tokens of a sequence."""

    weights: dict[str, float] | None = None
    """Share of each source or kind."""

    sink_range: tuple[int, int] | None = None
    """Least and greatest s."""

    window_range: tuple[int, int] | None = None
    """Least and greatest W."""

    chunk_range: tuple[int, int] | None = None
    """Least and greatest c."""

    def overrides(self) -> dict[str, Any]:
        """What this phase sets, by the name of the stage's field."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "fraction"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What all training stages share."""

    steps: int = 1000
    """Optimizer steps."""

    batch_size: int = 8
    """Sequences of one step, over all ranks."""

    micro_batch_size: int | None = None
    """Sequences of one forward pass on a rank (in the first phase; the other phases take as many
    passes a step); default: the step's whole share of the rank."""

    seq_length: int | None = None
    """Tokens of a sequence; shorter than the shards' keeps the first ones. Default: the shards'."""

    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source, or of each kind (`text`, `recall`, `chat`); default: every sample of
    the shards once an epoch."""

    lr: float = 1e-4
    """Peak learning rate."""

    warmup_fraction: float = 0.1
    """Share of the steps in which the rate rises linearly."""

    decay_fraction: float = 0.2
    """Share of the steps, the last ones, in which the rate falls."""

    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    """Fall by 1 - sqrt(x) or by 1 - x, x from 0 to 1."""

    final_lr_fraction: float = 0.0
    """Rate after the fall, as a share of `lr`."""

    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always has one."""

    keep_last: int = 2
    """Newest checkpoints kept."""

    keep_best: int = 0
    """Checkpoints of the lowest loss that are kept as well, named in `checkpoints/best.json`. The
    loss is the held-out one where `eval_every` is set, else the mean over the steps since the
    checkpoint before."""

    eval_every: int = 0
    """Steps between measurements of the loss on held-out samples (`eval/loss`); 0: never."""

    eval_batches: int = 4
    """Held-out samples of a measurement, in batches of `batch_size`."""

    log_every: int = 1
    """Steps between lines of `metrics.jsonl`."""

    logits_elements: int = 2**24
    """Logits held at once by the loss, tokens times vocabulary; bounds its memory."""

    phases: tuple[PhaseSettings, ...] = ()
    """Parts of the stage one after the other, each with its data and lengths (a curriculum); the
    learning rate's schedule runs over all of them. Their fractions sum to 1."""

    def __post_init__(self) -> None:
        """Check counts and fractions.

        Raises:
            ValueError: a value is out of range, or the batch does not split.
        """
        section = SECTION_OF[type(self)]
        for name in ("steps", "batch_size", "checkpoint_every", "keep_last", "log_every"):
            at_least(section, {name: getattr(self, name)}, 1)
        at_least(section, {"logits_elements": self.logits_elements}, 1)
        at_least(section, {"eval_batches": self.eval_batches}, 1)
        for name in ("keep_best", "eval_every"):
            at_least(section, {name: getattr(self, name)}, 0)
        for name in ("micro_batch_size", "seq_length"):
            if getattr(self, name) is not None:
                at_least(section, {name: getattr(self, name)}, 1)
        if self.lr <= 0:
            raise ValueError(f"{section}.lr={self.lr} must be positive; set {section}.lr=1e-4")
        shares = {
            name: getattr(self, name)
            for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction")
        }
        fractions(section, shares)
        if self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError(
                f"{section}.warmup_fraction={self.warmup_fraction} + decay_fraction="
                f"{self.decay_fraction} exceeds 1; set {section}.decay_fraction="
                f"{round(1.0 - self.warmup_fraction, 6)} or less"
            )
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(
                f"{section}.batch_size={self.batch_size} is not a multiple of micro_batch_size="
                f"{micro}; set {section}.batch_size={-(-self.batch_size // micro) * micro}"
            )
        for number in range(len(self.phases)):
            self.of_phase(number)  # its checks name what does not fit
        if self.phases and abs(sum(phase.fraction for phase in self.phases) - 1.0) > 1e-6:
            given = [phase.fraction for phase in self.phases]
            raise ValueError(
                f"{section}.phases have the fractions {given}, which sum to {sum(given):g}; "
                "make them sum to 1"
            )
        for source, share in self.weights.items():
            if share < 0:
                raise ValueError(
                    f"{section}.weights.{source}={share} must not be negative; set it to 0 or more"
                )

    def of_phase(self, number: int) -> Self:
        """The stage's settings with what phase `number` sets; without phases they are its only one.

        Raises:
            ValueError: a share that is not positive, a setting that this stage lacks, or one that
                does not fit the others.
        """
        if not self.phases:
            return self
        section, phase = SECTION_OF[type(self)], self.phases[number]
        if not 0.0 < phase.fraction <= 1.0:
            raise ValueError(
                f"{section}.phases[{number}].fraction={phase.fraction} must lie in (0, 1]"
            )
        changes = phase.overrides()
        if unknown := sorted(set(changes) - {field.name for field in fields(self)}):
            raise ValueError(
                f"{section}.phases[{number}].{unknown[0]} has no meaning in {section}; remove it"
            )
        return replace(self, **changes, phases=())

    def phase_at(self, step: int) -> int:
        """Number of the phase that step (0 for the first) belongs to."""
        end = 0.0
        for number, phase in enumerate(self.phases[:-1]):
            end += phase.fraction
            if step < round(end * self.steps):
                return number
        return max(len(self.phases) - 1, 0)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """Next-token loss on all tokens, all weights, full attention."""

    save_to: str | None = None
    """Folder that gets the finished base model as Hugging Face safetensors with its tokenizer;
    default: `pretrain/hf` in run.dir."""


@dataclass(frozen=True, kw_only=True)
class RandomMixerSettings(TrainSettings):
    """Training that draws s, W and c anew in each step, with c <= W (AllMem, arXiv 2602.13680)."""

    sink_range: tuple[int, int] = (0, 256)
    """Least and greatest s."""

    window_range: tuple[int, int] = (512, 8192)
    """Least and greatest W."""

    chunk_range: tuple[int, int] = (512, 4096)
    """Least and greatest c; a draw above the step's W is drawn again from what fits."""

    multiple_of: int = 1
    """Drawn W and c are multiples of this."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a range is empty, or no c fits the least W.
        """
        super().__post_init__()
        section = SECTION_OF[type(self)]
        at_least(section, {"multiple_of": self.multiple_of}, 1)
        for name, minimum in (("sink_range", 0), ("window_range", 1), ("chunk_range", 1)):
            low, high = getattr(self, name)
            if not minimum <= low <= high:
                raise ValueError(
                    f"{section}.{name}=[{low},{high}] must rise from {minimum} or more; "
                    f"set {section}.{name}=[{max(low, minimum)},{max(low, high, minimum)}]"
                )
        for name in ("window_range", "chunk_range"):
            low, high = getattr(self, name)
            if -(-low // self.multiple_of) * self.multiple_of > high:
                raise ValueError(
                    f"{section}.{name}=[{low},{high}] holds no multiple of "
                    f"{section}.multiple_of={self.multiple_of}; widen it or set multiple_of=1"
                )
        step = self.multiple_of
        least_window = -(-self.window_range[0] // step) * step
        least_chunk = -(-self.chunk_range[0] // step) * step
        if least_chunk > least_window:
            raise ValueError(
                f"{section}.chunk_range starts at {least_chunk}, above the least window "
                f"{least_window}, but c <= W must hold; set {section}.chunk_range="
                f"[{least_window},{max(least_window, self.chunk_range[1])}]"
            )


@dataclass(frozen=True, kw_only=True)
class AlignSettings(RandomMixerSettings):
    """Layer-wise start of the memory: it learns what the window lacks of full attention."""


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(RandomMixerSettings):
    """Distillation of the frozen full-attention base into window + memory."""

    kl_weight: float = 1.0
    """Weight of the forward KL(teacher || student) at temperature 1."""

    ce_weight: float = 0.0
    """Weight of the next-token cross-entropy; the paper found KL alone best."""

    loss_beyond_window: bool = False
    """Count only positions that have tokens of their document outside the step's window."""

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            ValueError: a weight is negative, or both are zero.
        """
        super().__post_init__()
        section = SECTION_OF[type(self)]
        weights = {"kl_weight": self.kl_weight, "ce_weight": self.ce_weight}
        at_least(section, weights, 0)
        if not any(weights.values()):
            raise ValueError(
                f"{section}.kl_weight and {section}.ce_weight are both 0, so nothing would be "
                f"learned; set {section}.kl_weight=1"
            )


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings(ConvertSettings):
    """The second round of distillation, `convert:on_policy`: on the student's own responses."""


@dataclass(frozen=True, kw_only=True)
class SftSettings(RandomMixerSettings):
    """Next-token loss on responses, through window + memory."""

    train: Literal["memory", "all"] = "memory"
    """Train the memory alone, or the base's weights too."""


SECTION_OF: dict[type, str] = {
    TrainSettings: "train",
    RandomMixerSettings: "train",
    PretrainSettings: "pretrain",
    AlignSettings: "align",
    ConvertSettings: "convert",
    OnPolicySettings: "on_policy",
    SftSettings: "sft",
}
"""Name of the section that each class describes, for messages."""
