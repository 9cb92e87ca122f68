"""The configuration as frozen dataclasses: what every stage gets, with its rules.

Every field is documented under it; `python -m pipeline.run --help SECTION` prints these texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from allmem_megatron.config import BaseModelConfig, MemoryConfig
from data_prep.config import PrepareConfig
from evals.config import EvalConfig

STAGES: tuple[str, ...] = (
    "prepare",
    "pretrain",
    "align",
    "convert",
    "sft",
    "evaluate",
    "export",
)
"""Stages that `stage=` knows beside `all`, in the order in which a recipe uses them."""

TRAINING_STAGES: tuple[str, ...] = ("pretrain", "align", "convert", "sft")
"""Stages that make checkpoints."""

BRANCHES: tuple[str, ...] = ("allmem", "mamba2")
"""Recurrent branches that can stand beside the window."""


def _at_least(section: str, values: dict[str, float], minimum: float) -> None:
    for name, value in values.items():
        if value < minimum:
            raise ValueError(
                f"{section}.{name}={value} must be at least {minimum}; set {section}.{name}={minimum}"
            )


def _fraction(section: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"{section}.{name}={value} must lie in [0, 1]; set {section}.{name}=0.1 for a tenth"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lives and how it is reproduced."""

    dir: str
    """Folder of everything that this run writes, one subfolder a stage; default: runs/RECIPE."""

    seed: int = 0
    """Seed of weights, data order and the random s, W, c; the same on all ranks."""

    debug: bool = False
    """Print the traceback of an error instead of its one line."""

    log_every_s: float = 10.0
    """Seconds between progress lines where the output is not a terminal."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model: either weights that exist, or the sizes of one to make."""

    path: str | None = None
    """Hugging Face folder with safetensors, or a .gguf file; relative to the working directory or
    to the project. Without it the model is made from `scratch`."""

    scratch: BaseModelConfig | None = None
    """Sizes of a model that starts from random weights; needs the stage `pretrain`."""

    embedding_std: float | None = None
    """Standard deviation of fresh embeddings in `pretrain`; default: the model's own. A tiny model
    learns exact recall only with about 1.0."""

    def __post_init__(self) -> None:
        """Check that there is one source of weights.

        Raises:
            ValueError: neither or both of `path` and `scratch` are set.
        """
        if (self.path is None) == (self.scratch is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(
                f"model has {given} of path and scratch; set exactly one: model.path=DIR for "
                "existing weights or model.scratch for a model made by stage=pretrain"
            )


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The token mixer that conversion trains and export ships."""

    branch: Literal["allmem", "mamba2"] = "allmem"
    """Recurrent branch beside the window: AllMem's memory or the Mamba-2 baseline."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Sizes and starting values of the branch."""

    window_size: int = 2048
    """W: keys that sliding-window attention sees, the query's own position included."""

    num_sinks: int = 128
    """s: first positions of a document that every query sees."""

    chunk_size: int = 1024
    """c: tokens the memory takes in by one write; at most W."""

    def __post_init__(self) -> None:
        """Check W, s and c.

        Raises:
            ValueError: a value is out of range, or c > W.
        """
        _at_least("mixer", {"window_size": self.window_size, "chunk_size": self.chunk_size}, 1)
        _at_least("mixer", {"num_sinks": self.num_sinks}, 0)
        if self.chunk_size > self.window_size:
            raise ValueError(
                f"mixer.chunk_size={self.chunk_size} exceeds mixer.window_size={self.window_size}: "
                "tokens would fall between window and memory; "
                f"set mixer.chunk_size={self.window_size} or less"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Hardware and how the work is split over it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where it is."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; `auto` is bfloat16 on CUDA, float32 on CPU. The optimizer
    keeps float32 weights and moments either way."""

    zero_stage: int = 2
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer states, 2 and gradients split over the ranks."""

    recompute: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more time."""

    num_threads: int = 0
    """CPU threads of a rank; 0 leaves PyTorch's own choice."""

    timeout_s: int = 1800
    """Seconds after which a rank that waits for the others gives up."""

    def __post_init__(self) -> None:
        """Check the ZeRO stage and the counts.

        Raises:
            ValueError: a value is out of range.
        """
        if self.zero_stage not in (0, 1, 2):
            raise ValueError(
                f"parallel.zero_stage={self.zero_stage} is not one of 0, 1, 2; "
                "set parallel.zero_stage=2"
            )
        _at_least("parallel", {"num_threads": self.num_threads}, 0)
        _at_least("parallel", {"timeout_s": self.timeout_s}, 1)


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """AdamW; the learning rate and its schedule belong to each stage."""

    beta1: float = 0.9
    """Decay of the gradient's running mean."""

    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.0
    """Decoupled decay of tensors with two or more dimensions; vectors are never decayed."""

    grad_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of range.
        """
        _fraction("optim", {"beta1": self.beta1, "beta2": self.beta2})
        _at_least("optim", {"weight_decay": self.weight_decay, "grad_clip": self.grad_clip}, 0)


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """MLflow. `metrics.jsonl` is written whatever stands here."""

    enabled: bool = True
    """Log to MLflow."""

    uri: str | None = None
    """Server or `sqlite:///FILE`; default: `mlflow.db` in run.dir."""

    experiment: str = "allmem"
    """MLflow experiment that holds the runs."""

    run_name: str | None = None
    """Name of the parent run; default: the recipe and the folder's name."""

    interval_s: float = 5.0
    """Seconds between shipments of metrics."""

    timeout_s: int = 3
    """Seconds that one request to a server may take."""

    flush_s: float = 20.0
    """Seconds that the end of a stage waits for the last metrics to be shipped."""

    def __post_init__(self) -> None:
        """Check the times.

        Raises:
            ValueError: a time is not positive.
        """
        if self.interval_s <= 0 or self.timeout_s < 1 or self.flush_s < 0:
            raise ValueError(
                f"tracking.interval_s={self.interval_s}, timeout_s={self.timeout_s} and "
                f"flush_s={self.flush_s} must be positive; leave them out for the defaults"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What all training stages share."""

    steps: int = 1000
    """Optimizer steps."""

    batch_size: int = 8
    """Sequences of one step, over all ranks."""

    micro_batch_size: int | None = None
    """Sequences of one forward pass on a rank; default: the step's whole share of the rank."""

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
    """Checkpoints kept."""

    log_every: int = 1
    """Steps between lines of `metrics.jsonl`."""

    logits_elements: int = 2**24
    """Logits held at once by the loss, tokens times vocabulary; bounds its memory."""

    def __post_init__(self) -> None:
        """Check counts and fractions.

        Raises:
            ValueError: a value is out of range, or the batch does not split.
        """
        section = SECTION_OF[type(self)]
        for name in ("steps", "batch_size", "checkpoint_every", "keep_last", "log_every"):
            _at_least(section, {name: getattr(self, name)}, 1)
        _at_least(section, {"logits_elements": self.logits_elements}, 1)
        for name in ("micro_batch_size", "seq_length"):
            if getattr(self, name) is not None:
                _at_least(section, {name: getattr(self, name)}, 1)
        if self.lr <= 0:
            raise ValueError(f"{section}.lr={self.lr} must be positive; set {section}.lr=1e-4")
        shares = {
            name: getattr(self, name)
            for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction")
        }
        _fraction(section, shares)
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
        for source, share in self.weights.items():
            if share < 0:
                raise ValueError(
                    f"{section}.weights.{source}={share} must not be negative; set it to 0 or more"
                )


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """Next-token loss on all tokens, all weights, full attention."""

    save_to: str | None = None
    """Folder that gets the finished base model as Hugging Face safetensors with its tokenizer;
    default: `pretrain/hf` in run.dir."""


@dataclass(frozen=True, kw_only=True)
class RandomMixerSettings(TrainSettings):
    """Training that draws s, W and c anew in each step (AllMem, 2602.13680, recipe), with c <= W."""

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
        _at_least(section, {"multiple_of": self.multiple_of}, 1)
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

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            ValueError: a weight is negative, or both are zero.
        """
        super().__post_init__()
        weights = {"kl_weight": self.kl_weight, "ce_weight": self.ce_weight}
        _at_least("convert", weights, 0)
        if not any(weights.values()):
            raise ValueError(
                "convert.kl_weight and convert.ce_weight are both 0, so nothing would be learned; "
                "set convert.kl_weight=1"
            )


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
    SftSettings: "sft",
}
"""Name of the section that each class describes, for messages."""


@dataclass(frozen=True, kw_only=True)
class StageChoice:
    """Which stage this call runs."""

    name: str = "all"
    """A stage, or `all` for the recipe's stages in order."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run."""

    recipe: str
    """Name of the recipe that was composed."""

    stages: tuple[str, ...]
    """Stages of the recipe in order; `convert@mamba2` is the stage with another branch."""

    stage: StageChoice = field(default_factory=StageChoice)
    """Which stage this call runs."""

    run: RunSettings
    """Folder, seed, messages."""

    model: ModelSettings
    """The base model."""

    mixer: MixerConfig = field(default_factory=MixerConfig)
    """The token mixer."""

    data: PrepareConfig
    """Documents, tokenizer and shards."""

    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """Hardware."""

    optim: OptimSettings = field(default_factory=OptimSettings)
    """AdamW."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """What `evaluate` measures."""

    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """MLflow."""

    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    """Settings of the stage `pretrain`."""

    align: AlignSettings = field(default_factory=AlignSettings)
    """Settings of the stage `align`."""

    convert: ConvertSettings = field(default_factory=ConvertSettings)
    """Settings of the stage `convert`."""

    sft: SftSettings = field(default_factory=SftSettings)
    """Settings of the stage `sft`."""

    def train_settings(self, stage: str) -> TrainSettings:
        """The section of a training stage, `convert` for example."""
        settings: Any = getattr(self, stage)
        assert isinstance(settings, TrainSettings), stage
        return settings
