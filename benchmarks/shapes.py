"""Sizes that kernels and models are measured at: three Qwen3 bases, SmolLM2, and two for a CPU.

Nothing here needs Megatron-Core, so that the kernels can be measured where it is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.costs import MixerShape


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A base model with its memory and mixer settings."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int
    vocab_size: int = 151936
    tied: bool = True
    """Whether the output projection is the embedding."""
    memory_size: int = 512
    memory_heads: int = 8
    expansion: int = 2
    window_size: int = 4096
    num_sinks: int = 128
    chunk_size: int = 2048

    @property
    def memory_head_dim(self) -> int:
        """d_h."""
        return self.memory_size // self.memory_heads

    @property
    def mixer(self) -> MixerShape:
        """The same sizes as the cost formulas take them."""
        return MixerShape.of(
            self,
            window_size=self.window_size,
            num_sinks=self.num_sinks,
            chunk_size=self.chunk_size,
            memory_size=self.memory_size,
            memory_heads=self.memory_heads,
            expansion=self.expansion,
        )

    @property
    def layer_weights(self) -> int:
        """Parameters of a layer's projections and MLP, without branch and norms."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def branch_weights(self) -> int:
        """A layer's branch: projections 4 d D, rates, gate and alpha, fast weights."""
        projections = self.hidden_size * (4 * self.memory_size + 5 * self.memory_heads + 1)
        return projections + self.mixer.fast_weight_elements

    def num_weights(self, mixer: str) -> int:
        """Parameters that a decoded token reads: all layers and the output projection, once."""
        branch = self.branch_weights if mixer == "allmem" else 0
        if mixer == "mamba2":
            width = self.hidden_size
            branch = width * (4 * self.memory_size + 2 * self.memory_heads + 1)
        head = self.vocab_size * self.hidden_size
        return self.num_layers * (self.layer_weights + branch) + head


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="Qwen3-0.6B", hidden_size=1024, num_layers=28, num_heads=16, intermediate_size=3072
        ),
        Shape(
            name="Qwen3-1.7B", hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144
        ),
        Shape(
            name="Qwen3-8B",
            hidden_size=4096,
            num_layers=36,
            num_heads=32,
            intermediate_size=12288,
            tied=False,
        ),
        # the model of docs/results.md
        Shape(
            name="SmolLM2-135M",
            hidden_size=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            intermediate_size=1536,
            vocab_size=49152,
            memory_size=576,
            memory_heads=9,
            window_size=128,
            num_sinks=4,
            chunk_size=64,
        ),
        # for a CPU: a model of some minutes, and one of some seconds
        Shape(
            name="small",
            hidden_size=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=4,
            head_dim=32,
            intermediate_size=768,
            vocab_size=1024,
            memory_size=128,
            memory_heads=4,
            window_size=256,
            num_sinks=16,
            chunk_size=128,
        ),
        Shape(
            name="tiny",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=64,
            vocab_size=97,
            memory_size=32,
            memory_heads=2,
            window_size=32,
            num_sinks=4,
            chunk_size=16,
        ),
    )
}
