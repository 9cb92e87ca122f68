"""ZeRO around an objective is AdamW, at every stage, and goes on exactly from full tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allmem_megatron.sharding import part_of
from pipeline.batches import MicroBatch
from pipeline.distributed import Ranks, init_distributed
from pipeline.engine import Engine
from pipeline.schema import OptimSettings

OPTIM = OptimSettings(weight_decay=0.1, grad_clip=0.5)
LR = 1e-2
BAD_GRADIENT = 64.0
"""Token whose batch has an infinite gradient."""


@pytest.fixture
def ranks() -> Ranks:
    return init_distributed(device="cpu")


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite if asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bad: bool) -> Tensor:
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * (float("inf") if ctx.bad else 1.0), None


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

    @contextlib.contextmanager
    def step(self, *_: Any) -> Iterator[None]:
        yield

    def loss_count(self, batch: MicroBatch) -> int:
        return int(batch.targets.sum())

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = batch.tokens.to(self.scale.dtype)
        x = torch.tanh(self.frozen(self.first(tokens)) * self.scale)
        x = InfiniteGradient.apply(x, bool((tokens == BAD_GRADIENT).any()))
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
            MicroBatch(a, b, a, None)
            for a, b in zip(tokens.chunk(num_micro), targets.chunk(num_micro), strict=True)
        ]


def make_engine(
    ranks: Ranks,
    model: Any,
    stage: int,
    num_micro: int,
    dtype: torch.dtype = torch.float32,
) -> Engine:
    return Engine(
        model,
        model.trained(),
        ranks=ranks,
        optim=OPTIM,
        zero_stage=stage,
        dtype=dtype,
        micro_batch_size=4 // num_micro,
        num_micro_batches=num_micro,
        persistent_elements=0,
    )


def state(engine: Engine) -> dict[str, Tensor]:
    """All weights and moments."""
    found = {name: value.clone() for name, value in engine.weights().items()}
    for moment, values in engine.moments().items():
        found.update({f"{moment}.{name}": value.clone() for name, value in values.items()})
    return found


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


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
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_equal_plain_adamw(ranks: Ranks, stage: int, num_micro: int):
    losses, norms, plain = plain_losses(6)
    model = Regression()
    engine = make_engine(ranks, model, stage, num_micro)
    results = [engine.train_step(batches, lr=LR) for batches in steps(6, num_micro)]
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-5)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-5)
    for name, value in engine.weights().items():
        torch.testing.assert_close(value, plain.trained()[name].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part_of(model.frozen.weight), plain.frozen.weight)
    engine.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
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
    empty = batch._replace(targets=torch.zeros_like(batch.targets))
    with pytest.raises(ValueError, match="no loss token"):
        engine.train_step([empty], lr=LR)


def bad_batch(batch: MicroBatch, kind: str) -> MicroBatch:
    """A batch whose loss (`loss`), or only whose gradient (`gradient`), is not finite."""
    tokens = batch.tokens.float()
    tokens[0, 0, 0] = float("nan") if kind == "loss" else BAD_GRADIENT
    return batch._replace(tokens=tokens, targets=torch.ones_like(batch.targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(
    ranks: Ranks, stage: int, kind: str, dtype: torch.dtype
):
    if stage == 0 and dtype != torch.float32:
        pytest.skip("stage 0 is float32 only")
    engines = [make_engine(ranks, Regression().to(dtype), stage, 1, dtype) for _ in range(2)]
    good = list(steps(5, 1))
    for number, batches in enumerate(good):
        if number == 2:
            before = state(engines[0])
            result = engines[0].train_step([bad_batch(batches[0], kind)], lr=LR)
            assert result.skipped
            assert math.isfinite(result.loss) == (kind == "gradient")
            assert_equal(state(engines[0]), before)
        results = [engine.train_step(batches, lr=LR) for engine in engines]
        assert not results[0].skipped
        assert results[0] == results[1]
    assert_equal(*(state(engine) for engine in engines))
    for engine in engines:
        engine.close()


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
