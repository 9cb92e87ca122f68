"""Linear layers multiply all rows at once, in both passes, whatever the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allmem_megatron.config import MixerSettings
from allmem_megatron.order import batch_first, tokens_first

T = 24


class Products(TorchDispatchMode):
    """Shapes of batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[list[int], list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.shapes.append((list(args[0].shape), list(args[1].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("branch", ["allmem", "mamba2"])
def test_no_linear_layer_goes_row_by_row(
    hf_model: Any, ours: Any, set_alpha: Any, branch: str, batch: int
) -> None:
    model = ours(hf_model("llama", tied=True), branch=branch)
    set_alpha(model, 0.5)
    for _, parameter in model.base_parameters():
        parameter.requires_grad_(False)
    tokens = torch.randint(0, 96, (batch, T))
    settings = MixerSettings(mode=branch, window_size=8, num_sinks=2, chunk_size=8)
    with Products() as products, model.mixer(settings):
        # its gradient has the strides of a transpose
        (model.hidden_states(tokens) ** 2).sum().backward()
    assert not [shapes for shapes in products.shapes if shapes[0][0] == T]


@pytest.mark.parametrize("batch", [1, 3])
def test_both_orders_and_their_gradients_are_plain(batch: int) -> None:
    x = torch.randn(batch, T, 5, requires_grad=True)
    there = tokens_first(x)
    assert torch.equal(there, x.transpose(0, 1))
    assert there.stride() == (batch * 5, 5, 1)
    back = batch_first(there)
    assert torch.equal(back, x)
    strides: list[tuple[int, ...]] = []
    there.register_hook(lambda gradient: strides.append(gradient.stride()))
    (back**2).sum().backward()
    assert strides == [(batch * 5, 5, 1)]
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach())
