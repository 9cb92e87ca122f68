"""Inputs that do not fit are refused in one line: value, rule, mend."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.ttt_memory import FastWeights, memory_scan

Fixture = Any


def swap(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    def apply(call: dict[str, Any]) -> None:
        call["inputs"][index] = change(call["inputs"][index])

    return apply


def setting(**values: Any) -> Callable[[dict], None]:
    return lambda call: call["settings"].update(values)


CASES = [
    (swap(1, lambda k: k[:, :-1]), r"k of shape \[2, 8, 2, 4\] does not fit q .*give it \[2, 9"),
    (swap(3, lambda eta: eta[..., :2]), r"eta of shape .*give it \[2, 9, 2, 3\]"),
    (swap(4, lambda mu: mu[..., None]), r"mu of shape .*give it \[2, 9, 2\]"),
    (swap(0, lambda q: q.flatten(2)), r"is not \[B, T, heads, width\].*reshape it to heads"),
    (swap(0, lambda q: q.long()), "torch.int64 is not .* of a float dtype"),
    (setting(chunk_size=0), "chunk_size=0 is below 1; set it"),
    (setting(clip=0.0), "clip=0.0 is not above 0; give"),
    (setting(decay=1.5), "decay=1.5 is no share.*set it from 0 to 1"),
    (setting(decay=torch.ones(3)), r"decay of shape \[3\] does not fit 2 heads; give it \[2\]"),
    (setting(backend="cuda"), "backend='cuda' is not one of .*set backend='auto'"),
    (setting(backend="triton"), "backend='triton' cannot run: .*set backend='reference'"),
    (setting(cu_seqlens=torch.tensor([0, 9])), r"cu_seqlens .*\(B=2\); give .*with B=1"),
]


@pytest.mark.parametrize(("change", "message"), CASES)
def test_unfit_input_is_refused(
    change: Callable[[dict], None], message: str, memory_inputs: Fixture
) -> None:
    inputs, weights = memory_inputs(2, 9, 2, 4, 8)
    call: dict[str, Any] = {"inputs": inputs, "settings": {"chunk_size": 4}}
    change(call)
    with pytest.raises(ValueError, match=message) as error:
        memory_scan(*call["inputs"], FastWeights(*weights), **call["settings"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 9], [0, 6, 4, 9], [], [9]])
def test_document_bounds_must_rise_from_0_to_T(bounds: list[int], memory_inputs: Fixture) -> None:
    inputs, weights = memory_inputs(1, 9, 2, 4, 8)
    with pytest.raises(ValueError, match="does not rise from 0 to T=9"):
        memory_scan(
            *inputs, FastWeights(*weights), chunk_size=4,
            cu_seqlens=torch.tensor(bounds, dtype=torch.int64),
        )  # fmt: skip


def test_weights_of_other_heads_are_refused(memory_inputs: Fixture) -> None:
    inputs, weights = memory_inputs(1, 9, 2, 4, 8)
    swapped = FastWeights(weights[0], weights[1], weights[2].mT)
    with pytest.raises(ValueError, match=r"weights.down of shape .*give it \[2, 4, 8\]"):
        memory_scan(*inputs, swapped, chunk_size=4)


def test_a_state_that_does_not_fit_is_refused(memory_inputs: Fixture) -> None:
    inputs, weights = memory_inputs(2, 7, 2, 4, 8)
    _, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=4)
    with pytest.raises(ValueError, match=r"state of 1 rows .* does not fit 2 rows"):
        memory_scan(*inputs, FastWeights(*weights), state.select([0]), chunk_size=4)
    with pytest.raises(ValueError, match=r"3 pending tokens does not fit .*chunk_size=2; keep"):
        memory_scan(*inputs, FastWeights(*weights), state, chunk_size=2)
    wide, wide_weights = memory_inputs(2, 7, 2, 4, 12)
    with pytest.raises(ValueError, match=r"state with gate matrices .*go on with the weights"):
        memory_scan(*wide, FastWeights(*wide_weights), state, chunk_size=4)


def test_no_other_distribution_takes_the_name_kernels() -> None:
    """Hugging Face's `kernels` shadows this package, and with both transformers fails to import."""
    names = {
        name.lower() for name in importlib.metadata.packages_distributions().get("kernels", [])
    }
    assert "kernels" not in names, "run `pip uninstall kernels`: it takes this package's name"
