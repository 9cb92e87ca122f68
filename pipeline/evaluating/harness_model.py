"""A subject as a model of lm-evaluation-harness: its requests, our generator, our journal.

Encoding follows the harness's own Hugging Face model (`HFLM`), so that both give one number: spaces
at the end of a context belong to the continuation, an empty context is the end-of-text token, and
what is too long loses its beginning. The requests of one call are shared out over the ranks here,
so each rank is a harness of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.evaluating.journal import Question, digest_of
from pipeline.evaluating.speaker import Sampling, Speaker, left_cut
from pipeline.evaluating.work import Compute, Work

Pair = tuple[list[int], list[int]]
DEFAULT_NEW_TOKENS = 256
"""Tokens generated where a task names no number, as in `HFLM`."""


class AnswerAll(Protocol):
    """`work.answer_all` for one subject and task."""

    def __call__(self, work: Work, compute: Compute, title: str) -> list[Any]: ...


class HarnessModel(TemplateLM):
    """One subject, for one short task.

    Attributes:
        num_truncated: requests that were too long and lost their beginning.
    """

    backend = "causal"

    def __init__(
        self,
        speaker: Speaker,
        answer_all: AnswerAll,
        *,
        sampling: Sampling | None = None,
        sample: int = 0,
        batch_size: int = 8,
    ) -> None:
        """Wrap a subject.

        Args:
            speaker: model and tokenizer.
            answer_all: shares requests out and remembers answers.
            sampling: in the place of the task's own temperature; None keeps the task's.
            sample: which of several samplings.
            batch_size: requests computed together.
        """
        super().__init__()
        self.tokenizer = speaker.tokenizer
        self.num_truncated = 0
        self._speaker, self._answer_all = speaker, answer_all
        self._sampling, self._sample, self._batch_size = sampling, sample, batch_size
        self._names: list[str] = []

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also stands for an empty context."""
        return self._speaker.end_token

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests, which is not used."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; a text that brings its first special token gets no second one."""
        del kwargs
        if add_special_tokens is None and not self._begins_with_bos(string):
            return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def _begins_with_bos(self, text: str) -> bool:
        bos: str | None = getattr(self.tokenizer, "bos_token", None)
        return bos is not None and text.startswith(bos)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages in the model's template."""
        return self._speaker.chat(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding would give it), in nats."""
        del disable_tqdm
        self._names = [_name(request) for request in requests]
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        answers = self._likelihoods(self._names, pairs, "log-likelihoods")
        return [(float(value), bool(greedy)) for value, greedy in answers]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows of the model's position range."""
        del disable_tqdm
        names, pairs, owners = [], [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._speaker.max_positions,
                context_len=1,
            )
            for number, window in enumerate(windows):
                context, continuation = make_disjoint_window(window)
                names.append(f"{_name(request)}/{number}")
                pairs.append((list(context), list(continuation)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(
            owners, self._likelihoods(names, pairs, "log-likelihoods"), strict=True
        ):
            totals[owner] += float(value)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to its first stop text."""
        del disable_tqdm
        prompts, limits, stops, samplings, questions = [], [], [], [], []
        for request in requests:
            context, arguments = request.args
            wanted = dict(normalize_gen_kwargs(arguments, DEFAULT_NEW_TOKENS))
            limit = int(wanted["max_gen_toks"])
            tokens, cut = left_cut(self.tok_encode(context), self._speaker.max_positions - limit)
            self.num_truncated += cut > 0
            sampling = self._sampling or Sampling(
                temperature=float(wanted.get("temperature") or 0.0),
                top_p=float(wanted.get("top_p", 1.0)),
            )
            prompts.append(tokens)
            limits.append(limit)
            stops.append(tuple(text for text in wanted["until"] if text))
            samplings.append(sampling)
            asked = digest_of(tokens, limit, stops[-1], sampling.temperature, sampling.top_p)
            questions.append(Question(id=_name(request), sample=self._sample, digest=asked))

        def compute(indices: Sequence[int]) -> list[Any]:
            return self._speaker.speak(
                [prompts[i] for i in indices],
                max_new_tokens=[limits[i] for i in indices],
                stop_texts=[stops[i] for i in indices],
                sampling=samplings[indices[0]],
                questions=[questions[i] for i in indices],
            )

        _one_sampling(samplings)
        costs = [len(p) + limit for p, limit in zip(prompts, limits, strict=True)]
        work = Work(questions=questions, costs=costs, batch_size=self._batch_size)
        texts = self._answer_all(work, compute, "generating")
        return [
            postprocess_generated_text(text, list(stop), None)
            for text, stop in zip(texts, stops, strict=True)
        ]

    def _fitted(self, context: list[int], continuation: list[int]) -> Pair:
        """Without the first tokens of what is too long; the last token is never fed."""
        kept, cut = left_cut(context + continuation, self._speaker.max_positions + 1)
        self.num_truncated += cut > 0
        border = max(len(kept) - len(continuation), 1)
        return kept[:border], kept[border:]

    def _likelihoods(self, names: Sequence[str], pairs: Sequence[Pair], title: str) -> list[Any]:
        questions = [
            Question(id=name, sample=0, digest=digest_of(context, continuation))
            for name, (context, continuation) in zip(names, pairs, strict=True)
        ]

        def compute(indices: Sequence[int]) -> list[Any]:
            found = self._speaker.loglikelihoods([pairs[i] for i in indices])
            return [[value, greedy] for value, greedy in found]

        costs = [len(context) + len(continuation) for context, continuation in pairs]
        work = Work(questions=questions, costs=costs, batch_size=self._batch_size)
        return self._answer_all(work, compute, title)


def _name(request: Instance) -> str:
    return f"{request.task_name}/{request.doc_id}/{request.idx}"


def _one_sampling(samplings: Sequence[Sampling]) -> None:
    if len(set(samplings)) > 1:
        raise ValueError(
            f"a short task mixes {len(set(samplings))} kinds of sampling in a call; run its parts "
            "as tasks of their own"
        )
