"""Continuations and log-likelihoods by an `allmem_hf` model, whatever its mixer.

A prompt is read in pieces of `prefill_chunk` tokens, so that peak memory does not depend on its
length, and only the last token's logits are formed. The rows' states are of constant size and are
joined into one batch for decoding; a row that ends makes room for the next prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from allmem_hf import AllMemCache, AllMemForCausalLM
from pipeline.decode_graph import GraphedDecoder, is_steady
from pipeline.generation_choice import StopTexts, check_asked, choose, ids_of, without

Advance = Callable[[int, int], None]
"""Told of a prefill's progress: tokens read, and tokens in all."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was written after one prompt."""

    tokens: tuple[int, ...]
    """New tokens, without the stop id that ended them."""
    stopped: bool
    """Ended by a stop id or a stop text; False: by max_new_tokens."""
    prompt_tokens: int
    """Tokens of the prompt."""
    stop_id: int | None = None
    """The stop id that came, which is not among `tokens`."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where a row stands after the tokens that were read."""

    hidden: Tensor
    """[1, D], the last token's final hidden state: the next token's logits follow from it."""
    cache: AllMemCache
    """Of one row."""

    @property
    def num_tokens(self) -> int:
        """Tokens read."""
        return self.cache.host_lengths[0]


@dataclass(kw_only=True, eq=False)
class _Row:
    """A prompt that is being continued."""

    index: int
    limit: int
    prompt_tokens: int
    logits: Tensor
    """[V] for its next token."""
    random: torch.Generator
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    stop_id: int | None = None


class Generator:
    """Greedy or sampled continuation: chunked prefill of long rows, batched decode.

    What a row gets does not depend on the rows beside it, but for the rounding of sums.
    """

    def __init__(
        self,
        model: AllMemForCausalLM,
        *,
        prefill_chunk: int = 4096,
        max_batch: int = 8,
        device: torch.device | str | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Args:
            model: any of full, swa, mamba2 and allmem; put into evaluation mode.
            prefill_chunk: tokens of a prompt that are read at once.
            max_batch: rows that are decoded together.
            device: moves the model there; None: where it is.
            cuda_graph: decode by a recorded step while all rows' windows are full.

        Raises:
            ValueError: a number below 1.
        """
        for name, value in (("prefill_chunk", prefill_chunk), ("max_batch", max_batch)):
            if value < 1:
                raise ValueError(f"{name}={value} is below 1; set it to 1 or more")
        self.model = model.eval() if device is None else model.to(device).eval()
        self.device = self.model.device
        self.prefill_chunk, self.max_batch = prefill_chunk, max_batch
        self.cuda_graph = cuda_graph
        self._decoder: GraphedDecoder | None = None

    # ------------------------------------------------------------------------------- reading

    @torch.no_grad()
    def read(
        self,
        tokens: Sequence[int],
        start: Reading | None = None,
        *,
        advance: Advance | None = None,
    ) -> Reading:
        """Read one row's tokens, piece by piece.

        Args:
            tokens: at least one, or none after a `start`.
            start: where to go on from; it stays as it is. None: a new row.
            advance: told after each piece.

        Raises:
            ValueError: no token at all.
        """
        if start is None and not tokens:
            raise ValueError("the prompt has no token; give at least one (a document start)")
        cache = AllMemCache(self.model.config) if start is None else start.cache.take([0])
        hidden = torch.empty(0) if start is None else start.hidden
        for done, piece in self._pieces(tokens):
            hidden = self._hidden(piece, cache)[:, -1]
            if advance is not None:
                advance(done, len(tokens))
        return Reading(hidden=hidden, cache=cache)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]` float32 of final hidden states `[N, D]`."""
        logits: Tensor = self.model.lm_head(hidden).float()
        return logits

    def _pieces(self, tokens: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(tokens), self.prefill_chunk):
            part = list(tokens[start : start + self.prefill_chunk])
            yield start + len(part), ids_of([part], self.model.config.vocab_size).to(self.device)

    def _hidden(self, ids: Tensor, cache: AllMemCache | None, mask: Tensor | None = None) -> Tensor:
        """Final hidden states `[B, T, D]`."""
        output = self.model.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    # ------------------------------------------------------------------------------- writing

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop_ids: Collection[int] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop_texts: Sequence[str] | Sequence[Sequence[str]] = (),
        decode: Callable[[list[int]], str] | None = None,
        not_first: Collection[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        starts: Sequence[Reading] | None = None,
    ) -> list[Generation]:
        """Continue each prompt.

        Args:
            prompts: token ids, each at least one.
            max_new_tokens: for all, or for each.
            stop_ids: ids that end a row and are not part of its tokens.
            temperature: 0 for the most likely token, else what logits are divided by.
            top_p: sample among the likeliest tokens that together have this probability.
            seeds: one a prompt; default: its index. A row draws by its own seed alone.
            stop_texts: for all, or a list for each: a row ends with the token that completes one
                (the token stays; cut the text before showing it).
            decode: ids to text; needed for `stop_texts`.
            not_first: ids that cannot be a row's first token.
            on_token: told each new token: the prompt's index and the token; stop ids excluded.
            starts: what each prompt goes on from, unchanged by it; prompts may then be empty.

        Returns:
            one `Generation` a prompt, in their order.

        Raises:
            ValueError: settings that do not fit the prompts or each other.
        """
        given = {"max_new_tokens": max_new_tokens, "seeds": seeds, "starts": starts}
        check_asked(prompts, temperature, top_p, given)
        limits = (
            [max_new_tokens] * len(prompts)
            if isinstance(max_new_tokens, int)
            else list(max_new_tokens)
        )
        ends = StopTexts(stop_texts, len(prompts), decode)
        results: dict[int, Generation] = {}
        waiting = iter(range(len(prompts)))
        rows: list[_Row] = []
        cache: AllMemCache | None = None
        while True:
            new = list(itertools.islice(waiting, self.max_batch - len(rows)))
            if new:
                readings, fresh = self._read_new([prompts[i] for i in new], new, starts)
                with torch.no_grad():
                    cache = AllMemCache.cat([cache, *fresh] if cache is not None else fresh)
                for index, hidden in zip(new, readings, strict=True):
                    seed = index if seeds is None else seeds[index]
                    row = _Row(
                        index=index,
                        limit=limits[index],
                        prompt_tokens=len(prompts[index]),
                        logits=without(self.logits(hidden), not_first),
                        random=torch.Generator().manual_seed(seed),
                    )
                    rows.append(row)
            if not rows or cache is None:
                break
            going = self._step(rows, frozenset(stop_ids), temperature, top_p, ends, on_token)
            for row in rows:
                if row not in going:
                    results[row.index] = Generation(
                        tokens=tuple(row.tokens),
                        stopped=row.stopped,
                        prompt_tokens=row.prompt_tokens,
                        stop_id=row.stop_id,
                    )
            cache = self._advance(rows, going, cache)
            rows = going
        return [results[index] for index in range(len(prompts))]

    def _read_new(
        self, prompts: list[Sequence[int]], indices: list[int], starts: Sequence[Reading] | None
    ) -> tuple[list[Tensor], list[AllMemCache]]:
        """Hidden states [D] of the prompts' last tokens, and caches with their rows in order.

        Short prompts are read in one call, packed without padding.
        """
        short = sum(map(len, prompts)) <= self.prefill_chunk and all(prompts)
        if starts is None and short and len(prompts) > 1:
            longest = max(map(len, prompts))
            ids, mask = self._padded(prompts, longest)
            cache = AllMemCache(self.model.config)
            with torch.no_grad():
                hidden = self._hidden(ids, cache, mask)
            last = [row[len(prompt) - 1] for row, prompt in zip(hidden, prompts, strict=True)]
            return last, [cache]
        readings = [
            self.read(prompt, None if starts is None else starts[index])
            for prompt, index in zip(prompts, indices, strict=True)
        ]
        return [reading.hidden[0] for reading in readings], [r.cache for r in readings]

    def _padded(self, rows: Sequence[Sequence[int]], longest: int) -> tuple[Tensor, Tensor]:
        """Rows as ids [B, longest], filled up behind, and their mask."""
        filled = [[*row, *[0] * (longest - len(row))] for row in rows]
        ids = ids_of(filled, self.model.config.vocab_size)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids.to(self.device), mask.to(self.device)

    def _step(
        self,
        rows: list[_Row],
        stop_ids: frozenset[int],
        temperature: float,
        top_p: float,
        ends: StopTexts,
        on_token: Callable[[int, int], None] | None,
    ) -> list[_Row]:
        """Give each row its next token; the rows that go on."""
        rows_with_room = [row for row in rows if row.limit > 0]
        if not rows_with_room:
            return []
        logits = torch.stack([row.logits for row in rows_with_room])
        drawn = [torch.rand((), generator=r.random, dtype=torch.float64) for r in rows_with_room]
        tokens = choose(logits, torch.stack(drawn), temperature=temperature, top_p=top_p)
        going = []
        for row, token in zip(rows_with_room, tokens.tolist(), strict=True):
            if token in stop_ids:
                row.stopped, row.stop_id = True, token
                continue
            row.tokens.append(token)
            if on_token is not None:
                on_token(row.index, token)
            if ends.reached(row.index, row.tokens):
                row.stopped = True
            elif len(row.tokens) < row.limit:
                going.append(row)
        return going

    @torch.no_grad()
    def _advance(
        self, rows: list[_Row], going: list[_Row], cache: AllMemCache
    ) -> AllMemCache | None:
        """Feed the chosen tokens of the rows that go on, and keep their logits."""
        if not going:
            return None
        if len(going) < len(rows):
            cache = cache.take([place for place, row in enumerate(rows) if row in going])
        ids = torch.tensor([[row.tokens[-1]] for row in going], device=self.device)
        logits = self._decode(ids, cache)
        for row, row_logits in zip(going, logits, strict=True):
            row.logits = row_logits
        return cache

    def _decode(self, ids: Tensor, cache: AllMemCache) -> Tensor:
        """Logits `[R, V]` float32 after one more token a row."""
        if not (self.cuda_graph and is_steady(cache)):
            return self.logits(self._hidden(ids, cache)[:, -1])
        if self._decoder is None or self._decoder.cache is not cache:
            self._decoder = GraphedDecoder(self.model, cache)
        return self._decoder(ids).float().clone()  # the next step writes over it

    # ------------------------------------------------------------------------------- scoring

    @torch.no_grad()
    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context.

        Args:
            pairs: context (at least one token) and continuation.

        Returns:
            for each pair the sum of log p(token | everything before it) over the continuation, in
            nats, and whether each of its tokens is the likeliest one.

        Raises:
            ValueError: an empty context.
        """
        for context, _ in pairs:
            if not context:
                raise ValueError("a context is empty; begin it with a document start token")
        results: dict[int, tuple[float, bool]] = {}
        lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]
        batch: list[int] = []
        for index in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
            if not pairs[index][1]:
                results[index] = (0.0, True)
                continue
            if lengths[index] > self.prefill_chunk:
                results[index] = self._long_likelihood(*pairs[index])
                continue
            longest = lengths[batch[0]] if batch else 0
            most = max(1, min(self.max_batch, self.prefill_chunk // max(longest, 1)))
            if len(batch) >= most:
                results.update(self._likelihoods(batch, pairs))
                batch = []
            batch.append(index)
        if batch:
            results.update(self._likelihoods(batch, pairs))
        return [results[index] for index in range(len(pairs))]

    def _likelihoods(
        self, batch: list[int], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> dict[int, tuple[float, bool]]:
        """Short rows, packed without padding, in one call."""
        rows = [[*pairs[index][0], *pairs[index][1]][:-1] for index in batch]
        ids, mask = self._padded(rows, max(map(len, rows)))
        hidden = self._hidden(ids, None, mask)
        found = {}
        for place, index in enumerate(batch):
            context, continuation = pairs[index]
            span = hidden[place, len(context) - 1 : len(rows[place])]
            found[index] = self._sum(span, continuation)
        return found

    def _long_likelihood(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[float, bool]:
        """A row of any length, in pieces."""
        row = [*context, *continuation][:-1]
        cache, total, greedy = AllMemCache(self.model.config), 0.0, True
        first = len(context) - 1  # this token's logits are of the continuation's first token
        for end, piece in self._pieces(row):
            hidden = self._hidden(piece, cache)[0]
            start = end - hidden.shape[0]
            if end > first:
                low = max(start, first)
                part, likely = self._sum(
                    hidden[low - start :], continuation[low - first : end - first]
                )
                total, greedy = total + part, greedy and likely
        return total, greedy

    def _sum(self, hidden: Tensor, targets: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of `targets` [N] by hidden states [N, D], and whether all are greedy."""
        total, greedy = 0.0, True
        ids = torch.tensor(list(targets), device=hidden.device)
        for part, wanted in zip(hidden.split(512), ids.split(512), strict=True):
            logits = self.logits(part)
            total += float(logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
            greedy = greedy and bool((logits.argmax(-1) == wanted).all())
        return total, greedy
