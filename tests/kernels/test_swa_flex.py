"""FlexAttention's form of window and sinks: the block mask is exact, and so are the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from kernels.swa import (
    causal_attention,
    continued_attention,
    flex,
    reference,
    sliding_window_attention,
)

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


CONTINUED = [
    # position, tokens, window, sinks
    (0, 300, 64, 3),
    (1, 200, 130, 0),
    (500, 300, 200, 150),  # sinks over two blocks, a gap between them and the window
    (100, 150, 200, 7),
    (260, 129, None, 0),
    (0, 20, 4, 40),
]


def continued(
    position: int, num_tokens: int, window: int | None, sinks: int, device: str = "cpu"
) -> tuple[list[Tensor], dict[str, object]]:
    """The tensors of a document's last tokens, and what else `continued_attention` takes."""
    q, k, v = inputs(position + num_tokens, device)
    past = position if window is None else min(position, window - 1)
    lead = 0 if window is None else min(sinks, position - past)
    near = slice(position - past, None)
    return [q[:, position:], k[:, near], v[:, near], k[:, :lead], v[:, :lead]], {
        "position": position,
        "window_size": window,
        "num_sinks": sinks,
    }


def attend(tensors: list[Tensor], backend: str, settings: dict[str, object]) -> Tensor:
    q, k, v, *lead = tensors
    before = tuple(lead) if lead[0].shape[1] else None
    return continued_attention(q, k, v, sinks=before, backend=backend, **settings)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("position", "num_tokens", "window", "sinks"), CONTINUED)
def test_a_document_that_goes_on_equals_the_reference(
    position: int, num_tokens: int, window: int | None, sinks: int
) -> None:
    tensors, settings = continued(position, num_tokens, window, sinks)
    found, wanted = (attend(tensors, backend, settings) for backend in ("flex", "reference"))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("position", "num_tokens", "window", "sinks"), CONTINUED)
def test_its_mask_names_no_block_too_few_and_full_ones_only_where_all_is_seen(
    position: int, num_tokens: int, window: int | None, sinks: int
) -> None:
    (_, near, _, lead, _), _ = continued(position, num_tokens, window, sinks)
    past, first = near.shape[1] - num_tokens, lead.shape[1]
    reach = window or position + num_tokens
    mask = flex.continued_mask(position, num_tokens, past, first, reach, sinks, torch.device("cpu"))
    keys = torch.cat([torch.arange(first), torch.arange(position - past, position + num_tokens)])
    query = torch.arange(num_tokens)[:, None] + position
    seen = (keys <= query) & ((query - keys < reach) | (keys < sinks))
    shape = [-(-size // flex.BLOCK) for size in seen.shape]
    padded = torch.zeros(shape[0] * flex.BLOCK, shape[1] * flex.BLOCK, dtype=torch.bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    blocks = padded.unflatten(0, (shape[0], -1)).unflatten(2, (shape[1], -1))
    blocks = blocks.transpose(1, 2).flatten(2)
    named = mask.to_dense()[0, 0].bool()
    assert not (blocks.any(-1) & ~named).any()
    assert int(mask.full_kv_num_blocks.sum()) == int(blocks.all(-1).sum())
    # a block may be named in vain only where sinks and the window's tokens share it
    assert (named & ~blocks.any(-1)).sum() <= shape[0] * bool(first)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_full_attention_of_packed_documents_equals_the_reference() -> None:
    bounds = torch.tensor([0, 1, 129, 300, 300, 513])
    found, wanted = (
        causal_attention(*inputs(513), cu_seqlens=bounds, backend=backend)
        for backend in ("flex", "reference")
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_many_lengths_windows_and_documents_are_few_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = CompileCounter()
    compiled = torch.compile(flex.flex_attention, backend=counter)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    with torch.no_grad():
        for index, num_tokens in enumerate(range(300, 2700, 200)):
            settings = {"window_size": 100 + index, "num_sinks": index}
            bounds = torch.tensor([0, *range(50, 50 * (1 + index % 3), 50), num_tokens])
            tensors = inputs(num_tokens)
            flex.sliding_window_attention(*tensors, cu_seqlens=bounds, **settings)
            flex.continued_attention(
                tensors[0][:, 99:], *tensors[1:], position=99, window_size=100, num_sinks=0
            )
    assert counter.frame_count <= 5


GPU_LENGTHS = (1, 127, 1000, 4097)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", GPU_LENGTHS)
@pytest.mark.parametrize("width", [64, 128])
def test_bfloat16_on_a_gpu_is_within_one_per_cent(num_tokens: int, width: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    sizes = (8, 2, 2)
    tensors = [torch.randn(1, num_tokens, n, width, generator=generator) for n in sizes]
    low = [x.to("cuda", torch.bfloat16) for x in tensors]
    bounds = torch.tensor(sorted({0, num_tokens // 3, num_tokens}))
    for cu_seqlens in (None, bounds):
        settings = {"window_size": 300, "num_sinks": 5, "cu_seqlens": cu_seqlens}
        results = []
        for dtype, backend in ((torch.bfloat16, "flex"), (torch.float64, "reference")):
            leaves = [x.to(dtype).requires_grad_() for x in low]
            out = sliding_window_attention(*leaves, backend=backend, **settings)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for found, wanted in zip(*results, strict=True):
            assert (found.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("position", "num_tokens", "window", "sinks"), CONTINUED)
def test_gradients_of_a_document_that_goes_on_equal_the_reference_on_a_gpu(
    position: int, num_tokens: int, window: int | None, sinks: int
) -> None:
    tensors, settings = continued(position, num_tokens, window, sinks, "cuda")
    results = []
    for backend in ("flex", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = attend(leaves, backend, settings)
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        results.append([out, *(g for g in grads if g is not None)])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.gpu
def test_two_runs_on_a_gpu_are_equal_bit_by_bit() -> None:
    results = []
    for _ in range(2):
        leaves = [x.bfloat16().requires_grad_() for x in inputs(2000, "cuda")]
        out = sliding_window_attention(*leaves, window_size=300, num_sinks=4, backend="flex")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
