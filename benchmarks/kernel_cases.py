"""The operations of `benchmarks.kernels`: their inputs, and the versions that are compared.

Shape letters: B sequences, T tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import floors, kernel_peers
from benchmarks.contest import BOUNDS, NEEDS_CUDA, Contender, Contest, Function, Leaves
from benchmarks.kernel_pieces import PIECES, make_piece
from benchmarks.mixer_case import frozen_names, mixer_leaves, token_mixer
from benchmarks.rows import Row
from benchmarks.shapes import Shape
from kernels.swa import sliding_window_attention
from kernels.ttt_memory import FastWeights, memory_scan, reference

TF32_BOUND = 5e-3
_CHECK = 8192  # tokens
_SLOW_CHECK = 1024  # where the reference goes token by token, or forms T x T scores


def make_contest(
    op: str,
    shape: Shape,
    *,
    batch: int,
    tokens: int,
    backward: bool,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    spoil: str = "",
) -> Contest:
    """Inputs and versions of `op`.

    Args:
        op: what is measured: `memory`, `attention`, `mixer`, or one of `PIECES`.
        shape: sizes and settings.
        batch: B.
        tokens: T.
        backward: forward and backward, or forward alone.
        device: where.
        dtype: of activations and base weights; rates and fast weights are float32.
        compiled: also versions that torch.compile makes.
        spoil: a version whose output is made wrong.
    """
    direction = "forward+backward" if backward else "forward"
    case: Row = {
        "group": f"{op}/{direction}/{shape.name}/T={tokens}/B={batch}",
        "op": op,
        "pass": direction,
        "shape": shape.name,
        "tokens": tokens,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "window_size": shape.window_size,
        "num_sinks": shape.num_sinks,
        "chunk_size": shape.chunk_size,
    }
    makers = {"memory": _memory, "attention": _attention, "mixer": _mixer}
    makers |= {piece: partial(make_piece, piece) for piece in PIECES}
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    contest = makers[op](case, shape, draw, dtype, backward, compiled)
    contest.spoil = spoil
    return contest


def _memory(
    case: Row, shape: Shape, draw: Any, dtype: torch.dtype, backward: bool, compiled: bool
) -> Contest:
    """The scan of equations (8) to (11), and peers of another formula at the same shape."""
    batch, tokens, heads = case["batch"], case["tokens"], shape.memory_heads
    width, hidden = shape.memory_head_dim, shape.expansion * shape.memory_head_dim
    at = (batch, tokens, heads)
    leaves: Leaves = {
        "q": F.normalize(draw(*at, width), dim=-1).to(dtype),
        "k": F.normalize(draw(*at, width), dim=-1).to(dtype),
        "v": draw(*at, width).to(dtype),
        "eta": draw(*at, 3).sigmoid() * (8 / shape.chunk_size),
        "mu": draw(*at).sigmoid(),
        "g": F.logsigmoid(draw(*at) + 4),
        "beta": draw(*at).sigmoid(),
        "gate": draw(heads, hidden, width) * width**-0.5,
        "up": draw(heads, hidden, width) * width**-0.5,
        "down": draw(heads, width, hidden) * hidden**-0.5,
    }
    device, element = leaves["q"].device, leaves["q"].element_size()
    work = floors.memory_scan(shape, batch, tokens, element, backward=backward)
    exact = partial(_scan, backend="reference", chunk_size=shape.chunk_size)

    def ours(name: str, run: Function, **more: Any) -> Contender:
        first = _CHECK if backward else tokens
        given = {"bound": BOUNDS[dtype], "work": work, "check_tokens": first, **more}
        return Contender(name=name, run=run, reference=exact, **given)

    cuda = device.type == "cuda"
    fast = partial(_scan, backend="triton", chunk_size=shape.chunk_size)
    contenders = [
        ours("triton", fast, unavailable="" if cuda else NEEDS_CUDA),
        ours("plain", exact),
    ]
    step = partial(_scan_by_steps, chunk_size=shape.chunk_size, step=_compiled_step)
    contenders.append(
        ours("plain, compiled", step, unavailable="" if compiled else "left out by --no-compile")
    )
    if cuda:
        tf32 = {"context": _tf32, "bound": max(TF32_BOUND, BOUNDS[dtype])}
        contenders.append(ours("plain, TF32", exact, **tf32))
        if compiled:
            contenders.append(ours("plain, compiled, TF32", step, **tf32))
    lact = partial(kernel_peers.large_chunk_update, chunk_size=shape.chunk_size)
    by_autograd = partial(kernel_peers.large_chunk_update_by_autograd, chunk_size=shape.chunk_size)
    # its steps are rounded to bfloat16 and then normalised: errors of a few rounded products
    bound = 3e-2 if dtype == torch.bfloat16 else BOUNDS[dtype]
    contenders.append(
        Contender(
            name="LaCT, plain variant", run=partial(lact, products=dtype), reference=by_autograd,
            work=work, bound=bound, check_tokens=_CHECK,
        )
    )  # fmt: skip
    contenders.append(
        Contender(
            name="gated delta rule (fla)",
            run=kernel_peers.fla_gated_delta_rule,
            reference=kernel_peers.gated_delta_rule,
            work=floors.delta_rule(shape, batch, tokens, element, backward=backward),
            bound=BOUNDS[dtype],
            check_tokens=_SLOW_CHECK,
            unavailable=kernel_peers.fla_missing(device),
        )
    )
    wanted = tuple(leaves) if backward else ()
    along = frozenset(("q", "k", "v", "eta", "mu", "g", "beta"))
    return Contest(case=case, leaves=leaves, along=along, wanted=wanted, contenders=contenders)


def _scan(leaves: Leaves, *, backend: str, chunk_size: int) -> Tensor:
    weights = FastWeights(*(leaves[name] for name in ("gate", "up", "down")))
    streams = (leaves[name] for name in ("q", "k", "v", "eta", "mu"))
    out, _ = memory_scan(
        *streams, weights, chunk_size=chunk_size, backend=backend, return_state=False
    )
    return out


def chunk_step(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, mu: Tensor, *memory: Tensor
) -> tuple[Tensor, ...]:
    """One chunk by the reference's formulas: what is read, W, M; all heads first, float32.

    `memory` is W, M and the norms of equation (9), three matrices each.
    """
    weights, momentum, norms = (FastWeights(*memory[i : i + 3]) for i in (0, 3, 6))
    out = reference.read(q, weights)
    base = reference.normalise(weights, norms)
    steps = reference.descent(k, v, eta, base)
    mean = reference.chunk_mu(mu, eta)
    moved = [s + mean * m for s, m in zip(steps, momentum, strict=True)]
    return (out, *(w + m for w, m in zip(base, moved, strict=True)), *moved)


@cache
def _compile_step() -> Callable[..., Any]:
    return torch.compile(chunk_step, dynamic=False)


def _compiled_step(*tensors: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _compile_step()(*tensors)
    return found


def _scan_by_steps(leaves: Leaves, *, chunk_size: int, step: Callable[..., Any]) -> Tensor:
    """The scan as a loop over `chunk_step`."""
    start = [leaves[name].float() for name in ("gate", "up", "down")]
    norms = reference.row_norms(FastWeights(*start))
    rows = leaves["q"].shape[0]
    memory = [w.expand(rows, *w.shape) for w in start]
    memory += [torch.zeros_like(w) for w in memory]
    names = ("q", "k", "v", "eta", "mu")
    streams = [leaves[n].transpose(1, 2).float().contiguous().split(chunk_size, 2) for n in names]
    out = []
    for chunk in zip(*streams, strict=True):
        if chunk[0].shape[2] < chunk_size:
            out.append(reference.read(chunk[0], FastWeights(*memory[:3])))
            break
        found = step(*chunk, *memory, *norms)
        out.append(found[0])
        memory = list(found[1:])
    return torch.cat(out, 2).transpose(1, 2).to(leaves["q"].dtype)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Float32 matrix products on tensor cores, in 19 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------- attention


def _attention(
    case: Row, shape: Shape, draw: Any, dtype: torch.dtype, backward: bool, compiled: bool
) -> Contest:
    """Full causal attention, and window + sinks, without projections."""
    batch, tokens, width = case["batch"], case["tokens"], shape.head_dim
    leaves: Leaves = {
        "q": draw(batch, tokens, shape.num_heads, width).to(dtype),
        "k": draw(batch, tokens, shape.num_kv_heads, width).to(dtype),
        "v": draw(batch, tokens, shape.num_kv_heads, width).to(dtype),
    }
    device, element = leaves["q"].device, leaves["q"].element_size()
    cuda = device.type == "cuda"
    settings = {"window_size": shape.window_size, "num_sinks": shape.num_sinks}

    def contender(name: str, run: Function, window: bool, **more: Any) -> Contender:
        work = floors.attention(shape, batch, tokens, element, backward=backward, window=window)
        exact = partial(_windowed, backend="reference", **settings) if window else full_attention
        first = shape.window_size + shape.num_sinks + _SLOW_CHECK if window else _SLOW_CHECK
        first = tokens if window and not backward else first
        return Contender(
            name=name, run=run, reference=exact, work=work, bound=BOUNDS[dtype],
            check_tokens=first, **more,
        )  # fmt: skip

    no_cuda = "" if cuda else "needs a CUDA device"
    flex = "" if cuda else "FlexAttention on a CPU is not compiled here and forms T x T scores"
    contenders = [
        contender(
            "window: flex", partial(_windowed, backend="flex", **settings), True, unavailable=flex
        ),
        contender("window: plain", partial(_windowed, backend="reference", **settings), True),
        contender("full: SDPA", full_attention, False),
    ]
    for name, backend in (
        ("full: SDPA, flash", SDPBackend.FLASH_ATTENTION),
        ("full: SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        run = partial(full_attention, backend=backend, repeat=backend is SDPBackend.CUDNN_ATTENTION)
        contenders.append(contender(name, run, False, unavailable=no_cuda))
    contenders.append(
        contender(
            "full: flash-attn", kernel_peers.flash_attn_full, False,
            unavailable=kernel_peers.flash_attn_missing(device),
        )
    )  # fmt: skip
    wanted = ("q", "k", "v") if backward else ()
    along = frozenset(leaves)
    return Contest(case=case, leaves=leaves, along=along, wanted=wanted, contenders=contenders)


def _windowed(leaves: Leaves, *, backend: str, window_size: int, num_sinks: int) -> Tensor:
    return sliding_window_attention(
        leaves["q"], leaves["k"], leaves["v"],
        window_size=window_size, num_sinks=num_sinks, backend=backend,
    )  # fmt: skip


def full_attention(
    leaves: Leaves, *, backend: SDPBackend | None = None, repeat: bool = False
) -> Tensor:
    """Causal attention by PyTorch; `repeat` makes as many key-value heads as query heads first."""
    q, k, v = (leaves[name].transpose(1, 2) for name in ("q", "k", "v"))
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
    with chosen:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return out.transpose(1, 2)


# ------------------------------------------------------------------------------- token mixer


def _mixer(
    case: Row, shape: Shape, draw: Any, dtype: torch.dtype, backward: bool, compiled: bool
) -> Contest:
    """A layer's token mixer: full attention, the window alone, and window + memory."""
    batch, tokens = case["batch"], case["tokens"]
    leaves = {"x": draw(batch, tokens, shape.hidden_size).to(dtype)}
    leaves |= mixer_leaves(shape, draw, dtype)
    device, element = leaves["x"].device, leaves["x"].element_size()
    cuda = device.type == "cuda"
    memory = tuple(name for name in leaves if name not in frozen_names(shape))
    settings = {"window_size": shape.window_size, "num_sinks": shape.num_sinks}

    def windowed(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return sliding_window_attention(q, k, v, backend=backend, **settings)

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return full_attention({"q": q, "k": k, "v": v})

    def scan(backend: str) -> Function:
        return partial(_scan, backend=backend, chunk_size=shape.chunk_size)

    plain_window = partial(windowed, backend="reference")
    fast_window = partial(windowed, backend="auto")
    by_steps = partial(_scan_by_steps, chunk_size=shape.chunk_size, step=_compiled_step)

    def contender(name: str, formula: str, **more: Any) -> Contender:
        attend, inner, unavailable = more["attend"], more.get("scan"), more.get("unavailable", "")
        mix = partial(token_mixer, shape=shape, attend=attend, scan=inner, pieces=more["pieces"])
        exact_scan = None if inner is None else scan("reference")
        exact_window = full if formula == "full" else plain_window
        return Contender(
            name=name,
            run=mix,
            reference=partial(token_mixer, shape=shape, attend=exact_window, scan=exact_scan),
            work=floors.mixer(shape, batch, tokens, element, backward=backward, name=formula),
            bound=5 * BOUNDS[dtype],  # eight products one after the other
            check_tokens=shape.window_size + shape.num_sinks + _SLOW_CHECK
            if formula != "full"
            else _SLOW_CHECK,
            unavailable=unavailable,
        )

    no_compile = "" if compiled else "left out by --no-compile"
    no_triton = "" if cuda else NEEDS_CUDA
    branch = (
        ("triton + flex, fused", fast_window, scan("triton"), "fused", no_triton),
        ("triton + flex", fast_window, scan("triton"), "eager", no_triton),
        (
            "triton + flex, compiled",
            fast_window,
            scan("triton"),
            "compiled",
            no_triton or no_compile,
        ),
        ("plain", plain_window, scan("reference"), "eager", ""),
        ("plain, compiled", plain_window, by_steps, "compiled", no_compile),
    )
    contenders = [
        contender(f"allmem: {name}", "allmem", attend=attend, scan=inner, pieces=pieces,
                  unavailable=unavailable)
        for name, attend, inner, pieces, unavailable in branch
    ]  # fmt: skip
    for name, formula, attend in (
        ("window alone", "swa", fast_window),
        ("full: SDPA", "full", full),
    ):
        contenders.append(contender(name, formula, attend=attend, pieces="eager"))
        name = f"{name}, compiled"
        contenders.append(
            contender(name, formula, attend=attend, pieces="compiled", unavailable=no_compile)
        )
    wanted = ("x", *(name for name in memory if name != "x")) if backward else ()
    return Contest(
        case=case, leaves=leaves, along=frozenset(("x",)), wanted=wanted, contenders=contenders
    )
