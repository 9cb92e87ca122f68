"""What is built and how it mixes tokens: base model, memory branch and mixer settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FAMILIES = ("qwen3", "qwen2", "llama")
MODES = ("full", "swa", "mamba2", "allmem", "align")
BRANCHES = ("none", "allmem", "mamba2")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_MEMORY = "mixer.memory."
"""Before the names of MemoryConfig's fields in messages: where a configuration has them."""

_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# What transformers takes when a config.json leaves the key out.
_DEFAULT_NUM_KV_HEADS = {"qwen3": 32, "qwen2": 32, "llama": None}
_DEFAULT_MAX_POSITIONS = {"qwen3": 32768, "qwen2": 32768, "llama": 2048}


def positive(prefix: str, **values: float) -> None:
    """Refuses values that are not above zero. Raises: ValueError naming `prefix` and the key."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{prefix}{name}={value} must be positive; set it above 0")


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """A decoder of the Qwen3, Qwen2 or Llama family, as its config.json describes it."""

    family: str
    """"qwen3", "qwen2" or "llama"."""
    hidden_size: int
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """None for plain rotary; else {"rope_type": "linear" | "llama3" | "yarn", "factor": …}."""
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    """A bias on q, k and v (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on every query and key head (Qwen3)."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(
                f"model family {self.family!r} is not supported; use one of {', '.join(FAMILIES)}"
            )
        positive(
            "base model: ",
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            max_position_embeddings=self.max_position_embeddings,
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads};"
                " set num_kv_heads to a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary; make it even")
        rope_type = (self.rope_scaling or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type={rope_type!r} is not supported; use one of {', '.join(ROPE_TYPES)}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> BaseModelConfig:
        """Reads a config.json of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises:
            ValueError: another family, or a feature whose weights this model has no place for.
        """
        family = hf.get("model_type", "missing")
        if family not in FAMILIES:
            raise ValueError(
                f"model_type={family!r} is not supported; use a base model of the families"
                f" {', '.join(FAMILIES)}"
            )
        _refuse_unsupported(hf, family)
        theta, scaling = _rope_of(hf)
        num_heads = int(hf["num_attention_heads"])
        num_kv_heads = hf.get("num_key_value_heads", _DEFAULT_NUM_KV_HEADS[family]) or num_heads
        head_dim = hf.get("head_dim") or (
            128 if family == "qwen3" else hf["hidden_size"] // num_heads
        )
        return cls(
            family=family,
            hidden_size=int(hf["hidden_size"]),
            num_layers=int(hf["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(num_kv_heads),
            head_dim=int(head_dim),
            intermediate_size=int(hf["intermediate_size"]),
            vocab_size=int(hf["vocab_size"]),
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=int(
                hf.get("max_position_embeddings", _DEFAULT_MAX_POSITIONS[family])
            ),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 both load as the same model."""
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": self.family,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {
                **(scaling or {"rope_type": "default"}),
                "rope_theta": self.rope_theta,
            },
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
        }
        if self.family != "qwen2":
            config["attention_bias"] = False
        if self.family == "llama":
            config["mlp_bias"] = False
        else:
            config["use_sliding_window"] = False
        return config


def _refuse_unsupported(hf: dict[str, Any], family: str) -> None:
    refused = {
        "hidden_act": hf.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_bias": family != "qwen2" and bool(hf.get("attention_bias", False)),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "use_sliding_window": bool(hf.get("use_sliding_window", False)),
        "quantization_config": hf.get("quantization_config") is not None,
        "partial_rotary_factor": hf.get("partial_rotary_factor", 1.0) not in (1.0, None),
    }
    for key, bad in refused.items():
        if bad:
            raise ValueError(
                f"{key}={hf[key]!r} of this {family} model is not supported; choose a base model"
                " without it"
            )


def _rope_of(hf: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None) out of either layout; scaling's type key becomes `rope_type`."""
    parameters = dict(hf.get("rope_parameters") or {})
    scaling = {**dict(hf.get("rope_scaling") or {}), **parameters}
    theta = scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    rope_type = scaling.pop("type", None)
    rope_type = scaling.pop("rope_type", rope_type) or "default"
    if rope_type == "default":
        return float(theta), None
    return float(theta), {"rope_type": rope_type, **scaling}


MATRICES = ("gate", "up", "down")
"""Of a memory head's network, in the order of its rates."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The branch beside window attention (spec sections 2-4); the same sizes serve mamba2."""

    memory_size: int = 512
    """d, the width of all memory heads together."""
    num_heads: int | None = None
    """n, memory heads; None: as many as the base model's key-value heads."""
    conv_kernel: int = 4
    """Taps of the causal convolution on q, k and v."""
    expansion: int = 2
    """f / d_h: hidden width of one head's network over its head width."""
    eta_init: float = 1e-3
    """The inner learning rate at the start; tiny models with short chunks need more."""
    clip: float | None = None
    """Bound on the norm of one write (equation 10); None: off, as in the paper."""
    decay: float = 0.0
    """Share of the normalised weights forgotten at each write; 0: off, as in the paper."""
    init_from_base: bool = False
    """Start the branch's q, k, v and output projections, and its q and k norms, from the base
    model's attention instead of at random."""
    gate_up_std: float | None = None
    """Standard deviation of the initial gate and up matrices; None: 1/sqrt(d_h), as in the paper's
    neighbours. Keys have length 1, so it is also the standard deviation of what the SiLU sees."""
    momentum: bool = True
    """Whether a write also moves along the writes before it, equation (11); without, mu starts and
    stays at 0."""
    writes: tuple[str, ...] = MATRICES
    """Matrices that are written; the rates of the others start and stay at 0."""
    state_size: int | None = None
    """Mamba-2 only: N, columns of a head's state; None: the head width d_h."""

    def __post_init__(self) -> None:
        positive(
            _MEMORY,
            memory_size=self.memory_size,
            conv_kernel=self.conv_kernel,
            expansion=self.expansion,
            eta_init=self.eta_init,
        )
        if self.conv_kernel != 4:
            raise ValueError(
                f"{_MEMORY}conv_kernel={self.conv_kernel} is not supported: the decode state keeps"
                f" 3 tokens; set {_MEMORY}conv_kernel to 4"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"{_MEMORY}decay={self.decay} is not a share; set {_MEMORY}decay in [0, 1)"
            )
        if self.num_heads is not None:
            positive(_MEMORY, num_heads=self.num_heads)
        if self.clip is not None:
            positive(_MEMORY, clip=self.clip)
        if not self.writes or not set(self.writes) <= set(MATRICES):
            raise ValueError(
                f"{_MEMORY}writes={list(self.writes)} must name one or more of "
                f"{', '.join(MATRICES)}; set {_MEMORY}writes=[down] to write that matrix alone"
            )
        if self.state_size is not None:
            positive(_MEMORY, state_size=self.state_size)
        if self.gate_up_std is not None:
            positive(_MEMORY, gate_up_std=self.gate_up_std)

    def heads(self, base: BaseModelConfig) -> int:
        """n for this base model. Raises: ValueError when n does not divide memory_size."""
        n = self.num_heads or base.num_kv_heads
        if self.memory_size % n:
            step = 16 * n if self.memory_size >= 16 * n else n  # head widths that hardware likes
            nearest = round(self.memory_size / step) * step or n
            raise ValueError(
                f"{_MEMORY}memory_size={self.memory_size} is not a multiple of its {n} heads;"
                f" set {_MEMORY}memory_size to {nearest} or {_MEMORY}num_heads to a divisor"
            )
        return n

    def head_dim(self, base: BaseModelConfig) -> int:
        """d_h = d / n."""
        return self.memory_size // self.heads(base)


@dataclass(frozen=True, kw_only=True)
class MixerSettings:
    """How every layer mixes tokens during one forward pass."""

    mode: str = "full"
    """full, swa, mamba2, allmem, or align (full attention that trains the branch per layer)."""
    window_size: int = 512
    """W: the keys a query sees, itself included (spec equation 1)."""
    num_sinks: int = 0
    """s: first tokens of a document that every later query sees."""
    chunk_size: int = 512
    """c: tokens between two writes of the memory; never above window_size."""
    memory_off: bool = False
    """Control: leave the branch out (alpha = 0)."""
    write_off: bool = False
    """Control: eta = 0 and mu = 0, so every token reads the initial weights."""
    shuffle_state: bool = False
    """Control: row b reads the state of row (b + 1) % B; equal lengths and B >= 2 only."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not known; use one of {', '.join(MODES)}")
        positive("mixer.", window_size=self.window_size, chunk_size=self.chunk_size)
        if self.num_sinks < 0:
            raise ValueError(f"mixer.num_sinks={self.num_sinks} is negative; set it to 0 or more")
        if self.mode in ("allmem", "align", "mamba2") and self.chunk_size > self.window_size:
            raise ValueError(
                f"mixer.chunk_size={self.chunk_size} > window_size={self.window_size}: tokens would"
                f" fall between window and memory; set mixer.chunk_size to at most"
                f" {self.window_size}"
            )
