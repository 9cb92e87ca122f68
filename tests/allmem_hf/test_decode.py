"""Decoding goes on exactly where prefill stopped, for every branch, phase and kind of batch."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allmem_hf import AllMemCache

BRANCHES = ("allmem", "mamba2", "none")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}  # float32 logits of about 30


def whole(model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of one call without a cache."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def piecewise(model, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of consecutive calls that share a cache."""
    cache, start, logits = AllMemCache(model.config), 0, []
    for size in sizes:
        end = start + size
        with torch.no_grad():
            output = model(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
        assert output.past_key_values is cache
        logits.append(output.logits)
        start = end
    assert start == ids.shape[1] == cache.get_seq_length()
    return torch.cat(logits, 1)


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows `[T_i]` padded on the left to `[B, T]`, and their mask."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    return ids, (ids != 0).long()


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("first", [1, 2, 3, 4, 5, 17, 32])
def test_decoding_one_by_one_equals_one_prefill(tiny, tokens, branch, first):
    model, ids = tiny(branch), tokens(2, 33)
    steps = piecewise(model, ids, [first] + [1] * (33 - first))
    torch.testing.assert_close(steps, whole(model, ids), **TOLERANCE)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("sizes", [[1, 2, 3, 1, 13, 13], [3, 8, 1, 21], [9, 9, 9, 6], [5, 28]])
def test_prefill_in_pieces_equals_one_prefill(tiny, tokens, branch, sizes):
    model, ids = tiny(branch), tokens(2, 33)
    torch.testing.assert_close(piecewise(model, ids, sizes), whole(model, ids), **TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": 1, "window_size": 1, "num_sinks": 0},
        {"chunk_size": 5, "window_size": 5, "num_sinks": 0},
        {"chunk_size": 3, "window_size": 70, "num_sinks": 9},
        {"clip": 0.1, "decay": 0.2},
        {"write_off": True},
        {"memory_off": True},
        {"qk_norm": False, "qkv_bias": True, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_every_setting_decodes_as_it_prefills(tiny, tokens, changes):
    model, ids = tiny("allmem", **changes), tokens(2, 90)
    steps = piecewise(model, ids, [3, 70] + [1] * 17)
    torch.testing.assert_close(steps, whole(model, ids), **TOLERANCE)


def test_a_mamba2_state_of_another_size_decodes_as_it_prefills(tiny, tokens):
    model, ids = tiny("mamba2", state_size=5), tokens(2, 20)
    steps = piecewise(model, ids, [3] + [1] * 17)
    torch.testing.assert_close(steps, whole(model, ids), **TOLERANCE)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("sizes", [[29], [20] + [1] * 9, [2] * 14 + [1], [1] * 29])
def test_left_padded_rows_equal_rows_alone(tiny, tokens, branch, sizes):
    model = tiny(branch)
    rows = [tokens(1, length, seed=length)[0] for length in (29, 3, 22, 10)]
    ids, mask = left_padded(rows)
    logits = piecewise(model, ids, sizes, mask)
    for row, out in zip(rows, logits, strict=True):
        alone = whole(model, row[None])[0]
        torch.testing.assert_close(out[-len(row) :], alone, **TOLERANCE)
        assert not out[: -len(row)].any()


@pytest.mark.parametrize("branch", BRANCHES)
def test_padding_anywhere_is_left_out(tiny, tokens, branch):
    model, ids = tiny(branch), tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, [0, 5, 6, 23]] = 0
    mask[1, 15:] = 0
    logits = whole(model, ids, mask)
    for row in range(2):
        kept = mask[row].bool()
        alone = whole(model, ids[row : row + 1, kept])[0]
        torch.testing.assert_close(logits[row, kept], alone, **TOLERANCE)


@pytest.mark.parametrize("branch", BRANCHES)
def test_greedy_generate_equals_a_loop_without_cache(tiny, tokens, branch):
    model = tiny(branch)
    rows = [tokens(1, length, seed=length)[0] for length in (3, 14, 9)]
    ids, mask = left_padded(rows)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row, out in zip(rows, generated, strict=True):
        text = row[None]
        for _ in range(20):
            text = torch.cat([text, whole(model, text)[:, -1:].argmax(-1)], 1)
        assert out[-20:].tolist() == text[0, -20:].tolist()


def test_generate_without_cache_and_with_chunked_prefill_give_the_same(tiny, tokens):
    model = tiny()
    ids, mask = left_padded([tokens(1, 19)[0], tokens(1, 7)[0]])
    asked = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(ids, **asked)
    assert torch.equal(model.generate(ids, **asked, use_cache=False), expected)
    assert torch.equal(model.generate(ids, **asked, prefill_chunk_size=5), expected)


def test_generate_goes_on_from_a_kept_cache(tiny, tokens):
    model, ids = tiny(), tokens(2, 11)
    first = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    kept = first.past_key_values
    assert isinstance(kept, AllMemCache)
    longer = torch.cat([first.sequences, tokens(2, 5, seed=3)], 1)
    expected = model.generate(longer, max_new_tokens=6, do_sample=False)
    for cache in (copy.deepcopy(kept), kept):  # a copy leaves the original as it was
        again = model.generate(longer, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert torch.equal(again, expected)


@pytest.mark.parametrize("branch", BRANCHES)
def test_beam_search_finds_the_same_with_and_without_cache(tiny, tokens, branch):
    model = tiny(branch)
    ids, mask = left_padded([tokens(1, 12)[0], tokens(1, 5)[0]])
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    cached = model.generate(ids, **asked, num_return_sequences=2)
    assert torch.equal(
        cached, model.generate(ids, **asked, num_return_sequences=2, use_cache=False)
    )


def test_sampling_draws_the_same_with_and_without_cache(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(
            model.generate(
                ids, do_sample=True, top_k=20, max_new_tokens=12, num_return_sequences=3,
                use_cache=use_cache,
            )
        )  # fmt: skip
    assert torch.equal(*drawn)
    assert drawn[0].shape == (6, 21)


def test_reordered_rows_go_on_as_their_own(tiny, tokens):
    model, ids, new = tiny(), tokens(3, 21), tokens(4, 9, seed=2)
    rows = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.reorder_cache(rows)
        logits = model(new, past_key_values=cache, use_cache=True).logits
    expected = whole(model, torch.cat([ids[rows], new], 1))[:, -9:]
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 8
    cache.reset()
    torch.testing.assert_close(piecewise(model, ids, [21]), whole(model, ids))
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, whole(model, ids))


@pytest.mark.parametrize("branch", BRANCHES)
def test_cache_bytes_do_not_grow_with_the_text(tiny, tokens, branch):
    model, sizes = tiny(branch), []
    with torch.no_grad():
        cache = model(tokens(2, 101), use_cache=True).past_key_values
        for _ in range(40):
            model(tokens(2, 1), past_key_values=cache, use_cache=True)
            sizes.append(cache.num_bytes)
        long = model(tokens(2, 4 * 101 + 40), use_cache=True).past_key_values
        model(tokens(2, 4 * 300), past_key_values=long, use_cache=True)
    chunk = model.config.chunk_size
    assert sizes[chunk:] == sizes[:-chunk]  # only the unfinished chunk comes and goes
    assert long.num_bytes in sizes


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.untyped_storage().size() // 4)
        return out


@pytest.mark.parametrize("branch", BRANCHES)
def test_prefill_memory_is_linear_in_the_prompt(tiny, tokens, branch):
    model, sizes = tiny(branch), []
    for length in (256, 512):
        with torch.no_grad(), LargestTensor() as largest:
            cache = model(tokens(1, length), logits_to_keep=1).past_key_values
        with torch.no_grad(), LargestTensor() as later:  # a long text after a cached one
            model(tokens(1, length), past_key_values=cache, logits_to_keep=1)
        sizes.append((largest.size, later.size))
    assert sizes[0][0] < 256 * 256
    assert sizes[1][0] <= 2 * sizes[0][0]
    assert sizes[1][1] <= 2 * sizes[0][1]


@pytest.mark.parametrize("budget", [2**24, 3000])
@pytest.mark.parametrize(("window", "sinks"), [(6, 2), (90, 3), (5, 70), (6, 0)])
def test_many_tokens_after_a_cache_equal_one_prefill(
    tiny, tokens, monkeypatch, budget, window, sinks
):
    monkeypatch.setattr("allmem_hf.layers_allmem._MAX_SCORES", budget)
    model = tiny("none", window_size=window, num_sinks=sinks)
    rows = [tokens(1, length, seed=length)[0] for length in (300, 170, 297)]
    ids, mask = left_padded(rows)
    logits = piecewise(model, ids, [4, 196, 100], mask)
    for row, out in zip(rows, logits, strict=True):
        torch.testing.assert_close(out[-len(row) :], whole(model, row[None])[0], **TOLERANCE)


def test_inputs_embeds_equal_input_ids(tiny, tokens):
    model, ids = tiny(), tokens(2, 13)
    with torch.no_grad():
        logits = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits
    torch.testing.assert_close(logits, whole(model, ids))


def test_logits_to_keep_and_hidden_states(tiny, tokens):
    model, ids = tiny(), tokens(2, 13)
    with torch.no_grad():
        output = model(ids, logits_to_keep=2, output_hidden_states=True)
        picked = model(ids, logits_to_keep=torch.tensor([0, 7])).logits
        loose = model(ids, return_dict=False, use_cache=False)
    expected = whole(model, ids)
    torch.testing.assert_close(output.logits, expected[:, -2:])
    torch.testing.assert_close(picked, expected[:, [0, 7]])
    torch.testing.assert_close(loose[0], expected)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), expected)


def test_what_an_allmem_cache_cannot_do_is_refused(tiny, tokens):
    from transformers import DynamicCache

    model, ids = tiny(), tokens(2, 9)
    with torch.no_grad():
        cache = model(ids).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="not an AllMemCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="pass use_cache=True"):
        model(ids, past_key_values=cache, use_cache=False)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="another branch"):
        tiny("mamba2")(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=torch.arange(9)[None] + 3)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], assistant_model=tiny(), max_new_tokens=2)
