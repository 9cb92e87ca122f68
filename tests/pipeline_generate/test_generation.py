"""Generation: what a row gets depends on its prompt and seed alone, and equals a plain loop."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.generation import Generator
from pipeline.generation_choice import choose
from pipeline.generation_models import hf_model_from_megatron
from tests.pipeline_generate.conftest import MODES, SETTINGS


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of one call without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def greedy_loop(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("mode", MODES)
def test_the_hugging_face_model_computes_what_the_megatron_model_computes(
    mode, megatron, draw, model_of
):
    model, tokens = megatron(mode), draw(33)
    with torch.no_grad(), model.mixer(replace(SETTINGS, mode=mode)):
        expected = model(torch.tensor([tokens]))
    torch.testing.assert_close(
        logits_of(model_of(mode), tokens), expected[0].float(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
def test_greedy_rows_of_any_lengths_equal_a_loop_without_cache(mode, model_of, draw):
    model = model_of(mode)
    prompts = [draw(length) for length in (1, 23, 8, 3, 40)]
    found = Generator(model, prefill_chunk=7, max_batch=3).generate(
        prompts, max_new_tokens=[11, 3, 0, 9, 6]
    )
    together = Generator(model, prefill_chunk=90).generate(prompts, max_new_tokens=[11, 3, 0, 9, 6])
    assert together == found
    for prompt, count, generation in zip(prompts, (11, 3, 0, 9, 6), found, strict=True):
        assert list(generation.tokens) == greedy_loop(model, prompt, count)
        assert not generation.stopped
        assert generation.prompt_tokens == len(prompt)


@pytest.mark.parametrize("mode", MODES)
def test_the_size_of_prefill_pieces_changes_nothing(mode, model_of, draw):
    model, prompt = model_of(mode), draw(45)
    expected = Generator(model, prefill_chunk=64).read(prompt)
    for size in (1, 4, 5, 6, 8, 44):
        found = Generator(model, prefill_chunk=size).read(prompt)
        torch.testing.assert_close(found.hidden, expected.hidden, atol=1e-4, rtol=1e-5)
        assert found.num_tokens == 45


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage that any operation made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().size() // 4)
        return out


@pytest.mark.parametrize("mode", ["swa", "mamba2", "allmem"])
def test_reading_holds_no_more_for_a_longer_prompt(mode, model_of, draw):
    generator, sizes = Generator(model_of(mode), prefill_chunk=32), []
    for length in (160, 640):
        with LargestTensor() as largest:
            generator.read(draw(length))
        sizes.append(largest.size)
    assert sizes[0] == sizes[1] < 640 * 32


def test_sampled_rows_do_not_depend_on_the_batch_they_are_in(model_of, draw):
    model = model_of("allmem")
    prompts, seeds = [draw(length) for length in (9, 21, 4, 14)], [5, 6, 5, 8]
    asked = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9}
    together = Generator(model, max_batch=4).generate(prompts, seeds=seeds, **asked)
    for index in (3, 1):
        alone = Generator(model).generate([prompts[index]], seeds=[seeds[index]], **asked)
        assert alone == [together[index]]
    again = Generator(model, max_batch=2).generate(prompts, seeds=seeds, **asked)
    assert again == together
    other = Generator(model).generate(prompts[:1], seeds=[99], **asked)
    assert other[0].tokens != together[0].tokens


def test_stop_ids_end_a_row_and_are_left_out(model_of, draw):
    model, prompts = model_of("allmem"), [draw(9), draw(12)]
    whole = Generator(model).generate(prompts, max_new_tokens=20)
    stop = whole[0].tokens[7]
    first = whole[0].tokens.index(stop)
    said: list[tuple[int, int]] = []
    cut = Generator(model).generate(
        prompts, max_new_tokens=20, stop_ids={stop}, on_token=lambda *new: said.append(new)
    )
    assert cut[0].tokens == whole[0].tokens[:first]
    assert (cut[0].stopped, cut[0].stop_id) == (True, stop)
    assert [token for row, token in said if row == 1] == list(cut[1].tokens)


def test_stop_texts_end_a_row_at_the_token_that_completes_them(model_of, draw):
    model, prompts = model_of("swa"), [draw(9), draw(9), draw(9)]
    whole = Generator(model).generate(prompts[:1], max_new_tokens=20)[0].tokens

    def decode(tokens: list[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    text = decode(list(whole[4:6]))[1:-1]
    texts = [[text], [], ["nothing", text]]
    cut = Generator(model).generate(prompts, max_new_tokens=20, stop_texts=texts, decode=decode)
    assert cut[0].tokens == cut[2].tokens == whole[:6]
    assert cut[0].stopped
    assert cut[1].tokens == whole


@pytest.mark.parametrize("mode", MODES)
def test_several_prompts_go_on_from_one_reading_which_stays_as_it_is(mode, model_of, draw):
    model, document, questions = model_of(mode), draw(29), [draw(5), [], draw(11)]
    generator = Generator(model, prefill_chunk=8)
    reading = generator.read(document)
    for _ in range(2):
        found = generator.generate(questions, max_new_tokens=6, starts=[reading] * 3)
        expected = generator.generate([document, document + questions[2]], max_new_tokens=6)
        assert [found[1].tokens, found[2].tokens] == [row.tokens for row in expected]
        assert reading.num_tokens == 29


def test_choose_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.05, 0.25]).log().expand(4, -1)
    points = torch.tensor([0.0, 0.59, 0.61, 0.999], dtype=torch.float64)
    assert choose(logits, points, temperature=1.0).tolist() == [1, 1, 3, 2]
    assert choose(logits, points, temperature=0).tolist() == [1, 1, 1, 1]
    assert choose(logits, points, temperature=1.0, top_p=0.7).tolist() == [1, 1, 1, 3]
    assert choose(logits, points, temperature=1.0, top_p=0.6).tolist() == [1, 1, 1, 1]
    assert choose(logits, points, temperature=0.01).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_loglikelihoods_equal_sums_over_whole_sequences(mode, model_of, draw):
    model = model_of(mode)
    greedy = greedy_loop(model, draw(9), 5)
    pairs = [
        (draw(9), greedy),
        (draw(1), draw(2)),
        (draw(31), draw(22)),  # longer than a piece
        (draw(5), draw(30)),
        (draw(9), [*greedy[:-1], greedy[-1] % 96 + 1]),
        (draw(9), []),
    ]
    found = Generator(model, prefill_chunk=24, max_batch=3).loglikelihoods(pairs)
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        logits = logits_of(model, [*context, *continuation])[len(context) - 1 : -1]
        picked = logits.log_softmax(-1)[range(len(continuation)), continuation]
        assert total == pytest.approx(float(picked.sum()), abs=1e-3)
        assert is_greedy == (logits.argmax(-1).tolist() == list(continuation))
    assert [is_greedy for _, is_greedy in found[:1] + found[4:]] == [True, False, True]


def test_an_empty_continuation_is_certain(model_of, draw):
    generator = Generator(model_of("allmem"), prefill_chunk=8)
    whole = (draw(3), draw(2))
    found = generator.loglikelihoods([([5], []), whole, (draw(20), [])])
    assert [found[0], found[2]] == [(0.0, True)] * 2
    assert found[1] == generator.loglikelihoods([whole])[0]


def test_what_does_not_fit_is_refused(model_of, megatron, draw):
    generator = Generator(model_of("swa"))
    with pytest.raises(ValueError, match="no token"):
        generator.generate([[]], max_new_tokens=3)
    with pytest.raises(ValueError, match="2 seeds do not fit 1 prompts"):
        generator.generate([draw(3)], max_new_tokens=3, seeds=[1, 2])
    for limits in (-1, [-1]):
        with pytest.raises(ValueError, match="max_new_tokens=-1 is negative"):
            generator.generate([draw(3)], max_new_tokens=limits)
    for prompts in ([[1, 97]], [[1], [-1]]):
        with pytest.raises(ValueError, match="is not below the model's vocab_size=97"):
            generator.generate(prompts, max_new_tokens=1)
    with pytest.raises(ValueError, match="top_p=0"):
        generator.generate([draw(3)], max_new_tokens=3, temperature=1.0, top_p=0)
    with pytest.raises(ValueError, match="decode"):
        generator.generate([draw(3)], max_new_tokens=3, stop_texts=["x"])
    with pytest.raises(ValueError, match="context is empty"):
        generator.loglikelihoods([([], [1])])
    with pytest.raises(ValueError, match="max_batch=0"):
        Generator(model_of("swa"), max_batch=0)
    with pytest.raises(ValueError, match="needs a model with that branch"):
        hf_model_from_megatron(megatron("swa"), SETTINGS)
