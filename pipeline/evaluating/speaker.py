"""Text in, text out: a model's generator with its tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluating.journal import Question, digest_of
from pipeline.generation import Generator


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Share of the probability that is sampled from."""
    seed: int = 0
    """Of the run; each example and sampling gets its own from it."""


class Speaker:
    """One subject that can be asked.

    Attributes:
        tokenizer: the model's.
        max_positions: tokens that a prompt and what follows it may have together.
        end_token: the end-of-text token.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Any,
        *,
        max_positions: int,
        stop_ids: Sequence[int],
        thinking: bool = False,
    ) -> None:
        """Bring model and tokenizer together.

        Args:
            generator: of the subject's model.
            tokenizer: a Hugging Face tokenizer.
            max_positions: the model's position range.
            stop_ids: tokens that end an answer; the first one also stands for "no context".
            thinking: what a chat template that asks for `enable_thinking` gets.

        Raises:
            ValueError: no token ends a text.
        """
        if not stop_ids:
            raise ValueError(
                "the tokenizer has no eos_token and the model's config no eos_token_id, so nothing "
                "would end an answer; add eos_token to tokenizer_config.json"
            )
        self.generator, self.tokenizer = generator, tokenizer
        self.max_positions, self.end_token = max_positions, stop_ids[0]
        self._stop_ids, self._thinking = tuple(stop_ids), thinking

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Messages in the chat template, up to the assistant's header or its begun message."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=self._thinking,
        )
        return text

    def user_turn(self, text: str) -> str:
        """A user's message in the chat template."""
        return self.chat([{"role": "user", "content": text}])

    def speak(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: Sequence[int],
        stop_texts: Sequence[Sequence[str]],
        sampling: Sampling,
        questions: Sequence[Question],
        one_line: bool = False,
    ) -> list[str]:
        """Continuations as text, special tokens left out, each up to its first stop text.

        Args:
            prompts: token ids.
            max_new_tokens: of each prompt.
            stop_texts: of each prompt; the text ends before the first one that comes.
            sampling: greedy or drawn.
            questions: names the seeds of the draws, so that no batch or rank changes them.
            one_line: the newline's token ends an answer too, and no ending token comes first.
        """
        ends = (*self._stop_ids, *self._newline()) if one_line else self._stop_ids
        seeds = [seed_of(sampling.seed, question) for question in questions]
        texts = []
        for generation, stops in zip(
            self.generator.generate(
                prompts,
                max_new_tokens=list(max_new_tokens),
                stop_ids=ends,
                not_first=ends if one_line else (),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seeds=seeds if sampling.temperature else None,
                stop_texts=[list(stops) for stops in stop_texts] if any(stop_texts) else (),
                decode=self.text_of,
            ),
            stop_texts,
            strict=True,
        ):
            texts.append(until(self.text_of(generation.tokens), stops))
        return texts

    def _newline(self) -> list[int]:
        """The token of a newline; none where the tokenizer has none, whose models write none."""
        last = list(self.tokenizer.encode("\n", add_special_tokens=False))[-1:]
        return last if "\n" in self.text_of(last) else []

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding gives it)."""
        return self.generator.loglikelihoods(pairs)


def until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of some stop texts."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def seed_of(seed: int, question: Question) -> int:
    """The seed of one sampling of one example."""
    return int(digest_of(seed, question.id, question.sample)[:15], 16)


def left_cut(tokens: Sequence[int], limit: int) -> tuple[list[int], int]:
    """The last `limit` tokens, and how many were cut.

    Raises:
        ValueError: the limit leaves none.
    """
    if limit < 1:
        raise ValueError(
            f"a limit of {limit} tokens leaves no prompt: the task generates as much as the model "
            "has positions; take a model with more (max_position_embeddings)"
        )
    return list(tokens[-limit:]), max(len(tokens) - limit, 0)
