"""FlexAttention's form of window and sinks: the block mask is exact, and so are the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.swa import flex, reference, sliding_window_attention

CASES = [
    (1, 4, 1, None),
    (127, 30, 0, None),
    (300, 64, 3, None),
    (400, 50, 200, None),  # more sinks than the window, over two blocks
    (513, 130, 4, (0, 1, 129, 300, 300, 513)),
    (900, 256, 128, (0, 640, 900)),
    (900, 2000, 5, (0, 255, 256, 900)),
]


def inputs(num_tokens: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((1, num_tokens, 4, 16), (1, num_tokens, 2, 16), (1, num_tokens, 2, 16))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("num_tokens", "window", "sinks", "bounds"), CASES)
def test_outputs_equal_the_reference(
    num_tokens: int, window: int, sinks: int, bounds: tuple[int, ...] | None
) -> None:
    settings = {
        "window_size": window,
        "num_sinks": sinks,
        "cu_seqlens": None if bounds is None else torch.tensor(bounds),
    }
    found = sliding_window_attention(*inputs(num_tokens), backend="flex", **settings)
    wanted = reference.sliding_window_attention(*inputs(num_tokens), **settings)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_tokens", "window", "sinks", "bounds"), CASES)
def test_the_mask_names_no_block_too_many_and_none_too_few(
    num_tokens: int, window: int, sinks: int, bounds: tuple[int, ...] | None
) -> None:
    mask = flex.window_mask(bounds or (0, num_tokens), window, sinks, torch.device("cpu"))
    tokens = torch.arange(num_tokens)
    starts = torch.tensor((bounds or (0,))[: -1 if bounds else None])
    begin = starts[torch.searchsorted(starts, tokens, right=True) - 1]
    query, key = tokens[:, None], tokens[None, :]
    near = (query - key < window) | (key - begin[:, None] < sinks)
    seen = (key <= query) & (key >= begin[:, None]) & near
    rows = -(-num_tokens // flex.BLOCK)
    padded = torch.zeros(rows * flex.BLOCK, rows * flex.BLOCK, dtype=torch.bool)
    padded[:num_tokens, :num_tokens] = seen
    blocks = padded.unflatten(0, (rows, -1)).unflatten(2, (rows, -1)).transpose(1, 2).flatten(2)
    named = mask.to_dense()[0, 0].bool()
    assert torch.equal(named, blocks.any(-1))
    wholly = int(mask.full_kv_num_blocks.sum())
    assert wholly == int(blocks.all(-1).sum())


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "window", "sinks", "bounds"), CASES)
def test_gradients_equal_the_reference_on_a_gpu(
    num_tokens: int, window: int, sinks: int, bounds: tuple[int, ...] | None
) -> None:
    settings = {
        "window_size": window,
        "num_sinks": sinks,
        "cu_seqlens": None if bounds is None else torch.tensor(bounds),
    }
    results = []
    for backend in ("flex", "reference"):
        leaves = [x.requires_grad_() for x in inputs(num_tokens, "cuda")]
        out = sliding_window_attention(*leaves, backend=backend, **settings)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 1e-2 * wanted.norm()
