"""The Megatron-Core model and its Hugging Face export are one function (float32, 1e-4)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from allmem_hf import AllMemForCausalLM
from allmem_hf.export import export_model
from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.convert import load_hf_tensors, model_to_hf
from allmem_megatron.model import AllMemGPTModel, build_model

TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}
BRANCH = {"allmem": "allmem", "mamba2": "mamba2", "swa": "none"}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def base_config(family: str, **changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": family != "qwen2",
    }  # fmt: skip
    if family == "qwen3":
        sizes["head_dim"] = 16
    return AutoConfig.for_model(family, **{**sizes, **changes}).to_dict()


def megatron_model(base: dict[str, Any], mode: str, memory: MemoryConfig) -> AllMemGPTModel:
    """A model with random weights that let window, memory and convolution show."""
    branch = BRANCH[mode]
    model = build_model(
        BaseModelConfig.from_hf(base), branch=branch, memory=memory if branch != "none" else None
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            large = name.endswith(("alpha", "word_embeddings.weight"))
            parameter.add_((1.0 if large else 0.2) * noise)
    return model.eval()


def exported(folder: Path, model: AllMemGPTModel, base: dict[str, Any], memory: Any, mixer: Any):
    """What a user loads: the export of `model`."""
    export_model(folder, base, model_to_hf(model), memory, mixer)
    return AllMemForCausalLM.from_pretrained(folder).eval()


def logits_of(
    model: AllMemGPTModel, ids: Tensor, mixer: MixerSettings, cu_seqlens: Tensor | None = None
) -> Tensor:
    with torch.no_grad(), model.mixer(mixer):
        return model.logits(model.hidden_states(ids, cu_seqlens=cu_seqlens))


def draw(*shape: int) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("mode", ["allmem", "mamba2", "swa"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_same_weights_same_logits(tmp_path, family, mode):
    base = base_config(family)
    memory = MemoryConfig(memory_size=16, eta_init=0.5)
    mixer = MixerSettings(mode=mode, window_size=6, num_sinks=2, chunk_size=5)
    ours = megatron_model(base, mode, memory)
    theirs = exported(tmp_path / "export", ours, base, memory, mixer)
    ids = draw(2, 43)
    expected = logits_of(ours, ids, mixer)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, expected, **TOLERANCE)
        cache, steps = theirs(ids[:, :21]).past_key_values, []
        for t in range(21, 43):
            steps.append(theirs(ids[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 21:], **TOLERANCE)
    assert expected.std() > 0.5


@pytest.mark.parametrize(
    ("mode", "memory", "mixer"),
    [
        ("allmem", {"clip": 0.05, "decay": 0.1, "num_heads": 4, "expansion": 3}, {}),
        ("allmem", {}, {"write_off": True}),
        ("allmem", {}, {"memory_off": True}),
        ("mamba2", {"state_size": 5}, {}),
        ("mamba2", {}, {"write_off": True}),
    ],
    ids=str,
)
def test_every_setting_travels_with_the_export(tmp_path, mode, memory, mixer):
    base = base_config("llama", rope_parameters=LLAMA3)
    sizes = MemoryConfig(**{"memory_size": 16, "eta_init": 0.5, **memory})
    settings = MixerSettings(mode=mode, window_size=6, num_sinks=1, chunk_size=4, **mixer)
    ours = megatron_model(base, mode, sizes)
    theirs = exported(tmp_path / "export", ours, base, sizes, settings)
    ids = draw(2, 31)
    with torch.no_grad():
        logits = theirs(ids).logits
    torch.testing.assert_close(logits, logits_of(ours, ids, settings), **TOLERANCE)
    plain = MixerSettings(mode=mode, window_size=6, num_sinks=1, chunk_size=4)
    assert not mixer or (logits - logits_of(ours, ids, plain)).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["allmem", "mamba2", "swa"])
def test_packed_documents_give_the_same_logits(tmp_path, mode):
    base, memory = base_config("qwen3"), MemoryConfig(memory_size=16, eta_init=0.5)
    mixer = MixerSettings(mode=mode, window_size=6, num_sinks=2, chunk_size=4)
    ours = megatron_model(base, mode, memory)
    theirs = exported(tmp_path / "export", ours, base, memory, mixer)
    ids, lengths = draw(1, 30), (13, 1, 16)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, 13, 14, 30], dtype=torch.int32)
    with torch.no_grad():
        logits = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, logits_of(ours, ids, mixer, bounds), **TOLERANCE)


def test_gradients_of_the_memory_are_the_same():
    base, memory = base_config("qwen3"), MemoryConfig(memory_size=16, eta_init=0.5)
    mixer = MixerSettings(mode="allmem", window_size=6, num_sinks=2, chunk_size=4)
    ours = megatron_model(base, "allmem", memory)
    from allmem_hf.export import build_config

    theirs = AllMemForCausalLM(build_config(base, memory, mixer))
    theirs.load_state_dict(model_to_hf(ours), strict=False)
    ids = draw(2, 23)
    theirs(ids, labels=ids).loss.backward()
    with ours.mixer(mixer):
        logits = ours.logits(ours.hidden_states(ids))
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = model_to_hf(ours, gradients)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-4 * scale, rtol=1e-4, msg=name
        )


def test_an_export_loads_back_into_megatron_bit_for_bit(tmp_path):
    base, memory = base_config("qwen2"), MemoryConfig(memory_size=16)
    mixer = MixerSettings(mode="allmem", window_size=6, num_sinks=2, chunk_size=4)
    ours = megatron_model(base, "allmem", memory)
    theirs = exported(tmp_path / "export", ours, base, memory, mixer)
    again = build_model(BaseModelConfig.from_hf(base), branch="allmem", memory=memory, seed=9)
    load_hf_tensors(again, dict(theirs.state_dict()))
    for (name, old), (_, new) in zip(
        ours.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(old, new), name
