"""Sizes, initial weights, and what is refused before anything runs."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch

from allmem_megatron.base_files import read_base_config
from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.convert import from_hf, load_base, load_hf_tensors, model_to_hf, save_hf_dir
from allmem_megatron.initialise import generator_for, memory_from_base
from allmem_megatron.model import build_model, check_sizes
from allmem_megatron.parallel import init_model_parallel

QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
}
QWEN3_17B = {**QWEN3_06B, "hidden_size": 2048, "intermediate_size": 6144}


@pytest.mark.parametrize(
    ("hf", "added_millions", "paper_millions", "paper_percent"),
    [(QWEN3_06B, 65.6, 66, 9.9), (QWEN3_17B, 125.5, 126, 6.8)],
    ids=["0.6B", "1.7B"],
)
def test_added_parameters_are_the_papers(hf, added_millions, paper_millions, paper_percent):
    """65.58 M and 125.48 M: the paper's percentages to the digit, its millions within 0.53."""
    base = BaseModelConfig.from_hf(hf)
    model = build_model(base, branch="allmem", dtype=torch.bfloat16, meta=True)
    added = sum(p.numel() for _, p in model.memory_parameters())
    whole = added + sum(p.numel() for _, p in model.base_parameters())
    n, d, d_h, width = 8, 512, 64, base.hidden_size
    convolution, norms, biases = 3 * d * 4, 3 * d_h, 5 * n
    layer = 4 * d * width + 41 * width + 3 * n * d_h * 2 * d_h + convolution + norms + biases
    assert added == 28 * layer
    assert round(added / 1e6, 1) == added_millions
    assert added / 1e6 == pytest.approx(paper_millions, abs=0.53)
    assert round(100 * added / whole, 1) == paper_percent
    assert all(p.is_meta for p in model.parameters())


def test_mamba2_has_about_as_many_parameters_as_the_memory():
    base = BaseModelConfig.from_hf(QWEN3_06B)
    counts = []
    for branch, state_size in (("allmem", None), ("mamba2", None), ("mamba2", 80)):
        memory = MemoryConfig(state_size=state_size)
        model = build_model(base, branch=branch, memory=memory, meta=True)
        counts.append(sum(p.numel() for _, p in model.memory_parameters()))
    assert counts[1] / counts[0] == pytest.approx(0.905, abs=0.005)
    assert counts[2] / counts[0] == pytest.approx(1.02, abs=0.005)


def test_initial_weights_follow_the_specification(hf_config):
    base = BaseModelConfig.from_hf(hf_config("qwen3", True))
    memory = MemoryConfig(memory_size=32, eta_init=0.05)
    model = build_model(base, branch="allmem", memory=memory, embedding_std=1.0)
    weights = model_to_hf(model)
    prefix = "model.layers.1.memory."
    assert (weights[prefix + "alpha"] == 0).all()
    assert (weights[prefix + "mu_proj.bias"] == 0).all()
    assert (weights[prefix + "gate_proj.bias"] == 0).all()
    softplus = torch.nn.functional.softplus(weights[prefix + "eta_proj.bias"])
    torch.testing.assert_close(softplus, torch.full((6,), 0.05))
    taps = weights[prefix + "q_conv.weight"]
    assert (taps[:, -1] == 1).all()
    assert (taps[:, :-1] == 0).all()
    assert weights[prefix + "o_proj.weight"].std() == pytest.approx(0.02, rel=0.1)
    for name, fan_in in (("fast_gate", 16), ("fast_up", 16), ("fast_down", 32)):
        assert weights[prefix + name].std() == pytest.approx(fan_in**-0.5, rel=0.1)
    assert weights["model.embed_tokens.weight"].std() == pytest.approx(1.0, rel=0.05)
    assert (weights["model.norm.weight"] == 1).all()
    # a tensor depends on seed and name alone
    drawn = torch.randn(32, 48, generator=generator_for(0, prefix + "k_proj.weight")) * 48**-0.5
    assert torch.equal(weights[prefix + "k_proj.weight"], drawn)
    again = model_to_hf(build_model(base, branch="allmem", memory=memory, embedding_std=1.0))
    other = model_to_hf(build_model(base, branch="allmem", memory=memory, seed=1))
    bare = model_to_hf(build_model(base, embedding_std=1.0))
    for name, tensor in weights.items():
        assert torch.equal(tensor, again[name])
        assert ".memory." in name or torch.equal(tensor, bare[name])
    assert not torch.equal(other[prefix + "k_proj.weight"], drawn)


def test_base_weights_left_out_are_nan_until_loaded(hf_model, hf_tensors):
    hf = hf_model("qwen3")
    base = BaseModelConfig.from_hf(hf.config.to_dict())
    memory = MemoryConfig(memory_size=16)
    drawn = build_model(base, branch="allmem", memory=memory)
    model = build_model(base, branch="allmem", memory=memory, init_base=False)
    assert all(p.isnan().all() for _, p in model.base_parameters())
    for (name, p), (_, q) in zip(model.memory_parameters(), drawn.memory_parameters(), strict=True):
        assert torch.equal(p, q), name
    load_hf_tensors(model, hf_tensors(hf), part="base")
    assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("n", "d_h"), [(2, 4), (2, 12), (1, 8), (4, 8), (6, 8)])
def test_memory_can_start_from_the_base(n, d_h, family, hf_model, ours):
    """2 key-value heads, 3 queries to each."""
    memory = MemoryConfig(memory_size=n * d_h, num_heads=n)
    model = ours(hf_model(family), branch="allmem", memory=memory)
    with torch.no_grad():
        for name, parameter in model.base_parameters():
            if "q_layernorm" in name or "k_layernorm" in name:
                parameter.uniform_(0.5, 1.5)
    width = model.base_config.head_dim
    before = model_to_hf(model)
    memory_from_base(model)
    after = model_to_hf(model)
    self_attn, start = "model.layers.1.self_attn.", "model.layers.1.memory."
    got = {x: after[f"{start}{x}_proj.weight"].view(n, d_h, 48) for x in "qkv"}
    got["o"] = after[f"{start}o_proj.weight"].T.reshape(n, d_h, 48)
    base = {x: before[f"{self_attn}{x}_proj.weight"] for x in "qkv"}
    base["o"] = before[f"{self_attn}o_proj.weight"].T
    in_group = {0: 0, 1: 0}
    for j in range(n):
        group = j * 2 // n
        for row in range(d_h):
            for x in "kv":
                torch.testing.assert_close(
                    got[x][j, row], base[x].view(2, width, 48)[group, row % width]
                )
            queries = base["q"].view(2, 3, width, 48)[group, :, row % width]
            outputs = base["o"].reshape(2, 3, width, 48)[group, :, row % width]
            if n > 2:  # several memory heads share the group: each takes another query head
                torch.testing.assert_close(got["q"][j, row], queries[in_group[group]])
                torch.testing.assert_close(got["o"][j, row], outputs[in_group[group]])
            else:
                torch.testing.assert_close(got["q"][j, row], queries.mean(0))
                torch.testing.assert_close(got["o"][j, row], outputs.sum(0))
        in_group[group] += 1
    for x in "qk":
        norm = before.get(f"{self_attn}{x}_norm.weight", torch.ones(width))
        torch.testing.assert_close(
            after[f"{start}{x}_norm.weight"], norm[torch.arange(d_h) % width]
        )
    for name in ("o_norm.weight", "fast_gate", "alpha", "eta_proj.bias"):
        assert torch.equal(after[start + name], before[start + name])
    with pytest.raises(ValueError, match="no memory to start"):
        memory_from_base(ours(hf_model(family)))


def test_gate_and_up_can_start_wider():
    base = BaseModelConfig(
        family="llama", hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
        intermediate_size=32, vocab_size=64,
    )  # fmt: skip
    memory = MemoryConfig(memory_size=64, gate_up_std=3.0)
    wide = model_to_hf(build_model(base, branch="allmem", memory=memory))
    plain = model_to_hf(build_model(base, branch="allmem", memory=MemoryConfig(memory_size=64)))
    start = "model.layers.0.memory."
    for name in ("fast_gate", "fast_up"):
        torch.testing.assert_close(wide[start + name], plain[start + name] * 3.0 * 32**0.5)
    assert torch.equal(wide[start + "fast_down"], plain[start + "fast_down"])
    with pytest.raises(ValueError, match="gate_up_std"):
        MemoryConfig(gate_up_std=0.0)


def test_momentum_and_matrices_that_start_switched_off_stay_off(hf_model, ours, set_alpha):
    memory = MemoryConfig(memory_size=16, eta_init=0.1, momentum=False, writes=("down",))
    model = ours(hf_model("llama"), branch="allmem", memory=memory)
    set_alpha(model, 0.5)
    branch = [parameter for _, parameter in model.memory_parameters()]
    optimizer = torch.optim.AdamW(branch, lr=1e-2, weight_decay=0)
    settings = MixerSettings(mode="allmem", window_size=8, num_sinks=0, chunk_size=8)
    weights = model_to_hf(model)
    before = {name: weights[name].clone() for name in weights if "eta_proj" in name}
    for _ in range(5):
        optimizer.zero_grad()
        with model.mixer(settings):
            model.hidden_states(torch.randint(0, 96, (2, 32))).square().sum().backward()
        optimizer.step()
    after = model_to_hf(model)
    for name, start in before.items():
        now = after[name].unflatten(0, (-1, 3))
        assert (now[:, :2] - start.unflatten(0, (-1, 3))[:, :2]).abs().max() < 1e-4
        assert (now[:, 2] - start.unflatten(0, (-1, 3))[:, 2]).abs().max() > 1e-3
    for mixer in model.mixers():
        assert 0 < mixer.memory.mean_mu < 1e-12
        assert 0.02 < mixer.memory.mean_eta < 0.05  # a third of the rates


def test_matrices_that_a_network_does_not_have_are_refused():
    for writes in ((), ("down", "value")):
        with pytest.raises(ValueError, match="gate, up, down"):
            MemoryConfig(writes=writes)


def test_init_from_base_happens_on_loading(tmp_path, hf_model):
    hf = hf_model("qwen3")
    hf.save_pretrained(tmp_path)
    from allmem_megatron.convert import load_base_into

    checkpoint = load_base(tmp_path)
    memory = MemoryConfig(memory_size=16, init_from_base=True)
    model = build_model(checkpoint.config, branch="allmem", memory=memory)
    load_base_into(model, checkpoint)
    rows = dict(hf.named_parameters())["model.layers.0.self_attn.v_proj.weight"].view(2, 16, 48)
    got = model_to_hf(model)["model.layers.0.memory.v_proj.weight"].view(2, 8, 48)
    assert torch.equal(got, rows[:, :8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type='gemma' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"num_key_value_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_unsupported_base_models_are_refused(changes, message, hf_config):
    with pytest.raises(ValueError, match=message):
        BaseModelConfig.from_hf(hf_config("llama", False, **changes))


def test_bad_settings_are_refused(hf_config):
    with pytest.raises(ValueError, match="chunk_size=65 > window_size=64"):
        MixerSettings(mode="allmem", window_size=64, chunk_size=65)
    with pytest.raises(ValueError, match="mode='smw' is not known"):
        MixerSettings(mode="smw")
    with pytest.raises(ValueError, match="num_sinks=-1"):
        MixerSettings(num_sinks=-1)
    base = BaseModelConfig.from_hf(hf_config("llama", False))
    with pytest.raises(ValueError, match="branch='ttt' is not known"):
        build_model(base, branch="ttt")
    with pytest.raises(ValueError, match=r"3 heads; set mixer.memory.memory_size to 528 or .*$"):
        build_model(base, branch="allmem", memory=MemoryConfig(num_heads=3))
    with pytest.raises(
        ValueError, match=r"mixer\.memory\.memory_size=64 is not .* its 3 heads"
    ) as e:
        build_model(base, branch="mamba2", memory=MemoryConfig(memory_size=64, num_heads=3))
    assert str(e.value).endswith("a divisor")  # core's own words do not follow the mend
    for field, value in (("eta_init", 0), ("conv_kernel", 3), ("decay", 1.0), ("clip", -1.0)):
        with pytest.raises(ValueError, match=rf"^mixer\.memory\.{field}={value}"):
            MemoryConfig(**{field: value})


def test_ranks_that_do_not_fit_are_refused_by_the_call_that_sets_them(hf_config):
    base = BaseModelConfig.from_hf(hf_config("llama", False))
    for memory, name in ((None, "num_kv_heads=2"), (MemoryConfig(num_heads=8), "num_kv_heads=2")):
        with pytest.raises(ValueError, match=rf"{name} .* tp=4 ranks; call init_.*\(tp=2\)"):
            check_sizes(base, memory, tp=4)
    with pytest.raises(ValueError, match=r"memory.num_heads=1 does not .* init_.*\(tp=1\)"):
        check_sizes(base, MemoryConfig(num_heads=1), tp=2)
    init_model_parallel()
    init_model_parallel(tp=1, cp=1)  # the same again
    with pytest.raises(ValueError, match=r"cp=2 asked for, but .* tp=1, cp=1; start a new process"):
        init_model_parallel(cp=2)


def test_tensors_that_do_not_fit_are_refused(hf_model, hf_tensors, ours):
    hf = hf_model("qwen3", tied=True)
    model, tensors = ours(hf), hf_tensors(hf)
    name = "model.layers.0.self_attn.k_proj.weight"
    missing = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(ValueError, match=r"k_proj.weight is missing"):
        load_hf_tensors(model, missing)
    with pytest.raises(ValueError, match=r"k_proj.weight is missing"):
        from_hf(missing, model.base_config)
    with pytest.raises(ValueError, match=r"has shape \(3, 48\), the model wants \(32, 48\)"):
        load_hf_tensors(model, {**tensors, name: torch.zeros(3, 48)})
    with pytest.raises(ValueError, match=r"experts.* has no place in the model"):
        load_hf_tensors(model, {**tensors, "model.layers.0.mlp.experts.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="is no Hugging Face tensor"):
        from_hf({**tensors, "model.layers.0.mlp.experts.weight": torch.zeros(1)}, model.base_config)
    # a tied model may store its head again, but not another one
    embedding = tensors["model.embed_tokens.weight"]
    load_hf_tensors(model, {**tensors, "lm_head.weight": embedding.clone()})
    with pytest.raises(ValueError, match=r"lm_head.weight differs"):
        load_hf_tensors(model, {**tensors, "lm_head.weight": embedding + 1})


def test_broken_directories_are_refused(tmp_path, hf_model):
    hf_model("qwen2").save_pretrained(tmp_path / "m", max_shard_size=20_000)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_base(tmp_path / "m")
    shards[1].unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_base(tmp_path / "m")
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match=r"which model.safetensors.index.json promises"):
        load_base(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no readable JSON"):
        load_base(tmp_path / "m")
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        load_base(tmp_path)


def test_saved_files_have_the_permissions_that_the_umask_leaves(tmp_path, hf_model, hf_tensors):
    hf = hf_model("llama")
    before = os.umask(0o027)
    try:
        save_hf_dir(tmp_path / "m", hf.config.to_dict(), hf_tensors(hf), max_shard_bytes=20_000)
    finally:
        os.umask(before)
    files = list((tmp_path / "m").iterdir())
    assert len(files) > 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
    assert read_base_config(tmp_path / "m") == load_base(tmp_path / "m").config


def test_a_failed_save_leaves_what_was_there(tmp_path, hf_model, hf_tensors):
    hf = hf_model("llama")
    tensors, config = hf_tensors(hf), BaseModelConfig.from_hf(hf.config.to_dict())
    save_hf_dir(tmp_path / "m", config, tensors)
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    with pytest.raises(OSError, match="cannot save a model"):
        save_hf_dir(tmp_path / "m", config, tensors, [tmp_path / "absent_tokenizer.json"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a full disk would
    try:
        with pytest.raises(OSError, match="free or choose a disk with room"):
            save_hf_dir(tmp_path / "m", config, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_model_whose_replacement_was_killed_is_found(tmp_path, hf_model, hf_tensors):
    hf = hf_model("qwen3")
    config = BaseModelConfig.from_hf(hf.config.to_dict())
    path = tmp_path / "base"
    for read in (load_base, read_base_config):
        if not path.exists():
            save_hf_dir(path, config, hf_tensors(hf))
        path.rename(tmp_path / ".base.old")  # what a kill between the two renames leaves
        read(path)
        assert [p.name for p in tmp_path.iterdir()] == ["base"]
