"""The fused decode step computes what the plain one does, in thirteen launches a layer.

Interpreted on a CPU against the plain path in float64; compiled on a GPU.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)

from allmem_hf import AllMemCache
from allmem_hf.decode_allmem import set_decode_backend
from pipeline.decode_graph import GraphedDecoder
from tests.benchmarks.test_decode_graph import Recorder, recorded

pytest.importorskip("triton", reason="pip install triton (Linux) to test the Triton kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture
def _nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers of the kernels are NaN before they are filled."""
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        make = getattr(owner, name)

        def filled(*args: Any, _make: Callable[..., Tensor] = make, **kwargs: Any) -> Tensor:
            out = _make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, filled)


def read(model: Any, rows: list[Tensor], steps: int) -> AllMemCache:
    """A cache of rows that are each read but for their last `steps` tokens."""
    caches = []
    for row in rows:
        cache = AllMemCache(model.config)
        with torch.no_grad():
            model(row[:, :-steps], past_key_values=cache, use_cache=True)
        caches.append(cache)
    return AllMemCache.cat(caches)


def write(model: Any, cache: AllMemCache, rows: list[Tensor], steps: int) -> Tensor:
    """Logits of the rows' last tokens, one by one."""
    logits = []
    for left in range(steps, 0, -1):
        ids = torch.cat([row[:, row.shape[1] - left :][:, :1] for row in rows])
        with torch.no_grad():
            logits.append(model(ids, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


def spoil(cache: AllMemCache) -> None:
    """NaN where the state means nothing: empty slots, and the rest of each unfinished chunk."""
    for layer in cache.layers:
        for row, length in enumerate(cache.host_lengths):
            for name, value in layer.tensors.items():
                if name in ("keys", "values"):
                    value[row, length:] = float("nan")
                elif name.startswith("pending_"):
                    value[row, length % cache.config.chunk_size :] = float("nan")


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double().cpu() - wanted.double().cpu()).norm() / wanted.double().norm())


CASES: dict[str, dict[str, Any]] = {
    "memory": {},
    "Qwen2": {"branch": "none", "qk_norm": False, "qkv_bias": True},
    "odd-widths": {"head_dim": 12, "memory_size": 24, "num_attention_heads": 6, "conv_kernel": 3},
    "smallest": {"chunk_size": 1, "window_size": 1, "num_sinks": 0, "conv_kernel": 1},
    "window-alone": {"branch": "none"},
    "memory-off": {"memory_off": True},
    "several-splits": {"branch": "none", "window_size": 50, "num_sinks": 5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("_nan_memory")
def test_fused_steps_equal_the_plain_ones_in_float64(tiny, tokens, case: str) -> None:
    changes = {"branch": "allmem", **ONE_LAYER, **CASES[case]}
    plain, fused = tiny(**changes).double(), tiny(**changes).to(DEVICE)
    # around the sinks, the full window and the chunks' borders
    rows, steps = [tokens(1, n, seed=n) for n in (4, 5, 10, 21)], 3
    if case == "several-splits":
        rows, steps = [tokens(1, n, seed=n) for n in (4, 20, 70)], 2
    cache = read(plain, rows, steps)
    set_decode_backend(fused, "triton")
    started = read(fused, [row.to(DEVICE) for row in rows], steps)
    spoil(started)
    wanted = write(plain, cache, rows, steps)
    found = write(fused, started, [row.to(DEVICE) for row in rows], steps)
    assert error(found, wanted) < 1e-5
    spoil(started)
    spoil(cache)
    for one, other in zip(started.layers, cache.layers, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        for name, value in one.tensors.items():
            # slots that no row has yet are as many as the reading of the longest row left
            torch.testing.assert_close(
                value.double().cpu(), other.tensors[name], atol=1e-4, rtol=1e-4, equal_nan=True
            )


def test_the_projections_are_held_once_and_changes_of_them_are_seen(tiny, tokens, tmp_path) -> None:
    plain, fused = tiny(**ONE_LAYER).to(DEVICE), tiny(**ONE_LAYER).to(DEVICE)
    set_decode_backend(fused, "triton")
    before = copy.deepcopy(fused.state_dict())
    rows = [tokens(1, 9).to(DEVICE)]
    caches = [read(model, rows, 1) for model in (plain, fused)]

    def same() -> bool:
        logits = [
            write(model, copy.deepcopy(cache), rows, 1)
            for model, cache in zip((plain, fused), caches, strict=True)
        ]
        return error(logits[1], logits[0]) < 1e-4

    assert same()
    layer = fused.model.layers[0]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (
        layer.self_attn.q_proj.weight, layer.memory.q_proj.weight, layer.memory.mu_proj.weight,
    )}  # fmt: skip
    assert len(storages) == 1
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[name]), name
    fused.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, before[name].cpu()) for name, value in saved.items())

    for model in (plain, fused):  # in place
        with torch.no_grad():
            model.model.layers[0].memory.eta_proj.bias.add_(0.5)
            model.model.layers[0].self_attn.v_proj.weight.mul_(2)
    assert same()
    for model in (plain, fused):  # another tensor
        weight = torch.nn.Parameter(0.5 * model.model.layers[0].memory.v_proj.weight.detach())
        model.model.layers[0].memory.v_proj.weight = weight
    assert same()

    sharing = tiny(**ONE_LAYER, memory_off=True).to(DEVICE)  # a control of the same weights
    held = dict(fused.named_parameters())
    for name, parameter in sharing.named_parameters():
        parameter.data = held[name].data
    set_decode_backend(sharing, "triton")
    write(sharing, read(sharing, rows, 1), rows, 1)
    own = sharing.model.layers[0].self_attn.q_proj.weight
    assert own.data_ptr() == layer.self_attn.q_proj.weight.data_ptr()


def test_parameters_in_a_trainers_buffer_are_left_there(tiny, tokens, monkeypatch) -> None:
    from allmem_hf import modeling_allmem

    model, ids = tiny(**ONE_LAYER).to(DEVICE), tokens(1, 3).to(DEVICE)
    set_decode_backend(model, "triton")
    weights = [model.model.layers[0].self_attn.q_proj.weight, model.lm_head.weight]
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    weights[0].data = flat[: weights[0].numel()].view_as(weights[0])
    monkeypatch.setattr(modeling_allmem, "fused_step", None)
    write(model, read(model, [ids], 1), [ids], 1)
    assert weights[0].data_ptr() == flat.data_ptr()


class Launches(TorchDispatchMode):
    """Counts what a GPU would be started for: operations but views and allocations, kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = [x.alias_info for x in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and not any(x in str(func) for x in ("empty", "promote_types", "_unsafe_view")):
            self.counts[str(func)] += 1
        return out


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launches]]:
    """The counter that interpreted kernels count in, the last of the list."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    execute, active = interpreter.GridExecutor.__call__, []

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if active:
            active[-1].counts[executor.fn.__name__] += 1
        with _disable_current_modes():
            return execute(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    yield active
    active.clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
@pytest.mark.parametrize(
    ("branch", "backend", "launches"),
    [("allmem", "triton", 13), ("none", "triton", 11), ("allmem", "reference", 149),
     ("none", "reference", 61)],
)  # fmt: skip
def test_launches_of_a_layer(
    tiny, tokens, counting, monkeypatch, branch, backend, launches
) -> None:
    # DeepSpeed's ZeRO-3, in a test before this one, leaves another in its place: product, then bias
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    counts = []
    for layers in (1, 2):
        model = tiny(branch, num_hidden_layers=layers).bfloat16()
        set_decode_backend(model, backend)
        rows = [tokens(1, 18), tokens(1, 15)]
        cache = read(model, rows, 2)
        write(model, cache, [row[:, :-1] for row in rows], 1)
        counting.append(Launches())
        with counting[-1]:
            write(model, cache, rows, 1)
        counts.append(counting.pop().counts)
    of_a_layer = counts[1] - counts[0]
    assert of_a_layer.total() == launches, of_a_layer


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
def test_fused_steps_can_be_recorded_on_fixed_buffers(tiny, tokens, monkeypatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    execute = interpreter.GridExecutor.__call__

    def kept(executor: Any, *args: Any, **kwargs: Any) -> Any:
        mode = _get_current_dispatch_mode()
        if isinstance(mode, Recorder):  # as a CUDA graph keeps a launch
            mode.calls.append((partial(execute, executor), args, kwargs, None))
        with _disable_current_modes():
            return execute(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", kept)
    model, rows, steps = tiny(**ONE_LAYER), [tokens(1, 20), tokens(1, 17)], 7
    cache = read(model, rows, steps)  # beyond W + s, at other places of their chunks
    other = copy.deepcopy(cache)
    set_decode_backend(model, "triton")
    decoder, found = GraphedDecoder(model, cache, capture=recorded(cache)), []
    for left in range(steps, 0, -1):
        ids = torch.cat([row[:, row.shape[1] - left :][:, :1] for row in rows])
        found.append(decoder(ids).clone())
    set_decode_backend(model, "reference")
    assert error(torch.stack(found, 1), write(model, other, rows, steps)) < 1e-5


def test_only_decode_steps_that_have_kernels_are_fused(tiny, tokens, monkeypatch) -> None:
    from allmem_hf import modeling_allmem

    def refuse(*args: Any) -> None:
        raise AssertionError("a fused step")

    monkeypatch.setattr(modeling_allmem, "fused_step", refuse)
    ids = tokens(1, 3).to(DEVICE)
    for branch, changes in (
        ("mamba2", {}), ("allmem", {"full_attention": True}), ("allmem", {"write_off": True}),
    ):  # fmt: skip
        model = tiny(branch, **changes).to(DEVICE)
        set_decode_backend(model, "triton")
        assert "decode" not in model.kernel_backends()
        write(model, read(model, [ids], 1), [ids], 1)
    model = tiny().to(DEVICE)
    set_decode_backend(model, "triton")
    assert model.kernel_backends()["decode"] == "triton"
    cache = read(model, [ids], 1)
    model(ids[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True)  # with gradients
    with pytest.raises(AssertionError, match="a fused step"):
        write(model, cache, [ids], 1)
    set_decode_backend(model, "reference")
    write(model, cache, [ids], 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_on_a_cpu_steps_are_plain_unless_asked(tiny) -> None:
    model = tiny()
    assert "decode" not in model.kernel_backends()
    with pytest.raises(ValueError, match="backend='fast' is not one of"):
        set_decode_backend(model, "fast")


WIDE = {
    "hidden_size": 512, "head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 4,
    "memory_size": 256, "chunk_size": 64, "window_size": 700, "num_sinks": 9, "eta_init": 0.02,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_fused_steps_on_the_gpu_equal_the_plain_ones(tiny, tokens, dtype, bound) -> None:
    model = tiny("allmem", **WIDE, **ONE_LAYER).to("cuda", dtype)
    rows = [tokens(1, length, seed=length).cuda() for length in (71, 640, 1500)]
    cache, logits = read(model, rows, 20), []
    for backend in ("reference", "triton"):
        set_decode_backend(model, backend)
        logits.append(write(model, copy.deepcopy(cache), rows, 20))
    assert error(logits[1], logits[0]) < bound


@pytest.mark.gpu
def test_a_graph_of_fused_steps_equals_plain_steps(tiny, tokens) -> None:
    model = tiny("allmem", **{**WIDE, "window_size": 100}).cuda()
    rows = [tokens(1, length, seed=length).cuda() for length in (300, 333)]
    cache, steps = read(model, rows, 150), 150  # over two chunks of each row
    other = copy.deepcopy(cache)
    decoder = GraphedDecoder(model, cache)
    found = []
    for left in range(steps, 0, -1):
        ids = torch.cat([row[:, row.shape[1] - left :][:, :1] for row in rows])
        found.append(decoder(ids).clone())
    set_decode_backend(model, "reference")
    assert error(torch.stack(found, 1), write(model, other, rows, steps)) < 1e-3
