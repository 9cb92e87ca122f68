"""On a CUDA device: the fast kernels are taken, and generate what the reference on the CPU does."""

import pytest
import torch

from allmem_hf import AllMemCache

pytestmark = pytest.mark.gpu
SIZES = {
    "hidden_size": 128, "head_dim": 32, "memory_size": 64, "chunk_size": 64, "window_size": 160,
    "num_sinks": 8, "eta_init": 0.02,
}  # fmt: skip


def in_pieces(model, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache, logits = AllMemCache(model.config), []
    with torch.no_grad():
        for piece in ids.split(sizes, 1):
            logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_and_steps_on_the_gpu_equal_the_reference_on_the_cpu(tiny, tokens, dtype):
    model, ids = tiny("allmem", **SIZES), tokens(2, 700)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    fast = model.to(device="cuda", dtype=dtype)
    assert fast.kernel_backends().items() >= {"window": "flex", "memory": "triton"}.items()
    found = in_pieces(fast, ids.cuda(), [300, 173, 200, *[1] * 27])
    error = (found.float().cpu() - expected).norm() / expected.norm()
    assert error < (5e-3 if dtype == torch.float32 else 0.2)


def test_rows_of_any_lengths_decode_together_on_the_gpu(tiny, tokens):
    model = tiny("allmem", **SIZES).cuda()
    rows = [tokens(1, length, seed=length).cuda() for length in (190, 64, 333)]
    caches = []
    with torch.no_grad():
        for row in rows:
            caches.append(model(row[:, :-1], use_cache=True).past_key_values)
        joined = AllMemCache.cat(caches)
        new = torch.cat([row[:, -1:] for row in rows])
        logits = model(new, past_key_values=joined, use_cache=True).logits[:, 0]
        expected = [model(row, use_cache=False).logits[0, -1] for row in rows]
    torch.testing.assert_close(logits, torch.stack(expected), atol=2e-2, rtol=2e-2)
