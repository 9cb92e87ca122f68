"""The branch as it runs on a GPU: every Triton kernel in its place, interpreted on a CPU."""

from __future__ import annotations

import pytest
import torch

import kernels.ttt_memory as ttt_memory
from allmem_megatron.config import MixerSettings

pytest.importorskip("triton", reason="pip install triton (Linux) to test the Triton kernels")
from kernels.ttt_memory.triton_backend import branch as around
from kernels.ttt_memory.triton_backend import function

NODES = {
    "ConvHeads": around.ConvHeads,
    "GateNorm": around.GateNorm,
    "AddScaled": around.AddScaled,
    "Scan": function.Scan,
}
SETTINGS = MixerSettings(mode="allmem", window_size=8, num_sinks=3, chunk_size=4)


@pytest.mark.parametrize("bounds", [None, [0, 3, 10]])
def test_the_branch_by_triton_equals_the_branch_by_pytorch(
    bounds, hf_model, ours, set_alpha, monkeypatch
):
    model = ours(hf_model("qwen3", num_hidden_layers=1), branch="allmem")
    set_alpha(model, 0.5)
    tokens = torch.randint(0, 96, (1 if bounds else 2, 10))
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if ".memory." in n), strict=True
    )
    called = set()
    for name, node in NODES.items():

        def recorded(*arguments, _forward=node.forward, _name=name):
            called.add(_name)
            return _forward(*arguments)

        monkeypatch.setattr(node, "forward", staticmethod(recorded))
    results = []
    for backend in ("reference", "triton"):
        monkeypatch.setattr(ttt_memory, "auto_backend", lambda *_, _backend=backend: _backend)
        with model.mixer(SETTINGS):
            hidden = model.hidden_states(tokens, cu_seqlens=cu_seqlens)
        mix = torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)
        results.append([hidden, *torch.autograd.grad((hidden * mix).sum(), parameters)])
    assert called == set(NODES)
    for name, found, wanted in zip(("output", *names), *results, strict=True):
        assert (found - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, name
