"""One of several tensor-parallel ranks on gloo; run by test_tensor_parallel.py.

python tp_worker.py OUT TP; rank, world and rendezvous come by environment.
Rank 0 writes, for every branch, with and without sequence parallelism: logits, alignment losses,
and gradients by Hugging Face name.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from allmem_megatron.convert import model_to_hf
from allmem_megatron.model import AllMemGPTModel, build_model
from allmem_megatron.parallel import destroy_model_parallel, init_model_parallel

BASES = {
    "allmem": {"family": "qwen3", "qk_norm": True, "tie_word_embeddings": True, "head_dim": 16},
    "mamba2": {"family": "qwen2", "qkv_bias": True, "head_dim": 8},
    "full": {"family": "llama", "head_dim": 8},
}


def gradients(model: AllMemGPTModel) -> dict[str, Tensor]:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return model_to_hf(model, grads)


def results(mode: str, sequence_parallel: bool, packed: bool) -> dict[str, object]:
    base = BaseModelConfig(
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=80,
        vocab_size=64,
        **BASES[mode],
    )
    model = build_model(
        base,
        branch="none" if mode == "full" else mode,
        memory=MemoryConfig(memory_size=32, num_heads=4, eta_init=0.2),
        seed=4,
        sequence_parallel=sequence_parallel,
        recompute=packed,
        embedding_std=0.5,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.memory_parameters():
            if name.endswith("alpha"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(0, 64, (1 if packed else 2, 24), generator=generator)
    bounds = torch.tensor([0, 9, 24]) if packed else None
    sizes = {"window_size": 6, "num_sinks": 1, "chunk_size": 4}
    with model.mixer(MixerSettings(mode=mode, **sizes)):
        logits = model.logits(model.hidden_states(tokens, cu_seqlens=bounds))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    out: dict[str, object] = {"logits": logits.detach(), "gradients": gradients(model)}
    if mode != "full":
        with model.mixer(MixerSettings(mode="align", **sizes)):
            model.hidden_states(tokens, cu_seqlens=bounds)
        losses = torch.stack(model.align_losses())
        losses.sum().backward()
        out.update(align_losses=losses.detach(), align_gradients=gradients(model))
    return out


def main() -> None:
    path, tp = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    init_model_parallel(tp=tp)
    out = {
        (mode, packed, sequence_parallel): results(mode, sequence_parallel, packed)
        for mode in BASES
        for packed in (False, True)
        for sequence_parallel in ((False, True) if tp > 1 else (False,))
    }
    if dist.get_rank() == 0:
        torch.save(out, path)
    destroy_model_parallel()


if __name__ == "__main__":
    main()
