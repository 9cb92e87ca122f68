"""Configuration of an exported AllMem model (AllMem, arXiv 2602.13680).

One class serves the Qwen3 (q/k norm), Qwen2 (bias on q, k, v) and Llama families, with one of three
branches beside the sliding-window attention: `allmem`, `mamba2` (the paper's baseline) or `none`.
"""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

BRANCHES = ("allmem", "mamba2", "none")
FAMILIES = ("qwen3", "qwen2", "llama")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class AllMemConfig(PreTrainedConfig):
    """Shapes of the base model and of the memory, and the mixer's settings.

    The base model's fields carry the names of its own `config.json`. The defaults are Qwen3-0.6B's.

    Attributes:
        family: the base model's family, for the record: `qwen3`, `qwen2` or `llama`.
        qk_norm: RMSNorm on each head of q and k before RoPE (Qwen3).
        qkv_bias: bias on the q, k and v projections (Qwen2).
        branch: what runs beside the window: `allmem`, `mamba2` or `none`.
        memory_size: memory width d, all memory heads together.
        num_memory_heads: memory heads n; None means the number of key-value heads.
        conv_kernel: taps of the depthwise causal convolution, equation (2).
        expansion: hidden width of one memory head over its width, f / d_h.
        eta_init: the inner learning rate that a fresh model starts from, equation (4).
        clip: Frobenius norm at which a chunk's write is clipped, or None, equation (10).
        decay: share of the normalised weights that each write forgets; 0 in the paper.
        state_size: columns of a head's state in `mamba2`; None means the memory head's width.
        chunk_size: memory chunk length c, in tokens; at most `window_size`.
        window_size: attention window W, in tokens, the query's own included.
        num_sinks: first tokens s of each sequence that every later token sees.
        full_attention: attend to all tokens, as the base model does; window and sinks are not used,
            and the cache grows with the text.
        memory_off: control: leave the branch out, as with alpha = 0.
        write_off: control: write nothing, so that every read sees the initial state.

    Raises:
        ValueError: shapes that do not fit, or `chunk_size > window_size`.
    """

    model_type = "allmem"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    family: str = "qwen3"
    qk_norm: bool = True
    qkv_bias: bool = False

    branch: str = "allmem"
    memory_size: int = 512
    num_memory_heads: int | None = None
    conv_kernel: int = 4
    expansion: int = 2
    eta_init: float = 1e-3
    clip: float | None = None
    decay: float = 0.0
    state_size: int | None = None
    chunk_size: int = 2048
    window_size: int = 4096
    num_sinks: int = 128
    full_attention: bool = False
    memory_off: bool = False
    write_off: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads, self.head_dim = self.kv_heads, self.head_width
        self.num_memory_heads = self.memory_heads
        super().__post_init__(**kwargs)
        self._check_base()
        self._check_mixer()

    @property
    def kv_heads(self) -> int:
        """Key-value heads, n_kv."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head, h."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def memory_heads(self) -> int:
        """Memory heads, n."""
        return self.num_memory_heads or self.kv_heads

    @property
    def memory_head_dim(self) -> int:
        """Width of one memory head, d_h."""
        return self.memory_size // self.memory_heads

    @property
    def attention_window(self) -> int | None:
        """The window W, or None where attention is full."""
        return None if self.full_attention else self.window_size

    def _check_base(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} is not one of {FAMILIES}; name the base's")
        if self.hidden_act != "silu":
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not 'silu'; only SwiGLU bases can be converted"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.kv_heads}; correct the base's config"
            )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type={rope_type!r} is not one of {ROPE_TYPES}; its frequencies would change "
                "with the length, which a constant cache cannot follow; use one of these"
            )

    def _check_mixer(self) -> None:
        if self.branch not in BRANCHES:
            raise ValueError(f"branch={self.branch!r} is not one of {BRANCHES}; choose one of them")
        for name, least in (("window_size", 1), ("chunk_size", 1), ("num_sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}; set it to more")
        if self.branch == "none":
            return
        if self.memory_size % self.memory_heads:
            raise ValueError(
                f"memory_size={self.memory_size} is not a multiple of "
                f"num_memory_heads={self.memory_heads}; choose a multiple"
            )
        if self.branch == "allmem" and self.chunk_size > self.window_size:
            raise ValueError(
                f"chunk_size={self.chunk_size} exceeds window_size={self.window_size}: tokens "
                f"would fall in a gap between them; set chunk_size to at most {self.window_size}"
            )


__all__ = ["AllMemConfig"]
