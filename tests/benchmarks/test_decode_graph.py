"""Decoding by a recorded step equals decoding step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allmem_hf import AllMemCache
from benchmarks.model_cases import build
from benchmarks.shapes import SHAPES
from pipeline import decode_graph
from pipeline.decode_graph import GraphedDecoder, is_steady
from pipeline.generation import Generator

SHAPE = SHAPES["tiny"]
STEADY = SHAPE.window_size + SHAPE.num_sinks
WAITS = ("aten.nonzero", "aten._local_scalar_dense", "aten.lift_fresh", "aten.equal", "aten.item")
"""What makes the host wait for the device, or the device for the host: no graph can hold it."""


class Recorder(TorchDispatchMode):
    """Keeps every operation with the tensors that it read and wrote, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """The same operations on the same buffers, whatever the host has decided since."""
        for func, args, kwargs, out in self.calls:
            storages = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            new = func(*args, **kwargs)
            for held, value in zip(tensors(out), tensors(new), strict=True):
                if held.untyped_storage().data_ptr() not in storages:  # no view, not in place
                    held.copy_(value)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def recorded(cache: AllMemCache) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A recording on a CPU: it has to execute the step, whose effects are then undone."""

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        state = [x for layer in cache.layers for x in layer.tensors.values()]
        held = [x.clone() for x in (*state, cache.lengths)]
        lengths = cache.lengths
        recorder = Recorder()
        with recorder:
            step()
        names = {str(func) for func, *_ in recorder.calls}
        assert not [name for name in names if name.startswith(WAITS)], names
        for x, before in zip((*state, lengths), held, strict=True):
            x.copy_(before)
        return recorder.replay

    return capture


def started(mixer: str, device: str) -> tuple[Any, AllMemCache]:
    """Two rows at different places of their chunks, beyond their windows."""
    model = build(SHAPE, mixer, torch.device(device), torch.float32)
    generator = torch.Generator().manual_seed(1)
    caches = []
    for num in (STEADY + 1, STEADY + 6):
        cache = AllMemCache(model.config)
        ids = torch.randint(0, SHAPE.vocab_size, (1, num), generator=generator).to(device)
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        caches.append(cache)
    return model, AllMemCache.cat(caches)


def compare(mixer: str, device: str, graphed: Callable[[Any, AllMemCache], GraphedDecoder]) -> None:
    model, cache = started(mixer, device)
    _, other = started(mixer, device)
    decoder = graphed(model, cache)
    generator = torch.Generator().manual_seed(2)
    bound = 1e-5 if device == "cpu" else 1e-4  # compiled sums are in another order there
    for _ in range(2 * SHAPE.chunk_size + 3):  # every row completes chunks, at other steps
        ids = torch.randint(0, SHAPE.vocab_size, (2, 1), generator=generator).to(device)
        with torch.no_grad():
            wanted = model(ids, past_key_values=other, use_cache=True).logits[:, -1]
        torch.testing.assert_close(decoder(ids), wanted, atol=bound, rtol=bound)
    assert cache.host_lengths == other.host_lengths
    assert cache.lengths is not None
    assert cache.lengths.tolist() == list(cache.host_lengths)


@pytest.mark.parametrize("mixer", ["allmem", "mamba2", "swa"])
def test_a_recorded_step_equals_the_model_over_several_chunks(mixer: str) -> None:
    compare(
        mixer, "cpu", lambda model, cache: GraphedDecoder(model, cache, capture=recorded(cache))
    )


@pytest.mark.slow
def test_a_compiled_step_equals_the_model_over_several_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_graph, "_EAGER_CALLS", 1000)  # nothing is recorded
    compare("allmem", "cpu", lambda model, cache: GraphedDecoder(model, cache, compiled=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mixer", ["allmem", "mamba2", "swa"])
def test_a_cuda_graph_equals_the_model_over_several_chunks(mixer: str, compiled: bool) -> None:
    compare(mixer, "cuda", lambda model, cache: GraphedDecoder(model, cache, compiled=compiled))


def test_a_cache_that_still_grows_is_refused() -> None:
    model = build(SHAPE, "allmem", torch.device("cpu"), torch.float32)
    cache = AllMemCache(model.config)
    assert not is_steady(cache)
    with torch.no_grad():
        model(torch.zeros(1, STEADY - 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="decode without a graph until they do"):
        GraphedDecoder(model, cache)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    sizes = (STEADY + 5, STEADY + 1, 7)  # the last one's window fills while it writes
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in sizes]


def test_generation_by_recorded_steps_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "_EAGER_CALLS", 1000)  # there is nothing to record with here
    model = build(SHAPE, "allmem", torch.device("cpu"), torch.float32)
    limits = [4, 40, 40]  # rows leave the batch one after the other
    plain, graphed = (
        Generator(model, cuda_graph=graph).generate(prompts(), max_new_tokens=limits)
        for graph in (False, True)
    )
    assert [one.tokens for one in plain] == [one.tokens for one in graphed]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_graph_without_a_cuda_device_is_an_error() -> None:
    model = build(SHAPE, "allmem", torch.device("cpu"), torch.float32)
    generator = Generator(model, cuda_graph=True)
    with pytest.raises(ValueError, match="needs a CUDA device; decode without one"):
        generator.generate(prompts()[:1], max_new_tokens=5)
