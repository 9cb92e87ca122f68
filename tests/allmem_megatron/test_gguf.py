"""GGUF files give the weights and the configuration of the model they were made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from allmem_megatron.config import BaseModelConfig
from allmem_megatron.convert import load_base, load_base_into
from allmem_megatron.model import build_model

gguf = pytest.importorskip("gguf")

# Hugging Face's names -> GGUF's, written apart from the reader's table.
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def permuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Halves of a head interleaved, as llama.cpp stores Llama's q and k."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, hf, family, quantised=(), factors=None):
    config = BaseModelConfig.from_hf(hf.config.to_dict())
    writer = gguf.GGUFWriter(path, family)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_context_length(config.max_position_embeddings)
    for name, parameter in hf.named_parameters():
        array = parameter.detach().numpy()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = permuted(array, config.num_heads if "q_proj" in name else config.num_kv_heads)
        array = np.ascontiguousarray(array)
        if name.endswith(tuple(quantised)) if quantised else False:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


@pytest.mark.parametrize(
    ("family", "tied"), [("qwen3", True), ("qwen2", False), ("llama", True), ("llama", False)]
)
def test_gguf_gives_the_same_logits(family, tied, tmp_path, hf_model, logits_atol):
    hf = hf_model(family, tied)
    config = write_gguf(tmp_path / "m.gguf", hf, family)
    checkpoint = load_base(tmp_path / "m.gguf")
    assert checkpoint.config == config
    assert checkpoint.tokenizer_files == ()
    model = build_model(checkpoint.config)
    load_base_into(model, checkpoint)
    tokens = torch.randint(0, 96, (2, 31))
    with torch.no_grad():
        got, expected = model.logits(model.hidden_states(tokens)), hf(tokens).logits
    torch.testing.assert_close(got, expected, atol=logits_atol, rtol=0)


def test_quantised_rows_are_dequantised_before_they_are_permuted(tmp_path, hf_model):
    hf = hf_model("llama", hidden_size=64, num_attention_heads=8, intermediate_size=96)
    write_gguf(tmp_path / "m.gguf", hf, "llama", quantised=("_proj.weight",))
    tensors = load_base(tmp_path / "m.gguf").tensors
    for name, parameter in hf.named_parameters():
        difference = (tensors[name] - parameter).abs().max()
        assert difference <= 0.01 * parameter.abs().max(), name
    assert not torch.equal(
        tensors["model.layers.0.self_attn.q_proj.weight"],
        dict(hf.named_parameters())["model.layers.0.self_attn.q_proj.weight"],
    )


def test_llama3_factors_become_llama3_scaling(tmp_path, hf_model):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = hf_model(
        "llama", head_dim=32, rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=131072
    )
    from allmem_megatron.rotary import inverse_frequencies

    config = BaseModelConfig.from_hf(hf.config.to_dict())
    scaled, _ = inverse_frequencies(config)
    plain = 1.0 / 5e5 ** (torch.arange(0, 32, 2).float() / 32)
    factors = (plain / scaled).numpy()
    write_gguf(tmp_path / "m.gguf", hf, "llama", factors=factors)
    got = load_base(tmp_path / "m.gguf").config
    torch.testing.assert_close(inverse_frequencies(got)[0], scaled, rtol=1e-5, atol=0)
    write_gguf(tmp_path / "n.gguf", hf, "llama", factors=factors * 1.3)
    with pytest.raises(ValueError, match="not Llama 3's"):
        load_base(tmp_path / "n.gguf")


def test_other_architectures_and_broken_files_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "gemma")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gemma' is not supported"):
        load_base(tmp_path / "g.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file at all, and long enough to be read")
    with pytest.raises(ValueError, match="no readable GGUF file"):
        load_base(tmp_path / "broken.gguf")
    with pytest.raises(ValueError, match="does not exist"):
        load_base(tmp_path / "absent.gguf")
