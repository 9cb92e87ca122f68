"""What each mixer computes, its controls, and what trains."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from allmem_megatron.config import MemoryConfig, MixerSettings

WINDOW, SINKS, CHUNK = 8, 3, 4


def settings(mode="allmem", **changes):
    values = {"window_size": WINDOW, "num_sinks": SINKS, "chunk_size": CHUNK, **changes}
    return MixerSettings(mode=mode, **values)


def run(model, tokens, given, **kwargs):
    with torch.no_grad(), model.mixer(given):
        return model.logits(model.hidden_states(tokens, **kwargs))


def window_mask(num_tokens: int) -> torch.Tensor:
    """Additive [1, 1, T, T], token by token from the rule j <= t and (t - j < W or j < s)."""
    mask = torch.full((1, 1, num_tokens, num_tokens), float("-inf"))
    for t in range(num_tokens):
        for j in range(t + 1):
            if t - j < WINDOW or j < SINKS:
                mask[0, 0, t, j] = 0.0
    return mask


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("branch", ["allmem", "mamba2"])
def test_alpha_zero_is_the_base_model(family, branch, hf_model, ours, logits_atol):
    hf = hf_model(family)
    model = ours(hf, branch=branch)
    short = torch.randint(0, 96, (2, WINDOW))
    with torch.no_grad():
        expected = hf(short).logits
    torch.testing.assert_close(
        run(model, short, settings(branch)), expected, atol=logits_atol, rtol=0
    )
    long = torch.randint(0, 96, (2, 45))
    with torch.no_grad():
        expected = hf(long, attention_mask=window_mask(45)).logits
        full = hf(long).logits
    assert (full - expected).abs().max() > 100 * logits_atol
    for mode in ("swa", branch):
        got = run(model, long, settings(mode))
        torch.testing.assert_close(got, expected, atol=logits_atol, rtol=0)
    torch.testing.assert_close(run(model, long, settings("full")), full, atol=logits_atol, rtol=0)


@pytest.mark.parametrize("branch", ["allmem", "mamba2"])
def test_controls_do_what_they_say(branch, hf_model, ours, set_alpha, logits_atol):
    model = ours(hf_model("qwen3"), branch=branch)
    set_alpha(model, 1.0)
    tokens = torch.randint(0, 96, (3, 30))
    with_memory = run(model, tokens, settings(branch))
    window = run(model, tokens, settings("swa"))
    assert (with_memory - window).abs().max() > 0.01
    assert torch.equal(run(model, tokens, settings(branch, memory_off=True)), window)

    # write off: no state, so a token's branch depends on the tokens its window and conv reach
    first = run(model, tokens, settings(branch, write_off=True))
    assert (first - with_memory).abs().max() > 1e-3
    one_layer_reach = 2 * (WINDOW - 1) + 2 * 3 + 1
    changed = tokens.clone()
    changed[:, SINKS] = (changed[:, SINKS] + 1) % 96
    far = slice(SINKS + one_layer_reach, None)
    off = settings(branch, write_off=True)
    gone = run(model, changed, off)[:, far] - run(model, tokens, off)[:, far]
    kept = run(model, changed, settings(branch))[:, far] - with_memory[:, far]
    assert gone.abs().max() < 1e-6 < 1e-4 < kept.abs().max()

    # shuffled: row b reads what row b + 1 wrote; equal rows are not moved by it
    shuffled = settings(branch, shuffle_state=True)
    assert (run(model, tokens, shuffled) - with_memory).abs().max() > 1e-3
    equal = tokens[:1].expand(3, -1)
    torch.testing.assert_close(
        run(model, equal, shuffled), run(model, equal, settings(branch)), atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="at least 2 unpacked rows"):
        run(model, tokens[:1], shuffled)
    with pytest.raises(ValueError, match="at least 2 unpacked rows"):
        run(model, tokens[:1], shuffled, cu_seqlens=torch.tensor([0, 15, 30]))


def test_shuffled_state_is_the_next_rows_state(hf_model, ours, set_alpha):
    """One layer, checked against a scan that is run by hand with keys and queries of two rows."""
    from kernels.ttt_memory import FastWeights, memory_scan
    from kernels.ttt_memory.branch import eta_from, memory_output, memory_qk, mu_from

    model = ours(hf_model("qwen3", num_hidden_layers=1), branch="allmem")
    set_alpha(model, 1.0)
    branch = next(model.mixers()).memory
    x = torch.randn(12, 3, 48)  # [T, B, D]
    with torch.no_grad():
        got = branch(x, settings(shuffle_state=True), None)
        projections = (branch.q_proj, branch.k_proj, branch.v_proj)
        q, k, v = branch.convolved([branch.project(linear, x) for linear in projections], None)
        q, k = memory_qk(q, branch.q_norm, branch.eps), memory_qk(k, branch.k_norm, branch.eps)
        eta = eta_from(branch.project(branch.eta_proj, x).unflatten(-1, (-1, 3)))
        mu = mu_from(branch.project(branch.mu_proj, x))
        weights = FastWeights(branch.fast_gate, branch.fast_up, branch.fast_down)
        for b in range(3):
            other = slice((b + 1) % 3, (b + 1) % 3 + 1)
            row = (q[b : b + 1], k[other], v[other], eta[other], mu[other], weights)
            v_hat, _ = memory_scan(*row, chunk_size=CHUNK)
            gate = branch.project(branch.gate_proj, x[:, b : b + 1])
            mixed = memory_output(v_hat, branch.o_norm, gate, branch.eps)
            expected = branch.alpha * branch.o_proj(mixed.transpose(0, 1))[0]
            torch.testing.assert_close(got[:, b : b + 1], expected)


@pytest.mark.parametrize("branch", ["allmem", "mamba2"])
def test_only_the_branch_trains_when_the_base_is_frozen(branch, hf_model, ours, set_alpha):
    model = ours(hf_model("qwen3", tied=True), branch=branch)
    set_alpha(model, 0.5)
    for _, parameter in model.base_parameters():
        parameter.requires_grad_(False)
    tokens = torch.randint(0, 96, (2, 30))
    with model.mixer(settings(branch)):
        hidden = model.hidden_states(tokens)
    F.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert all(p.grad is None for _, p in model.base_parameters())
    for name, parameter in model.memory_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    # at the start, with alpha = 0, alpha alone moves: everything else waits for it
    model.zero_grad()
    set_alpha(model, 0.0)
    with model.mixer(settings(branch)):
        model.hidden_states(tokens).square().sum().backward()
    for name, parameter in model.memory_parameters():
        assert (parameter.grad.abs().sum() > 0) == name.endswith("alpha"), name


def test_no_graph_without_gradients(hf_model, ours, set_alpha):
    model = ours(hf_model("llama"), branch="allmem")
    set_alpha(model, 1.0)
    for batch in (1, 2):
        tokens = torch.randint(0, 96, (batch, 12))
        with torch.no_grad(), model.mixer(settings()):
            hidden = model.hidden_states(tokens)
        assert hidden.grad_fn is None
        assert not hidden.requires_grad


@pytest.mark.parametrize("mode", ["full", "allmem", "mamba2", "align"])
def test_recomputing_changes_no_gradient(mode, hf_model, ours, set_alpha):
    """The backward pass runs outside `mixer(...)` and must recompute what the forward pass did."""
    gradients = []
    for recompute in (False, True):
        branch = "mamba2" if mode == "mamba2" else "allmem"
        model = ours(hf_model("qwen3"), branch=branch, recompute=recompute)
        set_alpha(model, 0.5)
        torch.manual_seed(5)
        tokens = torch.randint(0, 96, (2, 26))
        with model.mixer(settings(mode)):
            hidden = model.hidden_states(tokens)
        loss = sum(model.align_losses()) if mode == "align" else hidden.square().mean()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_align_mode_trains_each_branch_towards_what_the_window_misses(hf_model, ours):
    hf = hf_model("qwen3")
    model = ours(hf, branch="allmem", memory=MemoryConfig(memory_size=32, eta_init=0.5))
    for _, parameter in model.base_parameters():
        parameter.requires_grad_(False)
    tokens = torch.randint(0, 96, (4, 40))
    full = run(model, tokens, settings("full"))
    assert torch.equal(run(model, tokens, settings("align")), full)
    assert not any(loss.requires_grad for loss in model.align_losses())  # `run` has gradients off
    optimizer = torch.optim.Adam([p for _, p in model.memory_parameters()], lr=2e-2)
    history = []
    for _ in range(30):
        with model.mixer(settings("align")):
            hidden = model.hidden_states(tokens)
        losses = model.align_losses()
        assert len(losses) == 2
        assert not hidden.requires_grad
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append(float(sum(losses)))
    with model.mixer(settings("align")):  # a single row reaches the layers as a view
        assert not model.hidden_states(tokens[:1]).requires_grad
    assert all(loss.requires_grad for loss in model.align_losses())
    assert history[0] == pytest.approx(2.0)  # alpha = 0: all of it is missing, in both layers
    assert history[-1] < 1.7
    with pytest.raises(ValueError, match="no alignment losses"):
        model.align_losses()
    # window, or window and sinks, see everything: nothing to learn, no NaN, no rounding to learn
    for num_tokens in (WINDOW, WINDOW + 1, WINDOW + SINKS):
        with model.mixer(settings("align")):
            model.hidden_states(tokens[:, :num_tokens])
        assert [float(loss) for loss in model.align_losses()] == [0.0, 0.0]


@pytest.mark.parametrize("mode", ["full", "allmem", "mamba2"])
def test_bfloat16_stays_near_float32(mode, hf_model, ours, set_alpha):
    hf, tokens = hf_model("qwen3"), torch.randint(0, 96, (2, 33))
    hidden = []
    for dtype in (torch.float32, torch.bfloat16):
        branch = "mamba2" if mode == "mamba2" else "allmem"
        model = ours(hf, branch=branch, dtype=dtype)
        set_alpha(model, 0.5)
        with model.mixer(settings(mode)):
            out = model.hidden_states(tokens)
        assert out.dtype == dtype
        out.float().square().mean().backward()
        assert all(
            p.grad is None or (p.grad.dtype == dtype and p.grad.isfinite().all())
            for p in model.parameters()
        )
        hidden.append(out.detach().float())
    error = (hidden[0] - hidden[1]).norm() / hidden[0].norm()
    assert error < 0.03


def test_settings_end_with_their_block_and_need_their_branch(hf_model, ours):
    model = ours(hf_model("qwen3"), branch="allmem")
    before = model.settings
    with model.mixer(settings()), model.mixer(settings("swa")):
        assert model.settings.mode == "swa"
    assert model.settings is before
    assert before.mode == "full"
    wrong = model.mixer(settings("mamba2"))
    with pytest.raises(ValueError, match="mode='mamba2' needs a model with branch mamba2"), wrong:
        pass
    bare = ours(hf_model("qwen3"))
    with pytest.raises(ValueError, match="branch='none'"), bare.mixer(settings("align")):
        pass
    assert list(bare.memory_parameters()) == []
    assert bare.memory_statistics() == {}


def test_statistics_tell_alpha_eta_and_mu(hf_model, ours, set_alpha):
    model = ours(hf_model("qwen3"), branch="allmem")
    set_alpha(model, 0.3)
    tokens = torch.randint(0, 96, (1, 9))
    run(model, tokens, settings())
    statistics = model.memory_statistics()
    assert "eta/std" not in statistics
    alphas = [m.memory.alpha.abs().mean().item() for m in model.mixers()]
    assert [statistics[f"alpha_abs/layer_{i:02d}"] for i in range(2)] == pytest.approx(alphas)
    assert statistics["eta/mean"] == pytest.approx(0.1, rel=0.2)
    assert statistics["mu/mean"] == pytest.approx(0.5, rel=0.2)
    layers = [statistics[f"eta/layer_{i:02d}"] for i in range(2)]
    assert sum(layers) / 2 == pytest.approx(statistics["eta/mean"])

    with model.noting_spread():
        run(model, tokens, settings())
    for name in ("eta", "mu"):
        found = model.memory_statistics()
        assert found[f"{name}/min"] < found[f"{name}/mean"] < found[f"{name}/max"]
        assert 0 < found[f"{name}/std"] < found[f"{name}/max"] - found[f"{name}/min"]


def test_bounds_of_packed_documents_are_checked(hf_model, ours):
    model = ours(hf_model("qwen3"))
    tokens = torch.zeros(1, 10, dtype=torch.long)
    for bounds in ([0, 5], [0, 7, 3, 10], [1, 10], [10]):
        with pytest.raises(ValueError, match="must rise from 0 to the 10 tokens"):
            model.hidden_states(tokens, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="packed documents are one row"):
        model.hidden_states(tokens.expand(2, -1), cu_seqlens=torch.tensor([0, 10]))
