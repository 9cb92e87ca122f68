"""Settings of the evaluation refuse what cannot be measured."""

import pytest

from evals.config import EvalConfig


def test_defaults_are_valid() -> None:
    assert EvalConfig().mixers == ("full", "swa", "mamba2", "allmem")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixers": ("full", "rwkv")}, "'rwkv'.*full, swa, mamba2, allmem"),
        ({"mixers": ("swa", "swa")}, "twice"),
        ({"mixers": ()}, "empty"),
        ({"kinds": ()}, "empty"),
        ({"controls": ("memory",)}, "'memory'"),
        ({"chunk_size": 129, "window_size": 128}, "eval.chunk_size=129 exceeds.*=128"),
        ({"batch_size": 1}, "state_shuffled"),
        ({"batch_size": 0, "controls": ()}, "eval.batch_size=0"),
        ({"num_sinks": -1}, "eval.num_sinks=-1"),
        ({"timing_length": -5}, "timing_length=-5"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        EvalConfig(**values)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_one_document_a_batch_is_fine_without_shuffled_state() -> None:
    assert EvalConfig(batch_size=1, controls=("memory_off",)).batch_size == 1
