"""Following a pass on tensors without storage: what is counted, and how it is extrapolated."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.model import build_model
from pipeline.batches import MicroBatch
from pipeline.objectives import Distill
from pipeline.planning import passes
from pipeline.planning.device import PlannedDevice, planned, planned_ranks
from pipeline.planning.passes import Pass, Task, measure
from pipeline.planning.tracker import MemoryTracker

MIB = 2**20

TASK = Task(
    stage="convert",
    base=BaseModelConfig(
        family="qwen3",
        hidden_size=64,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=512,
        tie_word_embeddings=True,
        qk_norm=True,
    ),
    memory=MemoryConfig(memory_size=64),
    branch="allmem",
    mixer=MixerSettings(mode="allmem", window_size=32, num_sinks=4, chunk_size=16),
    trains="memory",
    dtype=torch.float32,
    kind="cpu",
    length=128,
    micro_batch_size=1,
    loss_tokens=128,
    logits_elements=2**14,
    recompute=False,
)
KINDS: dict[str, dict[str, Any]] = {
    "convert": {},
    "convert, recompute": {"recompute": True},
    "convert, tp 2, sp": {"tp": 2, "sp": True},
    "convert, cp 2": {"cp": 2, "recompute": True},
    "convert, cp 4": {"cp": 4},
    "convert, cp 2, a2a": {"cp": 2, "cp_mode": "a2a"},
    "convert, packed": {"documents": 3},
    "mamba2": {"branch": "mamba2", "mixer": replace(TASK.mixer, mode="mamba2")},
    "align": {"stage": "align", "mixer": replace(TASK.mixer, mode="align")},
    "sft of all": {"stage": "sft", "trains": "all", "recompute": True},
    "pretrain": {"stage": "pretrain", "trains": "base", "mixer": MixerSettings()},
}


def close(found: Pass, wanted: Pass, rel: float) -> None:
    """Compare two passes; of the peaks those count that are near the highest one."""
    assert found.saved == pytest.approx(wanted.saved, rel=rel)
    highest = max(wanted.peaks.values())
    assert max(found.peaks.values()) == pytest.approx(highest, rel=rel)
    for name in ("teacher", "student", "loss"):
        assert found.peaks[name] == pytest.approx(wanted.peaks[name], abs=rel * highest), name
    assert found.traffic == pytest.approx(wanted.traffic, rel=rel)
    assert found.kernels == pytest.approx(wanted.kernels, rel=rel)
    assert found.sent == pytest.approx(wanted.sent, rel=rel)
    assert (found.trained, found.frozen) == (wanted.trained, wanted.frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_tell_what_five_need(kind: str) -> None:
    task = replace(TASK, **KINDS[kind])
    close(measure(task), measure(replace(task, num_layers=5)), rel=0.02)


def test_long_sequences_go_on_in_a_straight_line(monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(TASK, length=1024, loss_tokens=1024, recompute=True)
    exact = measure(task)
    monkeypatch.setattr(passes, "LARGEST_TRACE", 16)
    close(measure(task), exact, rel=0.03)


def test_three_sequences_go_on_from_one_and_two() -> None:
    task = replace(TASK, micro_batch_size=3)
    close(measure(task), passes._follow(task), rel=0.02)


def test_a_planned_pass_takes_what_a_real_one_takes() -> None:
    task = replace(TASK, num_layers=2, base=replace(TASK.base, num_layers=2))
    foreseen = measure(task)
    torch.manual_seed(0)
    model = build_model(task.base, branch="allmem", memory=task.memory)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".memory." in name)
    objective = Distill(model, max_elements=task.logits_elements)
    tokens = torch.randint(512, (1, task.length))
    batch = MicroBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), tokens, None)
    tracker = MemoryTracker(real=True)
    tracker.leave_out((*model.parameters(), *batch[:3]))
    with tracker, objective.active(task.mixer):
        loss, _ = objective(batch)
        kept = tracker.live
        loss.backward()
        tracker.close()
    assert kept == pytest.approx(foreseen.saved, rel=0.02)
    # gradients stay on real parameters; they are not in a planned pass's bytes
    gradients = 4 * foreseen.trained
    assert tracker.phases["start"].peak == pytest.approx(
        max(foreseen.peaks.values()), abs=gradients
    )


def test_tracker_counts_what_is_alive() -> None:
    with MemoryTracker() as tracker, torch.device("meta"):
        first = torch.empty(MIB)
        view = first[10:]
        second = first + 1
        assert tracker.live == 8 * MIB
        del first
        assert tracker.live == 8 * MIB  # the view keeps it
        del view
        assert tracker.live == 4 * MIB
        tracker.enter("next")
        del second
    assert tracker.phases["start"].peak == 8 * MIB
    assert tracker.phases["next"].peak == 4 * MIB


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_planned_tensor_says_where_it_would_be(kind: str) -> None:
    with planned(kind, tell=lambda: None):
        there = torch.empty(3, device="meta")
        real = torch.arange(3)
        assert there.device == torch.device(kind, 0)
        assert there.is_cuda == (kind == "cuda")
        assert torch.empty(2, device=there.device).device.type == kind
        assert torch.empty(2, device=torch.cuda.current_device()).is_meta
        assert real.to(there.device).is_meta
        assert real.device == torch.device("cpu")
        assert not real.is_meta


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_attention_of_a_planned_device_has_no_square_matrix(kind: str) -> None:
    q = torch.empty(1, 4, 8192, 16, device="meta", requires_grad=True)
    k, v = (torch.empty(1, 2, 8192, 16, device="meta", requires_grad=True) for _ in range(2))
    with MemoryTracker() as tracker, PlannedDevice(kind):
        out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert out.shape == q.shape
    assert tracker.phases["start"].peak < 2.2 * q.numel() * q.element_size()


def test_planned_ranks_leave_the_process_as_it_was() -> None:
    before = dict(os.environ), sys.excepthook, torch.distributed.new_group
    with planned_ranks(tp=2, cp=2, rank=3):
        assert torch.distributed.get_world_size() == 4
        with pytest.raises(ValueError, match="without torchrun"), planned_ranks(tp=1, cp=1, rank=0):
            pass
    assert (dict(os.environ), sys.excepthook, torch.distributed.new_group) == before
    assert not torch.distributed.is_initialized()


def test_what_the_model_refuses_is_told_as_it_says_it() -> None:
    with pytest.raises(ValueError, match="vocab_size=512 does not split over tp=3"):
        measure(replace(TASK, tp=3))
