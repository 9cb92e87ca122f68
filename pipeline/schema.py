"""The configuration as frozen dataclasses: what every stage gets, with its rules.

Every field is documented under it; `python -m pipeline.run --help SECTION` prints these texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from allmem_megatron.config import BaseModelConfig, MemoryConfig
from data_prep.config import PrepareConfig
from evals.config import EvalConfig
from pipeline.collecting.settings import CollectSettings
from pipeline.planning.settings import PlanSettings
from pipeline.submitting.settings import SlurmSettings
from pipeline.train_schema import (
    AlignSettings,
    ConvertSettings,
    OnPolicySettings,
    PretrainSettings,
    SftSettings,
    TrainSettings,
    at_least,
    fractions,
)

STAGES: tuple[str, ...] = (
    "prepare",
    "pretrain",
    "align",
    "convert",
    "collect",
    "sft",
    "evaluate",
    "export",
    "plan",
)
"""Stages that `stage=` knows beside `all`, in the order in which a recipe uses them; `plan` is no
part of a recipe."""

TRAINING_STAGES: tuple[str, ...] = ("pretrain", "align", "convert", "sft")
"""Stages that make checkpoints."""

ROUNDS: dict[str, tuple[str, ...]] = {"convert": ("on_policy",)}
"""Further rounds of a stage, written `convert:on_policy`: the same stage with the settings of the
section of that name, on the shards of the `collect` before it."""

BRANCHES: tuple[str, ...] = ("allmem", "mamba2")
"""Recurrent branches that can stand beside the window."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lives and how it is reproduced."""

    dir: str
    """Folder of everything that this run writes, one subfolder a stage; default: runs/RECIPE."""

    seed: int = 0
    """Seed of weights, data order and the random s, W, c; the same on all ranks."""

    debug: bool = False
    """Print the traceback of an error instead of its one line."""

    async_checkpoints: bool = True
    """Write checkpoints while training goes on; a copy of what is saved stays in memory until it is
    on the disk (12 bytes for each trained parameter, spread over the ranks)."""

    checkpoint: Literal["newest", "best"] = "newest"
    """Which checkpoint of the recipe's last training stage `evaluate` and `export` take; `best`
    needs `keep_best` in its section. Training always starts from the newest."""

    log_every_s: float = 10.0
    """Seconds between progress lines where the output is not a terminal."""

    max_skipped_steps: int = 10
    """Steps in a row whose loss or gradient was not finite, after which training stops."""

    spike_factor: float = 10.0
    """A loss is a spike, and its documents go to STAGE/spikes.jsonl, when it lies above the median
    of the last `spike_window` steps by this many of their standard deviations (estimated by the
    median deviation, at least 2 % of the median). 0: never."""

    spike_window: int = 100
    """Steps that a loss is compared with; nothing is a spike before a fifth of them are done."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: a value is out of range.
        """
        at_least("run", {"max_skipped_steps": self.max_skipped_steps}, 1)
        at_least("run", {"spike_factor": self.spike_factor}, 0)
        at_least("run", {"spike_window": self.spike_window}, 5)


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
        at_least("mixer", {"window_size": self.window_size, "chunk_size": self.chunk_size}, 1)
        at_least("mixer", {"num_sinks": self.num_sinks}, 0)
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

    tp: int = 1
    """Tensor-parallel ranks: attention heads, memory heads, MLP and vocabulary are split."""

    sp: bool = False
    """Sequence parallelism: between the projections the tokens, too, are split over the `tp` ranks;
    saves activations and costs no further traffic. Needs tp of 2 or more."""

    cp: int = 1
    """Context-parallel ranks: each trains on a contiguous part of every sequence. Stages that do
    not train take whole sequences and use these ranks as data-parallel ones."""

    cp_mode: Literal["wavefront", "a2a"] = "wavefront"
    """How the memory crosses context-parallel ranks: `wavefront` hands its state from rank to rank,
    `a2a` gives each rank some heads of the whole sequence (cp must divide the heads of a rank)."""

    zero_stage: int = 2
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights split over the
    data-parallel and context-parallel ranks."""

    recompute: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more time."""

    num_threads: int = 0
    """CPU threads of a rank; 0 leaves PyTorch's own choice."""

    timeout_s: int = 1800
    """Seconds after which a rank that waits for the others gives up."""

    heartbeat_timeout_s: float = 60.0
    """Seconds without an answer from a machine after which its ranks count as dead and the others
    leave; a process that dies is noticed at once. 0: nobody watches over the others."""

    hang_warning_s: float = 300.0
    """Seconds of training without progress after which a table says what every rank does and who is
    waited for. 0: never."""

    def __post_init__(self) -> None:
        """Check the ZeRO stage, the counts, and that sequence parallelism has ranks to split over.

        Raises:
            ValueError: a value is out of range, or `sp` without tensor parallelism.
        """
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(
                f"parallel.zero_stage={self.zero_stage} is not one of 0, 1, 2, 3; "
                "set parallel.zero_stage=2"
            )
        at_least("parallel", {"tp": self.tp, "cp": self.cp}, 1)
        if self.sp and self.tp == 1:
            raise ValueError(
                "parallel.sp=true splits tokens over the tensor-parallel ranks, but parallel.tp=1; "
                "set parallel.tp=2 or more, or parallel.sp=false"
            )
        at_least("parallel", {"num_threads": self.num_threads}, 0)
        at_least("parallel", {"timeout_s": self.timeout_s}, 1)
        at_least("parallel", {"hang_warning_s": self.hang_warning_s}, 0)
        if self.heartbeat_timeout_s != 0:
            at_least("parallel", {"heartbeat_timeout_s": self.heartbeat_timeout_s}, 5)

    @property
    def context_mode(self) -> Literal["wavefront", "a2a"] | None:
        """`cp_mode` where there are context-parallel ranks; None: each has whole sequences."""
        return None if self.cp == 1 else self.cp_mode


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

    alpha_lr_factor: float = 1.0
    """Learning rate of alpha, the gate that starts at zero, as a multiple of the others'."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of range.
        """
        fractions("optim", {"beta1": self.beta1, "beta2": self.beta2})
        at_least("optim", {"weight_decay": self.weight_decay, "grad_clip": self.grad_clip}, 0)
        at_least("optim", {"alpha_lr_factor": self.alpha_lr_factor}, 0)


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

    system_every_s: float = 10.0
    """Seconds between two samples of the machine's load and memory; 0: none."""

    model_name: str | None = None
    """Name of the exported model in MLflow's registry; default: `allmem-RECIPE`."""

    upload_gb: float = 2.0
    """Size up to which exported weights are uploaded; larger ones are registered by their place."""

    def __post_init__(self) -> None:
        """Check the times.

        Raises:
            ValueError: a time is not positive.
        """
        negative = min(self.flush_s, self.system_every_s, self.upload_gb) < 0
        if self.interval_s <= 0 or self.timeout_s < 1 or negative:
            raise ValueError(
                f"tracking.interval_s={self.interval_s}, timeout_s={self.timeout_s}, "
                f"flush_s={self.flush_s}, system_every_s={self.system_every_s} and "
                f"upload_gb={self.upload_gb} must be positive; leave them out for the defaults"
            )


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
    """Stages of the recipe in order; `convert@mamba2` is the stage with another branch,
    `convert:on_policy` its second round, on what `collect` collected."""

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

    plan: PlanSettings = field(default_factory=PlanSettings)
    """What `stage=plan` plans for and assumes."""

    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    """What `python -m pipeline.submit` asks Slurm for."""

    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    """Settings of the stage `pretrain`."""

    align: AlignSettings = field(default_factory=AlignSettings)
    """Settings of the stage `align`."""

    convert: ConvertSettings = field(default_factory=ConvertSettings)
    """Settings of the stage `convert`."""

    collect: CollectSettings = field(default_factory=CollectSettings)
    """Settings of the stage `collect`."""

    on_policy: OnPolicySettings = field(default_factory=OnPolicySettings)
    """Settings of the stage `convert:on_policy`."""

    sft: SftSettings = field(default_factory=SftSettings)
    """Settings of the stage `sft`."""

    def train_settings(self, entry: str) -> TrainSettings:
        """The section of a training stage, `convert` or `convert:on_policy` for example."""
        settings: Any = getattr(self, section_of(entry))
        assert isinstance(settings, TrainSettings), entry
        return settings


def section_of(entry: str) -> str:
    """The section of settings of a stage entry: `on_policy` for `convert:on_policy@mamba2`."""
    stage, _, further = entry.partition("@")[0].partition(":")
    return further or stage
