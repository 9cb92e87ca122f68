"""The cache: rows of any lengths together, written in place, constant work and size a step."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allmem_hf import AllMemCache

MODES = ("full", "none", "mamba2", "allmem")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}


def model_of(tiny, mode: str, **changes):
    if mode == "full":
        return tiny("none", full_attention=True, **changes)
    return tiny(mode, **changes)


def whole(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def read(model, ids: Tensor, cache: AllMemCache | None = None, size: int = 64) -> AllMemCache:
    """The cache after `ids` [B, T], in pieces."""
    cache = AllMemCache(model.config) if cache is None else cache
    with torch.no_grad():
        for piece in ids.split(size, 1):
            model(piece, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [(1, 2, 3), (4, 5, 6, 7), (8, 9, 5, 40), (40, 3, 63, 12)])
def test_rows_read_alone_decode_together(tiny, tokens, mode, lengths):
    """Lengths around s = 2, c = 4, W = 6, s + W = 8."""
    model = model_of(tiny, mode)
    rows = [tokens(1, length + 14, seed=length) for length in lengths]
    cache = AllMemCache.cat(
        read(model, row[:, :length]) for row, length in zip(rows, lengths, strict=True)
    )
    assert cache.host_lengths == lengths == tuple(cache.lengths.tolist())
    expected = [whole(model, row)[0, -14:] for row in rows]
    for step in range(14):
        new = torch.cat([row[:, step - 14 : step - 13 or None] for row in rows])
        with torch.no_grad():
            logits = model(new, past_key_values=cache, use_cache=True).logits[:, 0]
        torch.testing.assert_close(logits, torch.stack([e[step] for e in expected]), **TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_taken_out_and_go_on_alone_or_in_pieces(tiny, tokens, mode):
    model = model_of(tiny, mode)
    rows = [tokens(1, length, seed=length) for length in (31, 18, 25)]
    together = AllMemCache.cat(read(model, row[:, :-9]) for row in rows)
    for place, row in enumerate(rows):
        alone = together.take([place])
        with torch.no_grad():
            logits = model(row[:, -9:], past_key_values=alone, use_cache=True).logits
        torch.testing.assert_close(logits, whole(model, row)[:, -9:], **TOLERANCE)
    picked = together.take([2, 2, 0])
    new = torch.cat([rows[2][:, -9:], tokens(1, 9, seed=77), rows[0][:, -9:]])
    with torch.no_grad():  # several tokens of rows of different lengths in one call
        logits = model(new, past_key_values=picked, use_cache=True).logits
    other = torch.cat([rows[2][:, :-9], tokens(1, 9, seed=77)], 1)
    for place, row in enumerate((rows[2], other, rows[0])):
        torch.testing.assert_close(logits[place], whole(model, row)[0, -9:], **TOLERANCE)
    assert together.host_lengths == (22, 9, 16)  # untouched


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 3, 4, 6, 7, 8, 9, 31])
def test_prefill_in_equal_pieces_equals_one_prefill(tiny, tokens, mode, size):
    model, ids = model_of(tiny, mode), tokens(2, 62)
    cache, logits = AllMemCache(model.config), []
    with torch.no_grad():
        for piece in ids.split(size, 1):
            logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole(model, ids), **TOLERANCE)


class Allocated(TorchDispatchMode):
    """Operations, and elements of new storage that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.elements = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.elements += tensor.numel()
        return out


@pytest.mark.parametrize("mode", ["none", "mamba2", "allmem"])
def test_a_decode_step_costs_and_allocates_the_same_at_any_length(tiny, tokens, mode):
    model = tiny(mode, chunk_size=16, window_size=20)
    costs, places = [], []
    for length in (48, 55, 480, 487):  # at the start of a chunk, and in its middle
        cache = read(model, tokens(2, length))
        for _ in range(2):
            with torch.no_grad(), Allocated() as allocated:
                model(tokens(2, 1), past_key_values=cache, use_cache=True)
            costs.append((allocated.calls, allocated.elements))
            layer = cache.layers[1].tensors
            places.append({name: x.data_ptr() for name, x in layer.items()})
        assert places[-1] == places[-2]  # written in place
    assert len(set(costs)) == 1


def test_decoding_leaves_the_model_s_own_weights_alone(tiny, tokens):
    model = tiny("allmem")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    cache = read(model, tokens(1, 1))
    read(model, tokens(1, 13), cache, size=1)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


def test_full_attention_equals_a_window_that_holds_everything(tiny, tokens):
    ids = tokens(2, 33)
    wide = tiny("none", window_size=64, num_sinks=0)
    torch.testing.assert_close(
        whole(tiny("none", full_attention=True), ids), whole(wide, ids), **TOLERANCE
    )
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model = tiny("none", full_attention=True)
    asked = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(ids, **asked), model.generate(ids, **asked, use_cache=False))


def test_caches_that_do_not_belong_together_are_refused(tiny, tokens):
    ids = tokens(1, 9)
    cache = read(tiny("allmem"), ids)
    with pytest.raises(ValueError, match="one of them empty"):
        AllMemCache.cat([cache, AllMemCache(cache.config)])
    with pytest.raises(ValueError, match="none at all"):
        AllMemCache.cat([])
    with pytest.raises(ValueError, match="different models"):
        AllMemCache.cat([cache, read(tiny("allmem", chunk_size=3), ids)])
    with pytest.raises(ValueError, match="different branches"):
        AllMemCache.cat([cache, read(tiny("mamba2"), ids)])
    with pytest.raises(ValueError, match="do not fit a cache of 1 rows"):
        tiny("allmem")(tokens(2, 1), past_key_values=cache)


def test_kernel_backends_are_told(tiny):
    assert tiny("allmem").kernel_backends() == {"window": "reference", "memory": "reference"}
    assert tiny("mamba2").kernel_backends() == {"window": "reference", "memory": "ssd"}
    assert tiny("none", full_attention=True).kernel_backends() == {"window": "sdpa"}
