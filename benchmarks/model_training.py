"""A training step of the Megatron model: the student's forward and backward pass, without teacher.

`swa` is the same model with the branch left out, so that the difference of the two is what the
memory costs. Activation checkpointing is on, as in the recipes of real models. B sequences, T
tokens, D model width.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.measure import Work, relative_error
from benchmarks.rows import failed, measured, missing, refused
from benchmarks.shapes import Shape
from pipeline.costs import flops_per_token

if TYPE_CHECKING:
    from benchmarks.model_bench import Bench

MODES = ("allmem", "swa")
BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_CHECKED_LAYERS = 2


def run(bench: Bench, shape: Shape, tokens: int) -> None:
    """Rows for `allmem` and `swa`, with the memory trained and with all weights trained."""
    for trained in ("memory", "all"):
        case = bench.case(f"training, {trained} trained", shape, "", tokens, 1)
        names = [mode for mode in MODES if not bench.results.has(case["group"], mode)]
        if not names:
            continue
        if importlib.util.find_spec("megatron") is None:
            why = "megatron-core is not installed, and the training model is built on it"
        elif bench.left_s < 0:
            why = "--budget-s was over"
        else:
            why = ""
        if why:
            for mode in names:
                bench.results.add(missing({**case, "mixer": mode}, mode, why))
            continue
        try:
            wrong = 1.1 if bench.given.spoil == "training" else 1.0
            error = check_error(shape, bench.device, bench.dtype, times=wrong)
            bound = BOUND[bench.dtype]
            if error <= bound:
                _measure(bench, shape, tokens, trained, case, error)
                continue
            for mode in names:
                bench.results.add(refused({**case, "mixer": mode}, mode, error, bound))
        except Exception as found:  # noqa: BLE001  # printed, and in the exit status
            for mode in names:
                bench.results.add(failed({**case, "mixer": mode}, mode, found))


def _measure(
    bench: Bench, shape: Shape, tokens: int, trained: str, case: dict[str, Any], error: float
) -> None:
    bench.drop_model()
    model = build(shape, bench.dtype, init_base=False).to(bench.device)
    with torch.no_grad():  # here, for drawing billions of numbers takes a CPU minutes
        for _, parameter in model.base_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    choose_trained(model, trained)
    ids = bench.tokens(shape, 1, tokens)
    like = torch.randn(1, tokens, shape.hidden_size, device=bench.device, dtype=bench.dtype)
    calls = {mode: _step(model, shape, mode, ids, like) for mode in MODES}
    bench.peak()
    timings = bench.watch.interleaved(
        calls, budget_s=bench.given.repeat_s, least=3, most=20, warmup=2
    )
    for mode in MODES:
        work = work_of(shape, mode, tokens, trained, bench.dtype.itemsize)
        more = {
            "mixer": mode,
            "trained": trained,
            "error": error,
            "error_bound": BOUND[bench.dtype],
            "peak_bytes": bench.peak(),
        }
        row = measured(case, mode, timings[mode], work, bench.ceilings, **more)
        bench.results.add(row)


def base_of(shape: Shape) -> Any:
    """The shape as the Megatron model takes it."""
    from allmem_megatron.config import BaseModelConfig

    return BaseModelConfig(
        family="qwen3",
        qk_norm=True,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=1 << 21,
    )


def build(shape: Shape, dtype: torch.dtype, *, init_base: bool = True) -> Any:
    """The model with its branch, on the CPU; alpha is not zero. Base weights are NaN without
    `init_base`."""
    from allmem_megatron.config import MemoryConfig
    from allmem_megatron.model import build_model

    memory = MemoryConfig(
        memory_size=shape.memory_size,
        num_heads=shape.memory_heads,
        expansion=shape.expansion,
        eta_init=8 / shape.chunk_size,
    )
    model = build_model(
        base_of(shape),
        branch="allmem",
        memory=memory,
        dtype=dtype,
        recompute=True,
        init_base=init_base,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for mixer in model.mixers():
            mixer.memory.alpha.normal_(std=0.3)
    return model


def choose_trained(model: Any, trained: str) -> None:
    """All weights, or the memory's.

    The embedding always is: the gradients of activations then go down to the first layer in both
    modes, as they do in conversion, where the first layer's memory needs them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or ".memory." in name or "embedding" in name)


def _settings(shape: Shape, mode: str) -> Any:
    from allmem_megatron.config import MixerSettings

    return MixerSettings(
        mode=mode,
        window_size=shape.window_size,
        num_sinks=shape.num_sinks,
        chunk_size=shape.chunk_size,
    )


def _step(model: Any, shape: Shape, mode: str, ids: Tensor, cotangent: Tensor) -> Any:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        with model.mixer(_settings(shape, mode)):
            model.hidden_states(ids).backward(cotangent)

    return step


def check_error(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, times: float = 1.0
) -> float:
    """Error of two layers, states and gradients of the memory, against higher precision on the CPU.

    The gradients are compared as one vector. `times` makes the states wrong, for tests.
    """
    window = min(shape.window_size, 512)
    small = replace(
        shape,
        num_layers=min(shape.num_layers, _CHECKED_LAYERS),
        vocab_size=min(shape.vocab_size, 512),
        window_size=window,
        chunk_size=min(shape.chunk_size, window // 2),
        num_sinks=min(shape.num_sinks, window // 8),
    )
    exact_dtype = torch.float64 if dtype == torch.float32 else torch.float32
    tokens = 2 * window + 7
    ids = torch.randint(0, small.vocab_size, (1, tokens))
    cotangent = torch.randn(1, tokens, small.hidden_size, dtype=dtype)
    model, exact = build(small, dtype), build(small, exact_dtype)
    exact.load_state_dict({n: _cast(x, exact_dtype) for n, x in model.state_dict().items()})
    model = model.to(device)
    found = []
    for one, where, kind in ((model, device, dtype), (exact, torch.device("cpu"), exact_dtype)):
        choose_trained(one, "memory")
        with one.mixer(_settings(small, "allmem")):
            states = one.hidden_states(ids.to(where))
            states.backward(cotangent.to(where, kind))
        grads = [p.grad.flatten().double().cpu() for _, p in one.memory_parameters()]
        found.append((states.detach().cpu(), torch.cat(grads)))
    found[0] = (times * found[0][0], found[0][1])
    return max(relative_error(a, b) for a, b in zip(*found, strict=True))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def work_of(shape: Shape, mode: str, tokens: int, trained: str, element: int) -> Work:
    """FLOPs without what checkpointing computes again; every weight read once each way.

    A product has two gradients, and one where its weight is frozen.
    """
    mixer = flops_per_token(mode, shape.mixer, tokens)
    window = flops_per_token("swa", shape.mixer, tokens)
    dense = 2.0 * shape.layer_weights
    layer = mixer + 6.0 * shape.hidden_size * shape.intermediate_size
    frozen = 0.0 if trained == "all" else dense
    flops = shape.num_layers * tokens * (3 * layer - frozen)
    weights = shape.layer_weights + (shape.branch_weights if mixer > window else 0)
    moved = shape.num_layers * weights * element * (3 if trained == "all" else 2)
    return Work(flops=flops, bytes=moved)
