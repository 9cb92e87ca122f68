"""ZeRO around an objective is AdamW, at every stage, and goes on exactly from full tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.batches import MicroBatch
from pipeline.distributed import Ranks, init_distributed
from pipeline.engine import Engine
from pipeline.schema import OptimSettings

OPTIM = OptimSettings(weight_decay=0.1, grad_clip=0.5)
LR = 1e-2


@pytest.fixture
def ranks() -> Ranks:
    return init_distributed(device="cpu")


class Regression(nn.Module):
    """Two layers, one of them frozen; its loss is a sum over all numbers of the batch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.frozen.requires_grad_(False)

    def loss_count(self, batch: MicroBatch) -> int:
        return int(batch.targets.sum())

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.tanh(self.frozen(self.first(batch.tokens.float())) * self.scale)
        errors = (x - 0.3).square().sum(-1)
        return (errors * batch.targets).sum(), {"train/other": x.sum()}

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def steps(num_steps: int, num_micro: int) -> Iterator[list[MicroBatch]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        tokens = torch.randint(0, 5, (4, 6, 8), generator=generator)
        targets = torch.rand(4, 6, generator=generator) < 0.6
        yield [
            MicroBatch(a, b, None)
            for a, b in zip(tokens.chunk(num_micro), targets.chunk(num_micro), strict=True)
        ]


def make_engine(ranks: Ranks, model: Any, stage: int, num_micro: int) -> Engine:
    return Engine(
        model,
        model.trained(),
        ranks=ranks,
        optim=OPTIM,
        zero_stage=stage,
        dtype=torch.float32,
        micro_batch_size=4 // num_micro,
        num_micro_batches=num_micro,
    )


def plain_losses(num_steps: int) -> tuple[list[float], list[float], Regression]:
    """AdamW as PyTorch has it, on the mean over all loss tokens."""
    model = Regression()
    vectors = [p for p in model.trained().values() if p.ndim < 2]
    matrices = [p for p in model.trained().values() if p.ndim >= 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
    )
    losses, norms = [], []
    for (batch,) in steps(num_steps, 1):
        loss = model(batch)[0] / batch.targets.sum()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_equal_plain_adamw(ranks: Ranks, stage: int, num_micro: int):
    losses, norms, plain = plain_losses(6)
    model = Regression()
    engine = make_engine(ranks, model, stage, num_micro)
    results = [engine.train_step(batches, lr=LR) for batches in steps(6, num_micro)]
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-5)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-5)
    for name, value in engine.weights().items():
        torch.testing.assert_close(value, plain.trained()[name].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.frozen.weight, plain.frozen.weight)
    engine.close()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_loading_weights_and_moments_goes_on_bit_for_bit(ranks: Ranks, stage: int):
    whole = make_engine(ranks, Regression(), stage, 1)
    batches = list(steps(8, 1))
    losses, weights, moments = [], {}, {}
    for step, batch in enumerate(batches):
        if step == 4:
            weights = {name: value.clone() for name, value in whole.weights().items()}
            moments = {
                moment: {name: value.clone() for name, value in values.items()}
                for moment, values in whole.moments().items()
            }
        losses.append(whole.train_step(batch, lr=LR).loss)
    resumed = make_engine(ranks, Regression(), stage, 1)
    resumed.load(weights, moments, step=4)
    assert [resumed.train_step(batch, lr=LR).loss for batch in batches[4:]] == losses[4:]


def test_a_step_without_loss_tokens_is_refused(ranks: Ranks):
    engine = make_engine(ranks, Regression(), 2, 1)
    batch = next(steps(1, 1))[0]
    empty = MicroBatch(batch.tokens, torch.zeros_like(batch.targets), None)
    with pytest.raises(ValueError, match="no loss token"):
        engine.train_step([empty], lr=LR)


def test_a_broken_loss_stops_the_run(ranks: Ranks):
    model = Regression()
    engine = make_engine(ranks, model, 2, 1)
    with torch.no_grad():
        model.frozen.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        engine.train_step(next(steps(1, 1)), lr=LR)


def test_nothing_to_train_is_refused(ranks: Ranks):
    with pytest.raises(ValueError, match="no parameter is trained"):
        Engine(
            Regression(),  # type: ignore[arg-type]
            {},
            ranks=ranks,
            optim=OPTIM,
            zero_stage=2,
            dtype=torch.float32,
            micro_batch_size=1,
            num_micro_batches=1,
        )


def test_bfloat16_needs_zero_for_its_float32_weights(ranks: Ranks):
    with pytest.raises(ValueError, match=r"parallel\.zero_stage=0 keeps no float32 weights"):
        Engine(
            Regression(),  # type: ignore[arg-type]
            Regression().trained(),
            ranks=ranks,
            optim=OPTIM,
            zero_stage=0,
            dtype=torch.bfloat16,
            micro_batch_size=1,
            num_micro_batches=1,
        )
