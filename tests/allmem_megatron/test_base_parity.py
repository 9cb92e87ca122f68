"""A converted model computes what Hugging Face computes, and its weights come back bit by bit."""

from __future__ import annotations

import pytest
import torch

from allmem_megatron.config import BaseModelConfig, MixerSettings
from allmem_megatron.convert import (
    from_hf,
    load_base,
    load_base_into,
    model_to_hf,
    save_hf_dir,
    to_hf,
)
from allmem_megatron.model import build_model

FAMILIES = [(family, tied) for family in ("qwen3", "qwen2", "llama") for tied in (False, True)]
SCALINGS = [
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
]


def our_logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model.logits(model.hidden_states(tokens, **kwargs))


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_logits_equal_hugging_face(family, tied, hf_model, ours, logits_atol):
    hf = hf_model(family, tied)
    model = ours(hf)
    tokens = torch.randint(0, 96, (2, 37))
    with torch.no_grad():
        expected = hf(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(model, tokens), expected, atol=logits_atol, rtol=0)
    with torch.no_grad():  # the forward pass that Megatron's own training loop would call
        torch.testing.assert_close(model(tokens), expected, atol=logits_atol, rtol=0)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_weights_come_back_bit_by_bit(family, tied, hf_model, hf_tensors, ours):
    hf = hf_model(family, tied)
    model = ours(hf)
    wanted, got = hf_tensors(hf), model_to_hf(model)
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
    assert all(
        torch.equal(tensor, dict(model.named_parameters())[name])
        for name, tensor in from_hf(wanted, model.base_config).items()
    )


def test_moments_travel_like_weights(hf_model, ours):
    model = ours(hf_model("qwen2"), branch="allmem")
    moments = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    back = from_hf(to_hf(moments, model.base_config), model.base_config)
    assert set(back) == set(moments)
    assert all(torch.equal(back[name], moments[name]) for name in moments)
    some = {n: m for n, m in moments.items() if ".memory." in n}
    names = to_hf(some, model.base_config)
    assert "model.layers.1.memory.q_conv.weight" in names
    assert "model.layers.0.memory.fast_gate" in names
    assert model_to_hf(model, some).keys() == names.keys()
    # row by row: the moment of q_proj's row r is where q_proj's row r went
    weights = from_hf(model_to_hf(model), model.base_config)
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_scaled_rotary_equals_hugging_face(scaling, hf_model, ours, logits_atol):
    hf = hf_model("llama", rope_scaling=dict(scaling))
    model = ours(hf)
    assert model.base_config.rope_scaling is not None
    tokens = torch.randint(0, 96, (1, 150))
    with torch.no_grad():
        expected = hf(tokens).logits
    torch.testing.assert_close(our_logits(model, tokens), expected, atol=logits_atol, rtol=0)
    plain = ours(hf_model("llama"))
    assert (our_logits(plain, tokens) - expected).abs().max() > 100 * logits_atol


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
def test_safetensors_directory_in_and_out(
    max_shard_bytes, tmp_path, hf_model, hf_tensors, logits_atol
):
    hf = hf_model("qwen3", tied=True)
    tokens = torch.randint(0, 96, (1, 20))
    with torch.no_grad():
        expected = hf(tokens).logits
    hf.save_pretrained(tmp_path / "hf", max_shard_size=max_shard_bytes)
    checkpoint = load_base(tmp_path / "hf")
    model = build_model(checkpoint.config, seed=3)
    load_base_into(model, checkpoint)
    torch.testing.assert_close(our_logits(model, tokens), expected, atol=logits_atol, rtol=0)

    out = tmp_path / "ours"
    for _ in range(2):  # a second save replaces the first
        save_hf_dir(out, checkpoint.config, model_to_hf(model), max_shard_bytes=max_shard_bytes)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(again) is type(hf)
    for name, tensor in hf_tensors(hf).items():
        assert torch.equal(dict(again.named_parameters())[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, atol=logits_atol, rtol=0)
    assert load_base(out).config == checkpoint.config


def test_config_reads_both_layouts_of_rotary(hf_config):
    scaling = SCALINGS[0]
    four = hf_config("llama", False, rope_theta=7e4, rope_scaling=scaling)
    five = hf_config("llama", False, rope_parameters={**scaling, "rope_theta": 7e4})
    del five["rope_theta"]
    assert BaseModelConfig.from_hf(four) == BaseModelConfig.from_hf(five)
    config = BaseModelConfig.from_hf(four)
    assert (config.rope_theta, config.rope_scaling) == (7e4, scaling)
    assert BaseModelConfig.from_hf(config.to_hf()) == config


def test_packed_documents_equal_separate_ones(hf_model, ours, logits_atol):
    hf = hf_model("qwen3")
    lengths = [5, 1, 23, 40]
    tokens = torch.randint(0, 96, (1, sum(lengths)))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    for branch, mode in (("none", "full"), ("none", "swa"), ("mamba2", "mamba2"), ("allmem",) * 2):
        model = ours(hf, branch=branch)
        with torch.no_grad():
            for name, parameter in model.memory_parameters():
                if name.endswith("alpha"):
                    parameter.fill_(0.5)
        settings = MixerSettings(mode=mode, window_size=8, num_sinks=2, chunk_size=4)
        with model.mixer(settings):
            packed = our_logits(model, tokens, cu_seqlens=bounds)
            alone = [our_logits(model, part) for part in tokens.split(lengths, dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, 1), atol=logits_atol / 10, rtol=0)
