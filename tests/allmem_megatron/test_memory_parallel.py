"""The branch over context-parallel ranks equals the branch on one rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allmem_megatron.config import MixerSettings
from allmem_megatron.context_parallel import ContextShard
from allmem_megatron.memory import refuse_controls
from allmem_megatron.memory_parallel import check_heads, keep_gradients, memory_over_ranks
from kernels.ttt_memory import FastWeights

WORKER = Path(__file__).with_name("branch_worker.py")
ROOT = Path(__file__).parents[2]
RANKS = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the worker's rank 0 has written; all cases in one start of four ranks."""
    out = tmp_path_factory.mktemp("branch") / "results.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(out)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(e[-2000:] for e in errors)
    return torch.load(out)


@pytest.mark.parametrize("recompute", ["plain", "recompute"])
@pytest.mark.parametrize("size", [2, 4], ids=["cp2", "cp4"])
@pytest.mark.parametrize(
    "sequence",
    [
        "rows",
        "chunks_longer_than_shards",
        "shards_shorter_than_the_convolution",
        "packed",
        "packed_over_many_ranks",
        "packed_at_the_borders",
        "no_chunk_is_complete",
    ],
)
@pytest.mark.parametrize("mode", ["wavefront", "a2a"])
@pytest.mark.parametrize("kind", ["allmem", "mamba2"])
def test_branch_over_ranks_matches_one_rank(kind, mode, sequence, size, recompute, results):
    one, many = results[kind, sequence], results[kind, mode, sequence, size, recompute]
    assert one.keys() == many.keys()
    for name, expected in one.items():
        assert many[name] is not None, f"{name} has no gradient on some rank"
        largest = float(expected.abs().max())
        # float64, but the rates are computed in float32
        torch.testing.assert_close(many[name], expected, rtol=1e-5, atol=1e-6 * max(1.0, largest))


def test_results_are_not_trivial(results):
    for name, gradient in results["allmem", "packed"].items():
        assert float(gradient.abs().max()) > 1e-6, name


def test_a2a_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"cp=4 .* 6 memory heads .* parallel\.cp to 2"):
        check_heads(6, 4)
    shard = ContextShard(
        exchange=None, mode="a2a", rank=0, size=4, start=0, stop=2, num_tokens=8, cu_seqlens=None
    )
    q = torch.zeros(1, 2, 6, 3)
    weights = FastWeights(torch.zeros(6, 4, 3), torch.zeros(6, 4, 3), torch.zeros(6, 3, 4))
    streams = (q, q, q, q, q[..., 0])
    with pytest.raises(ValueError, match="does not divide"):
        memory_over_ranks(streams, weights, shard, 0, chunk_size=4)


def test_shuffled_state_is_refused_over_ranks():
    shard = ContextShard(
        exchange=None, mode="a2a", rank=0, size=2, start=0, stop=4, num_tokens=8, cu_seqlens=None
    )
    with pytest.raises(ValueError, match="shuffle_state=True over 2 context-parallel ranks"):
        refuse_controls(MixerSettings(shuffle_state=True), shard)
    refuse_controls(MixerSettings(write_off=True), shard)


def test_tensors_that_went_nowhere_get_a_gradient_of_zero():
    x, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    keep_gradients(x, unused).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    assert torch.equal(unused.grad, torch.zeros(2))
