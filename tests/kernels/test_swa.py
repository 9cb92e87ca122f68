"""Sliding-window attention with sinks against a dense mask in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.swa import (
    attention_with_positions,
    causal_attention,
    continued_attention,
    sliding_window_attention,
)
from kernels.swa import reference as swa_reference

Fixture = Any


def heads(tokens: int, rows: int = 2, q_heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(rows, tokens, count, 8, generator=generator, dtype=torch.float64)
        for count in (q_heads, kv_heads, kv_heads)
    ]


def dense(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> Tensor:
    """The whole score matrix, entry by entry as equation (1) says."""
    tokens, group = q.shape[1], q.shape[2] // k.shape[2]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        for j in range(tokens):
            seen[t, j] = j <= t and (t - j < window or j < sinks)
    out = torch.empty_like(q)
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].mT * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[:, :, head] = weights @ v[:, :, head // group]
    return out


@pytest.mark.parametrize(
    ("tokens", "window", "sinks"),
    [
        (63, 5, 2),
        (63, 1, 0),  # only itself
        (63, 1, 1),
        (100, 33, 0),
        (100, 33, 7),
        (100, 33, 32),  # sinks as wide as the window, less one
        (100, 33, 50),  # sinks beyond it
        (100, 99, 4),
        (100, 64, 200),  # more sinks than tokens
        (65, 64, 1),
        (65, 64, 0),
        (200, 32, 3),
    ],
)
def test_window_and_sinks_match_a_dense_mask(
    tokens: int, window: int, sinks: int, close: Fixture
) -> None:
    q, k, v = heads(tokens)
    out = sliding_window_attention(q, k, v, window_size=window, num_sinks=sinks)
    close(out, dense(q, k, v, window, sinks, 8**-0.5))


def test_gradients_match_a_dense_mask(close: Fixture) -> None:
    leaves = [x.requires_grad_() for x in heads(90)]
    mix = torch.randn_like(leaves[0])
    out = sliding_window_attention(*leaves, window_size=13, num_sinks=3, scale=0.7)
    want = torch.autograd.grad((dense(*leaves, 13, 3, 0.7) * mix).sum(), leaves)
    for grad, expected in zip(torch.autograd.grad((out * mix).sum(), leaves), want, strict=True):
        close(grad, expected)


def test_window_has_exactly_w_keys_its_own_included() -> None:
    q, k, _ = heads(40, rows=1, q_heads=1, kv_heads=1)
    v = torch.eye(40, dtype=torch.float64)[None, :, None]  # the output is the row of weights
    k, q = torch.zeros(1, 40, 1, 40).double(), torch.zeros(1, 40, 1, 40).double()
    weights = sliding_window_attention(q, k, v, window_size=7, num_sinks=2)[0, :, 0]
    for t in range(40):
        seen = {*range(max(0, t - 6), t + 1), *range(min(2, t + 1))}
        expected = torch.tensor([1 / len(seen) if j in seen else 0.0 for j in range(40)])
        torch.testing.assert_close(weights[t], expected.double())


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_short_sequences_are_plain_causal_attention(tokens: int) -> None:
    q, k, v = heads(tokens)
    out = sliding_window_attention(q, k, v, window_size=64, num_sinks=4)
    assert torch.equal(out, causal_attention(q, k, v))


def test_causal_attention_matches_a_dense_mask(close: Fixture) -> None:
    q, k, v = heads(37)
    close(causal_attention(q, k, v), dense(q, k, v, 37, 0, 8**-0.5))


@pytest.mark.parametrize("bounds", [[0, 20, 40, 60], [0, 1, 38, 38, 55, 60], [0, 60]])
def test_packed_documents_do_not_see_each_other(bounds: list[int], close: Fixture) -> None:
    q, k, v = heads(60, rows=1)
    cu = torch.tensor(bounds, dtype=torch.int32)
    out = sliding_window_attention(q, k, v, window_size=6, num_sinks=2, cu_seqlens=cu)
    full = causal_attention(q, k, v, cu_seqlens=cu)
    for begin, end in pairwise(bounds):
        part = [x[:, begin:end] for x in (q, k, v)]
        close(out[:, begin:end], dense(*part, 6, 2, 8**-0.5))
        close(full[:, begin:end], dense(*part, 60, 0, 8**-0.5))


def test_blocks_in_several_groups_give_the_same(
    monkeypatch: pytest.MonkeyPatch, close: Fixture
) -> None:
    q, k, v = heads(300)
    want = sliding_window_attention(q, k, v, window_size=32, num_sinks=3)
    monkeypatch.setattr(swa_reference, "MASK_ELEMENTS", 2 * 2 * 32 * (3 + 64))
    close(sliding_window_attention(q, k, v, window_size=32, num_sinks=3), want)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor an operator returns."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.most = max(self.most, result.numel())
        return result


def test_memory_is_linear_in_tokens() -> None:
    largest = []
    for tokens in (2048, 4096, 8192):
        q, k, v = (x.float() for x in heads(tokens, rows=1, q_heads=1, kv_heads=1))
        with LargestTensor() as mode:
            sliding_window_attention(q, k, v, window_size=64, num_sinks=4)
        largest.append(mode.most / tokens)
    assert max(largest) <= 140, "a block's mask is window + sinks + block wide"
    assert largest[0] == pytest.approx(largest[2], rel=0.1)


def continued(
    parts: list[Tensor], position: int, window: int | None, sinks: int, scale: float | None = None
) -> Tensor:
    """`continued_attention` of the tokens from `position` on, given only what it asks for."""
    q, k, v = parts
    past = position if window is None else min(position, window - 1)
    lead = 0 if window is None else min(sinks, position - past)
    return continued_attention(
        q[:, position:], k[:, position - past :], v[:, position - past :],
        position=position, window_size=window, num_sinks=sinks, scale=scale,
        sinks=(k[:, :lead], v[:, :lead]) if lead else None,
    )  # fmt: skip


@pytest.mark.parametrize("position", [0, 1, 6, 7, 30, 69])
@pytest.mark.parametrize(
    ("window", "sinks"),
    [(7, 0), (7, 3), (1, 2), (40, 33), (5, 40), (70, 2), (None, 0), (None, 3)],
)
def test_a_document_that_goes_on_matches_a_dense_mask(
    position: int, window: int | None, sinks: int, close: Fixture
) -> None:
    leaves = [x.requires_grad_() for x in heads(70)]
    want = dense(*leaves, window or 70, sinks, 0.4)[:, position:]
    out = continued(leaves, position, window, sinks, 0.4)
    close(out, want)
    mix = torch.randn_like(out)
    expected = torch.autograd.grad((want * mix).sum(), leaves)
    for grad, other in zip(torch.autograd.grad((out * mix).sum(), leaves), expected, strict=True):
        close(grad, other)


def test_full_attention_that_goes_on_may_go_in_blocks(
    monkeypatch: pytest.MonkeyPatch, close: Fixture
) -> None:
    parts = heads(150)
    monkeypatch.setattr(swa_reference, "MASK_ELEMENTS", 40 * 150)
    with LargestTensor() as mode:
        out = continued(parts, 20, None, 0)
    close(out, causal_attention(*parts)[:, 20:])
    assert mode.most < 130 * 150, "no matrix of all queries and keys"


def test_going_on_is_linear_in_tokens() -> None:
    largest = []
    for tokens in (2048, 4096):
        parts = [x.float() for x in heads(tokens, rows=1, q_heads=1, kv_heads=1)]
        with LargestTensor() as mode:
            continued(parts, 100, 64, 4)
        largest.append(mode.most / tokens)
    assert max(largest) <= 140
    assert largest[0] == pytest.approx(largest[1], rel=0.1)


def test_keys_that_do_not_fit_the_position_are_refused() -> None:
    q, k, v = heads(9)
    with pytest.raises(ValueError, match=r"9 keys do not fit 9 queries from position 5 on; .* 3 "):
        continued_attention(q, k, v, position=5, window_size=4, num_sinks=1)
    with pytest.raises(ValueError, match="0 sinks do not fit; give the document's first 1 "):
        continued_attention(q[:, 3:], k, v, position=5, window_size=4, num_sinks=1)


def test_a_shuffled_cache_gives_the_same_attention(close: Fixture) -> None:
    q, k, v = heads(50)
    want = sliding_window_attention(q, k, v, window_size=9, num_sinks=3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    empty = torch.full((2, 4), -1)
    slots = torch.cat([order.expand(2, 50), empty], 1)
    junk = torch.full((2, 4, 2, 8), 1e3, dtype=torch.float64)
    held_k, held_v = (torch.cat([x[:, order], junk], 1) for x in (k, v))
    settings = {"num_sinks": 3, "k_positions": slots}
    for queries in (range(50), range(49, 50), range(20, 27)):
        at = list(queries)
        out = attention_with_positions(
            q[:, at], held_k, held_v, q_positions=torch.tensor(at).expand(2, -1),
            window_size=9, **settings,
        )  # fmt: skip
        close(out, want[:, at])
    out = attention_with_positions(
        q, held_k, held_v, q_positions=torch.arange(50).expand(2, -1), window_size=None, **settings
    )
    close(out, causal_attention(q, k, v))


def test_a_query_without_keys_gives_zero_and_finite_gradients() -> None:
    leaves = [x.requires_grad_() for x in heads(4)]
    out = attention_with_positions(
        *leaves, q_positions=torch.tensor([[-1, 0, 1, 2]] * 2),
        k_positions=torch.tensor([[-1, 0, 1, 2]] * 2), window_size=3, num_sinks=1,
    )  # fmt: skip
    assert torch.equal(out[:, 0], torch.zeros(2, 4, 8, dtype=torch.float64))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 0}, "window_size=0 leaves a token blind.*set it to at least 1"),
        ({"num_sinks": -1}, "num_sinks=-1 is negative; set it to 0"),
        ({"backend": "flash"}, "backend='flash' is not one of .*set backend='auto'"),
        ({"backend": "flex"}, "backend='flex' cannot run: .*set backend='reference'"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"does not rise from 0 to T=9 .*\(B=2\)"),
    ],
)
def test_unfit_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    q, k, v = (x.requires_grad_() for x in heads(9))
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(q, k, v, **{"window_size": 4, "num_sinks": 1} | settings)


def test_unfit_shapes_are_refused() -> None:
    q, k, v = heads(9)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        sliding_window_attention(
            q, *[x[:, :, [0, 1, 1]] for x in (k, v)], window_size=4, num_sinks=1
        )
    with pytest.raises(ValueError, match="give the same B and width"):
        causal_attention(q, k[..., :4], v[..., :4])
    with pytest.raises(ValueError, match="with k like v; reshape"):
        causal_attention(q, k, v[:, :, :1])
    positions = torch.arange(9).expand(2, -1)
    with pytest.raises(ValueError, match=r"k_positions of shape \[2, 8\] .*give it \[2, 9\]"):
        attention_with_positions(
            q, k, v, q_positions=positions, k_positions=positions[:, 1:], window_size=4, num_sinks=0
        )
