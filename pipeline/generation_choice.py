"""Which token comes next, and whether a row's text has come to its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_asked(
    prompts: Sequence[Sequence[int]], temperature: float, top_p: float, given: Mapping[str, Any]
) -> None:
    """Refuse what does not fit the prompts; `given` holds what is one a prompt, by name.

    Raises:
        ValueError: with the value, the rule and the mend.
    """
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("a prompt is text; give token ids, tokenizer(text)['input_ids']")
    check_sampling(temperature, top_p)
    most = given.get("max_new_tokens", 0)
    if (lowest := min([most] if isinstance(most, int) else most, default=0)) < 0:
        raise ValueError(f"max_new_tokens={lowest} is negative; set it to 0 or more")
    for name, value in given.items():
        if value is not None and not isinstance(value, int) and len(value) != len(prompts):
            raise ValueError(
                f"{len(value)} {name} do not fit {len(prompts)} prompts; give one a prompt"
            )


def ids_of(rows: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Rows of one length as `[R, T]` int64, on the CPU.

    Raises:
        ValueError: an id that the model does not have: a GPU would only say so by going down.
    """
    ids = torch.tensor(rows, dtype=torch.int64)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise ValueError(
            f"token id {int(wrong[0])} is not below the model's vocab_size={vocab_size}; use the "
            "model's own tokenizer"
        )
    return ids


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse numbers by which no token can be drawn.

    Raises:
        ValueError: with the value, the rule and the mend.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} is not in [0, inf); set it to 0 for the likeliest tokens"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]; set it to 1 to sample among all")


def choose(logits: Tensor, drawn: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """A token for each row of `logits` [R, V]: the likeliest, or by the number `drawn` [R].

    Args:
        logits: float32.
        drawn: float64 in [0, 1), where on the cumulated probabilities a row's token lies.
        temperature: 0 for the likeliest.
        top_p: the likeliest tokens up to this probability together, at least one, are drawn from.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / temperature).softmax(-1)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    total = probabilities.cumsum(-1)
    probabilities = probabilities.masked_fill(total - probabilities >= top_p, 0)
    total = probabilities.cumsum(-1)
    point = drawn.to(total.device)[:, None] * total[:, -1:]
    place = (total <= point).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(place, last))[:, 0]


def without(logits: Tensor, forbidden: Collection[int]) -> Tensor:
    """Logits [V] with minus infinity for tokens that cannot come."""
    if not forbidden:
        return logits
    ids = torch.tensor(sorted(forbidden), device=logits.device)
    return logits.index_fill(-1, ids, -torch.inf)


class StopTexts:
    """Whether a row's text has reached one of its stop texts."""

    def __init__(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]],
        num_rows: int,
        decode: Callable[[list[int]], str] | None,
    ) -> None:
        if texts and decode is None:
            raise ValueError("stop_texts need decode=tokenizer.decode; give both")
        shared = all(isinstance(text, str) for text in texts)
        if not shared and len(texts) != num_rows:
            raise ValueError(
                f"{len(texts)} lists of stop_texts do not fit {num_rows} prompts; give one a prompt"
            )
        self._texts = [[str(t) for t in texts]] * num_rows if shared else [list(t) for t in texts]
        self._decode = decode

    def reached(self, index: int, tokens: list[int]) -> bool:
        """Whether one of row `index`'s texts ends in the newest of its tokens."""
        texts = [text for text in self._texts[index] if text]
        if not texts or self._decode is None:
            return False
        # a token is a byte or more: as many tokens as the longest text has bytes hold it
        most = max(len(text.encode()) for text in texts) + 8
        text = self._decode(tokens[-most:])
        return any(stop in text for stop in texts)
