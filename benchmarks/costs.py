"""Sizes of Qwen3 students, what their layers compute, and what their ranks send each other.

FLOPs agree with `pipeline.flops` (tested); message sizes come from the library's own layout of
states and halos. Rates of the hardware are assumptions, fields of `Setting`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from allmem_megatron.config import BaseModelConfig, MemoryConfig
from allmem_megatron.context_parallel import ContextShard
from allmem_megatron.shard_scan import ShardDocuments, StateLayout, halo_of
from benchmarks.programs import LayerSeconds, Messages, Piece
from benchmarks.schedule import Link

BF16 = 2


def qwen3(hidden: int, layers: int, heads: int, intermediate: int) -> BaseModelConfig:
    """A Qwen3 shape; what all sizes share is filled in."""
    return BaseModelConfig(
        family="qwen3",
        qk_norm=True,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=151936,
    )


SHAPES = {
    "Qwen3-0.6B": qwen3(1024, 28, 16, 3072),
    "Qwen3-1.7B": qwen3(2048, 28, 16, 6144),
    "Qwen3-8B": qwen3(4096, 36, 32, 12288),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated. Rates are assumptions."""

    tokens: int = 1 << 20
    """T, of the one sequence of the step; one document."""
    window_size: int = 4096
    num_sinks: int = 128
    chunk_size: int = 2048
    dense_tflops: float = 400.0
    """Of a rank, in projections and MLP."""
    attention_tflops: float = 300.0
    scan_tflops: float = 50.0
    """In the memory's small matrix products."""
    chunk_us: float = 200.0
    """Least time of one chunk's forward read and write, whatever its size: launches of kernels
    that follow one another. The backward pass takes twice that."""
    gbytes_per_s: float = 50.0
    """Of a rank's link, each way (400 Gbit/s)."""
    latency_us: float = 10.0
    recompute: bool = True
    teacher: str = ""
    """Full attention of the base model before the student's passes, as in `convert`: `gathered`
    (a rank gets all keys before its own) or `heads` (all tokens of some heads); empty: none."""
    zero3: bool = False
    """Weights are gathered layer by layer over all ranks."""
    prefetch: int = 1
    """Layers that ZeRO-3 gathers ahead."""

    @property
    def link(self) -> Link:
        """The network."""
        return Link(bytes_per_s=self.gbytes_per_s * 1e9, latency_s=self.latency_us * 1e-6)


# ------------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token in one layer, part by part; a multiply-add is two."""

    qkv: float
    window: float
    window_out: float
    branch_in: float
    scan: float
    branch_out: float
    mlp: float

    @classmethod
    def of(
        cls, base: BaseModelConfig, memory: MemoryConfig, window_size: int, num_sinks: int
    ) -> TokenFlops:
        """The parts for these sizes; the window is full."""
        width, attention = base.hidden_size, base.num_heads * base.head_dim
        heads, head_dim = memory.heads(base), memory.head_dim(base)
        return cls(
            qkv=2.0 * width * (attention + 2 * base.num_kv_heads * base.head_dim),
            window=4.0 * attention * (window_size + num_sinks),
            window_out=2.0 * width * attention,
            branch_in=2.0 * width * (3 * memory.memory_size + 5 * heads),
            scan=18.0 * heads * head_dim * memory.expansion * head_dim,
            branch_out=2.0 * width * memory.memory_size,
            mlp=6.0 * width * base.intermediate_size,
        )


def layer_seconds(base: BaseModelConfig, ranks: int, mode: str, setting: Setting) -> LayerSeconds:
    """A layer of the student on one of the ranks, the base's weights frozen.

    The backward pass costs a matrix product with a frozen weight once more, everything with two
    inputs that ask for gradients (attention, scan, the branch's projections) twice.
    """
    memory = MemoryConfig()
    flops = TokenFlops.of(base, memory, setting.window_size, setting.num_sinks)
    tokens = setting.tokens / ranks
    dense, attention = setting.dense_tflops * 1e12, setting.attention_tflops * 1e12
    project = tokens * flops.qkv / dense
    window = tokens * flops.window / attention
    joined = tokens * flops.window_out / dense
    branch = tokens * flops.branch_in / dense
    after_branch = tokens * flops.branch_out / dense
    mlp = tokens * flops.mlp / dense
    scanned = setting.tokens if mode == "a2a" else tokens
    scan = max(
        tokens * flops.scan / (setting.scan_tflops * 1e12),
        -(-scanned // setting.chunk_size) * setting.chunk_us * 1e-6,
    )
    again = project + window + joined + branch + scan + after_branch + mlp
    return LayerSeconds(
        project=project,
        window=window + joined + branch,
        scan=scan,
        after=after_branch + mlp,
        back_after=2 * after_branch + mlp + (again if setting.recompute else 0.0),
        back_scan=2 * scan,
        back_window=2 * window + joined + 2 * branch,
        back_project=project,
    )


def shards(ranks: int, setting: Setting) -> list[ContextShard]:
    """Where the tokens lie: one document over all ranks."""
    whole = ContextShard(
        exchange=None,  # type: ignore[arg-type]  # nothing is sent here
        mode="wavefront",
        rank=0,
        size=ranks,
        start=0,
        stop=setting.tokens // ranks,
        num_tokens=setting.tokens,
        cu_seqlens=None,
    )
    return [whole.at(rank) for rank in range(ranks)]


def messages(
    base: BaseModelConfig,
    ranks: int,
    mode: str,
    setting: Setting,
    memory: MemoryConfig | None = None,
    element_bytes: int = BF16,
) -> Messages:
    """Sizes in bytes of a layer's messages; W, M and rates are float32."""
    memory = memory or MemoryConfig()
    line = shards(ranks, setting)
    kv = 2 * base.num_kv_heads * base.head_dim * element_bytes  # of a token
    conv = 3 * memory.memory_size * element_bytes

    def halo(reach: int, token_bytes: float) -> list[Piece]:
        return [
            (source, rank, (hi - lo) * token_bytes)
            for rank in range(ranks)
            for source, lo, hi in halo_of(line[0], rank, reach)
        ]

    window = halo(setting.window_size - 1, kv)
    reach = {dest: min(lo for _, lo, _ in halo_of(line[0], dest, setting.window_size - 1))
             for dest in range(1, ranks)}  # fmt: skip
    sinks = min(setting.num_sinks, line[0].stop)
    window += [(0, dest, sinks * kv) for dest in range(1, ranks) if reach[dest] >= sinks]
    heads, head_dim = memory.heads(base), memory.head_dim(base)
    away = setting.tokens / ranks * (ranks - 1) / ranks * heads  # heads of tokens that leave a rank
    sizes = Messages(
        window=window,
        conv=halo(memory.conv_kernel - 1, conv),
        state=[state_bytes(base, memory, shard, setting) for shard in line if shard.leaves],
    )
    if mode == "wavefront":
        return sizes
    q_k_v_rates, out = 3 * head_dim * element_bytes + 4 * 4, head_dim * element_bytes
    link = setting.link
    return replace(
        sizes,
        heads_s=away * q_k_v_rates / link.bytes_per_s + 2 * link.latency_s,  # one for each dtype
        tokens_s=away * out / link.bytes_per_s + link.latency_s,
    )


def state_bytes(
    base: BaseModelConfig, memory: MemoryConfig, shard: ContextShard, setting: Setting
) -> int:
    """Bytes of the state that leaves a shard: W, M and the unfinished chunk (k, v in bfloat16)."""
    heads, head_dim = memory.heads(base), memory.head_dim(base)
    documents = ShardDocuments.of(shard)
    layout = StateLayout(
        num_rows=1,
        num_pending=documents.last % setting.chunk_size,
        num_heads=heads,
        head_dim=head_dim,
        hidden_dim=memory.expansion * head_dim,
        wide=torch.float32,
        narrow=torch.bfloat16,
        rates=torch.float32,
    )
    return layout.num_bytes
