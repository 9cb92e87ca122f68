"""Whole models over ranks; see test_context_parallel_model.py."""

from __future__ import annotations

import weakref
from typing import Any

import layouts
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional as F

from allmem_megatron import exchange
from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.context_parallel import take_shard
from allmem_megatron.convert import model_to_hf
from allmem_megatron.exchange import drain
from allmem_megatron.model import AllMemGPTModel, build_model

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True, "head_dim": 16},
    "qwen2": {"qkv_bias": True, "head_dim": 8},
    "llama": {"head_dim": 8},
}
VOCABULARY = 64
Named = dict[str, Tensor]
references: dict[str, Named] = {}


def build(
    family: str,
    branch: str,
    *,
    sequence_parallel: bool = False,
    recompute: bool = False,
    dtype: torch.dtype = torch.float32,
) -> AllMemGPTModel:
    base = BaseModelConfig(
        family=family,
        hidden_size=48,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        intermediate_size=80,
        vocab_size=VOCABULARY,
        **FAMILIES[family],
    )
    model = build_model(
        base,
        branch=branch,
        memory=MemoryConfig(memory_size=32, num_heads=4, eta_init=0.2),
        seed=4,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        embedding_std=0.5,
        dtype=dtype,
    )
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.memory_parameters()):
            if name.endswith("alpha"):
                noise = layouts.random(*parameter.shape, seed=number)
                parameter.copy_(noise.to(parameter.dtype))
    return model


def gradients(model: AllMemGPTModel) -> Named:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return model_to_hf(model, found)


def run(
    model: AllMemGPTModel,
    settings: MixerSettings,
    rows: int,
    num_tokens: int,
    bounds: list[int] | None,
    cp_mode: str | None,
) -> Named:
    """Outputs of this rank's tokens and this rank's gradients."""
    generator = torch.Generator().manual_seed(num_tokens)
    tokens = torch.randint(0, VOCABULARY, (rows, num_tokens), generator=generator)
    targets = tokens.roll(-1, 1)
    packed = None if bounds is None else torch.tensor(bounds)
    share = 1.0
    if cp_mode is not None:
        group = layouts.group()
        tokens, targets = (take_shard(x, group.rank(), group.size()) for x in (tokens, targets))
        share = 1 / group.size()
    with model.mixer(settings):
        hidden = model.hidden_states(tokens, cu_seqlens=packed, cp_mode=cp_mode)
    if settings.mode == "align":
        losses = torch.stack(model.align_losses())
        (losses * torch.tensor([1.0, 3.0])).sum().mul(share).backward()
        out = {"hidden": hidden.detach(), "losses": losses.detach()}
    else:
        logits = model.logits(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        (loss / (rows * num_tokens)).backward()
        out = {"hidden": hidden.detach(), "logits": logits.detach()}
    drain()
    return {**out, **{f"gradient {n}": g for n, g in gradients(model).items()}}


def reference(mode: str, sizes: dict[str, Any], **inputs: Any) -> Named:
    """The same on one rank; kept, for layouts share it."""
    key = repr((mode, sorted(sizes.items()), sorted(inputs.items())))
    if key not in references:
        layouts.switch(1, dist.get_world_size())
        model = build(inputs.pop("family"), branch_of(mode))
        references[key] = run(model, MixerSettings(mode=mode, **sizes), cp_mode=None, **inputs)
    return references[key]


def branch_of(mode: str) -> str:
    return {"full": "none", "swa": "none", "mamba2": "mamba2"}.get(mode, "allmem")


def model(
    tp: int,
    cp: int,
    cp_mode: str,
    mode: str,
    family: str,
    rows: int,
    num_tokens: int,
    bounds: list[int] | None,
    sequence_parallel: bool,
    recompute: bool,
    sizes: dict[str, Any],
) -> dict[str, float]:
    """Deviations of outputs and of every parameter's gradient from one rank."""
    inputs = {"rows": rows, "num_tokens": num_tokens, "bounds": bounds}
    wanted = reference(mode, sizes, family=family, **inputs)
    layouts.switch(tp, cp)
    built = build(family, branch_of(mode), sequence_parallel=sequence_parallel, recompute=recompute)
    got = run(built, MixerSettings(mode=mode, **sizes), cp_mode=cp_mode, **inputs)
    group = layouts.group()
    found = {} if got.keys() == wanted.keys() else {"names": float("inf")}
    # some gradients are 0 but for rounding: a key's norm where each token sees one key
    least = max(float(g.abs().max()) for n, g in wanted.items() if n.startswith("gradient")) / 1e3
    for name, value in got.items():
        if name.startswith("gradient"):
            dist.all_reduce(value, group=group)
            found[name] = layouts.deviation(value, wanted[name], least)
        elif name == "losses":
            found[name] = layouts.deviation(value, wanted[name])
        else:
            found[name] = layouts.deviation(value, take_shard(wanted[name], group.rank(), cp))
    return layouts.worst(found)


def several_passes(cp_mode: str, recompute: bool) -> dict[str, float]:
    """A teacher's pass and two students' before their backward passes, as training has them."""
    layouts.switch(1, 4)
    rank = layouts.group().rank()
    built = build("qwen3", "allmem", recompute=recompute)
    for _, parameter in built.base_parameters():
        parameter.requires_grad_(False)
    sizes = {"window_size": 6, "num_sinks": 2, "chunk_size": 4}
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))

    def step(own: Tensor, mode: str | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = built.hidden_states(own, cp_mode=mode)
        assert teacher.grad_fn is None
        with built.mixer(MixerSettings(mode="allmem", **sizes)):
            students = [built.hidden_states(own, cp_mode=mode) for _ in range(2)]
        losses = [(student - teacher).square().sum() for student in students]
        (losses[0] + 2 * losses[1]).backward()
        return teacher, students[1].detach()

    wanted = (*step(tokens, None), gradients(built))
    got = (*step(take_shard(tokens, rank, 4), cp_mode), gradients(built))
    drain()
    found = {
        name: layouts.deviation(got[i], take_shard(wanted[i], rank, 4))
        for i, name in enumerate(("teacher", "student"))
    }
    for name, gradient in got[2].items():
        dist.all_reduce(gradient, group=layouts.group())
        found[name] = layouts.deviation(gradient, wanted[2][name])
    return layouts.worst(found)


def orders(
    cp: int,
    cp_mode: str,
    mode: str,
    recompute: bool,
    rows: int,
    num_tokens: int,
    bounds: list[int] | None,
    sizes: dict[str, Any],
) -> dict[str, Any]:
    """In which order this rank exchanges messages, and finishes parameters' gradients."""
    layouts.switch(1, cp)
    built = build("qwen3", branch_of(mode), recompute=recompute)
    names: list[str] = []
    for name, parameter in built.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: names.append(name))
    exchange.trace = []
    try:
        run(built, MixerSettings(mode=mode, **sizes), rows, num_tokens, bounds, cp_mode)
        messages = [event.name for event in exchange.trace]
    finally:
        exchange.trace = None
    return {"rank": layouts.group().rank(), "gradients": names, "messages": messages}


def bfloat16(mode: str, cp_mode: str) -> dict[str, float]:
    """Deviations in norm of a bfloat16 model over ranks from itself on one rank."""
    layouts.switch(1, 4)
    rank = layouts.group().rank()
    built = build("qwen3", branch_of(mode), dtype=torch.bfloat16)
    settings = MixerSettings(mode=mode, window_size=6, num_sinks=2, chunk_size=4)
    wanted = run(built, settings, 2, 24, None, None)
    got = run(built, settings, 2, 24, None, cp_mode)
    found = {}
    for name, value in got.items():
        value = value.float()
        if name.startswith("gradient"):
            dist.all_reduce(value, group=layouts.group())
            other = wanted[name].float()
        else:
            other = take_shard(wanted[name], rank, 4).float()
        found[name] = float((value - other).norm() / other.norm())
    return layouts.worst(found)


def graph_is_freed(cp_mode: str) -> dict[str, bool]:
    """Whether a pass's messages are forgotten with its graph, and without one at once."""
    layouts.switch(1, 4)
    built = build("qwen3", "allmem", recompute=True)
    tokens = torch.zeros(1, 6, dtype=torch.long)
    kept: list[Any] = []
    context = built._context

    def watched(*arguments: Any) -> Any:
        made = context(*arguments)
        kept.append(weakref.ref(made.exchange))
        return made

    built._context = watched  # type: ignore[method-assign]
    settings = MixerSettings(mode="allmem", window_size=6, num_sinks=2, chunk_size=4)
    with built.mixer(settings):
        with torch.no_grad():
            built.hidden_states(tokens, cp_mode=cp_mode)
        found = {"without gradients": kept[0]() is None}
        hidden = built.hidden_states(tokens, cp_mode=cp_mode)
        found["kept for the backward pass"] = kept[1]() is not None
        hidden.sum().backward()
        del hidden
        found["after the backward pass"] = kept[1]() is None
    drain()
    return found


def refusals() -> dict[str, str]:
    """The messages of wrong calls, none of which reaches another rank."""
    found = {}
    tokens = torch.zeros(1, 6, dtype=torch.long)
    shuffled = MixerSettings(mode="allmem", window_size=6, chunk_size=4, shuffle_state=True)

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except ValueError as error:
            found[name] = str(error)

    layouts.switch(1, 4)
    built = build("qwen3", "allmem")
    with built.mixer(shuffled):
        attempt("shuffle", lambda: built.hidden_states(tokens.expand(2, -1), cp_mode="wavefront"))
    attempt("mode", lambda: built.hidden_states(tokens, cp_mode="ring"))
    cu_seqlens = torch.tensor([0, 6])
    attempt("bounds", lambda: built.hidden_states(tokens, cu_seqlens=cu_seqlens, cp_mode="a2a"))
    attempt("tokens", lambda: take_shard(torch.zeros(1, 25), 0, 4))
    layouts.switch(2, 2)
    split = build("qwen3", "none", sequence_parallel=True)
    attempt("sp", lambda: split.hidden_states(tokens[:, :5], cp_mode="wavefront"))
    attempt("layout", lambda: layouts.init_model_parallel(1, 4))
    assert parallel_state.get_context_parallel_world_size() == 2
    return found


CASES = {
    "model": model,
    "several_passes": several_passes,
    "orders": orders,
    "bfloat16": bfloat16,
    "graph_is_freed": graph_is_freed,
    "model_refusals": refusals,
}
