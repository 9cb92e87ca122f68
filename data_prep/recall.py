"""Recall documents: facts stated early in real text, asked for far later.

A fact is one line, `# note: amber -> falcon`; a question is `# recall: amber -> falcon`, whose
answer is what follows the arrow. Values are drawn anew for every document, so the answer can only be
found in the context. Three layouts:

- `far`: facts among the filler of the early part, each asked for at most once near the end;
- `mixed`: facts and questions all over the document, the same fact asked several times;
- `dense`: no filler, a small dictionary repeated to the end (the curriculum that a tiny base model
  needs: spec section 4).

Everything is placed at token level: the filler is tokenized once (`FillerBank`), lines are assembled
from ready token lists, so that thousands of documents take seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.sample import Sample
from data_prep.tokenize import TokenizerLike, encode_text
from data_prep.words import RECALL_KEYS, RECALL_VALUES

Layout = Literal["far", "mixed", "dense"]
NOTE_MARK = "# note:"
RECALL_MARK = "# recall:"
MAX_FILLER_LINE = 64
"""Longer lines (tokens) are left out of the filler: mostly data, and facts need line ends."""


def recall_words() -> tuple[str, ...]:
    """The words of facts as they stand in a line, each with its leading space."""
    return tuple(f" {word}" for word in (*RECALL_KEYS, *RECALL_VALUES))


def recall_symbols(separator: str = " ->") -> tuple[str, ...]:
    """Symbols to hand to the training of a tokenizer, so that each is one token there."""
    marks = (NOTE_MARK, RECALL_MARK, separator) if separator else (NOTE_MARK, RECALL_MARK)
    return (*marks, *recall_words())


def _check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise ValueError(
            f"{name}={tuple(value)} must be (min, max) with {low} <= min <= max <= {high}; "
            f"correct data.recall.{name}"
        )


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """What recall documents look like."""

    num_facts: tuple[int, int] = (4, 8)
    """Facts per document, drawn uniformly from (min, max)."""
    num_queries: tuple[int, int] = (2, 4)
    """Questions per `far` document; never more than its facts."""
    min_distance: int = 256
    """`far`: at least so many tokens from the fact's value to the answer."""
    fact_region: float = 0.5
    """`far`: facts lie in the first share of the document (less if min_distance asks for it)."""
    query_region: float = 0.2
    """`far`: questions lie in the last share of the document."""
    filler_fraction: tuple[float, float] = (0.3, 0.8)
    """`mixed`: share of the tokens that is filler; the rest are facts and questions."""
    dense_facts: tuple[int, int] = (4, 16)
    """`dense`: pairs in the dictionary."""
    far_weight: float = 1.0
    mixed_weight: float = 0.0
    dense_weight: float = 0.0
    """Shares of the layouts among documents; they need not sum to one."""
    loss_on: str = "answers"
    """`answers`: only answer tokens are loss targets; `all`: every token but the first."""
    separator: str = " ->"
    """Between key and value; empty puts the value right after the key: easiest to learn."""

    def __post_init__(self) -> None:
        _check_range("num_facts", self.num_facts, 1, len(RECALL_KEYS))
        _check_range("num_queries", self.num_queries, 1, len(RECALL_KEYS))
        _check_range("dense_facts", self.dense_facts, 1, len(RECALL_KEYS))
        _check_range("filler_fraction", self.filler_fraction, 0.0, 0.95)
        for name in ("fact_region", "query_region"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]")
        if self.min_distance < 1:
            raise ValueError(f"min_distance={self.min_distance} must be at least 1")
        weights = self.layout_weights
        if any(w < 0 for w in weights.values()) or sum(weights.values()) <= 0:
            raise ValueError(f"layout weights {weights} must be >= 0 and not all zero")
        if self.loss_on not in ("answers", "all"):
            raise ValueError(f"loss_on={self.loss_on!r} must be 'answers' or 'all'")

    @property
    def layout_weights(self) -> dict[Layout, float]:
        """Weight of each layout, in a fixed order."""
        return {"far": self.far_weight, "mixed": self.mixed_weight, "dense": self.dense_weight}


class FillerBank:
    """Filler tokens in one row, with the places where a line begins.

    Args:
        tokens: [F] token ids of whole lines, one text after the other.
        line_starts: sorted places in 0..F at which a line begins; F, the end of the last, included.
    """

    def __init__(self, tokens: NDArray[np.int32], line_starts: NDArray[np.int64]) -> None:
        self.tokens = tokens
        self.line_starts = line_starts

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: TokenizerLike, *, max_tokens: int | None = None
    ) -> FillerBank:
        """Tokenizes texts line by line; stops after `max_tokens`.

        Lines are encoded with their newline, in one batch a text. A line of more than
        `MAX_FILLER_LINE` tokens is left out.
        """
        pieces: list[list[int]] = []
        lengths: list[int] = []
        total = 0
        for text in texts:
            for ids in _encode_lines(tokenizer, text):
                if len(ids) > MAX_FILLER_LINE:
                    continue
                pieces.append(ids)
                lengths.append(len(ids))
                total += len(ids)
            if max_tokens is not None and total >= max_tokens:
                break
        if total == 0:
            raise ValueError("no filler text: recall documents need at least one text source")
        tokens = np.fromiter((t for piece in pieces for t in piece), dtype=np.int32, count=total)
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        return cls(tokens, np.concatenate([[0], ends]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.tokens)

    def stretch(
        self, length: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """A random run of `length` tokens that ends with a line, and its line borders.

        Returns:
            tokens [length] and the sorted offsets (in 0..length) at which a line may be put in.
        """
        first = int(np.searchsorted(self.line_starts, length))
        if first >= len(self.line_starts):
            raise ValueError(
                f"filler holds {len(self)} tokens, fewer than the {length} of one document; "
                "add text sources or shorten data.seq_length"
            )
        end_index = int(rng.integers(first, len(self.line_starts)))
        end = int(self.line_starts[end_index])
        start = end - length
        begin_index = int(np.searchsorted(self.line_starts, start))
        return self.tokens[start:end], self.line_starts[begin_index : end_index + 1] - start


def _encode_lines(tokenizer: TokenizerLike, text: str) -> list[list[int]]:
    lines = [line + "\n" for line in text.split("\n")]
    if lines[-1] == "\n":
        lines.pop()  # the text ended with a newline
    return encode_text(tokenizer, lines)


@dataclass(frozen=True)
class _Line:
    """A fact or a question, as tokens; `value_start:value_end` is its value within them."""

    tokens: list[int]
    value_start: int
    value_end: int
    pair: int
    is_query: bool


class RecallGenerator:
    """Recall documents by number: document `index` depends on (seed, index) and the filler only.

    Args:
        config: what documents look like.
        tokenizer: a fast tokenizer; words may take several tokens in a foreign one.
        filler: text between the facts; the evaluation split brings its own.
        seq_length: tokens per document, exactly.
        seed: another seed gives other documents.

    Raises:
        ValueError: if facts, questions and min_distance do not fit into seq_length.
    """

    def __init__(
        self,
        config: RecallConfig,
        tokenizer: TokenizerLike,
        filler: FillerBank,
        *,
        seq_length: int,
        seed: int,
    ) -> None:
        self.config = config
        self.filler = filler
        self.seq_length = seq_length
        self.seed = seed
        texts = [NOTE_MARK, RECALL_MARK, "\n", *recall_words()]
        encoded = encode_text(tokenizer, texts)
        self._note, self._recall, self._newline = encoded[:3]
        self._separator = encode_text(tokenizer, [config.separator])[0] if config.separator else []
        self._keys = encoded[3 : 3 + len(RECALL_KEYS)]
        self._values = encoded[3 + len(RECALL_KEYS) :]
        self.max_line = (
            max(len(self._note), len(self._recall))
            + max(map(len, self._keys))
            + len(self._separator)
            + max(map(len, self._values))
            + len(self._newline)
        )
        if config.far_weight > 0:
            self._check_far_fits()
        if config.dense_weight > 0 and (config.dense_facts[1] + 1) * self.max_line > seq_length:
            raise ValueError(
                f"dense_facts={config.dense_facts[1]} lines of {self.max_line} tokens exceed "
                f"seq_length={seq_length}; lower data.recall.dense_facts"
            )
        if config.mixed_weight > 0:
            room = (1 - config.filler_fraction[1]) * seq_length
            if (config.num_facts[1] + 1) * self.max_line > room:
                raise ValueError(
                    f"num_facts={config.num_facts[1]} lines of {self.max_line} tokens exceed the "
                    f"{room:.0f} tokens that filler_fraction={config.filler_fraction[1]} leaves of "
                    f"seq_length={seq_length}; lower data.recall.num_facts or filler_fraction"
                )

    def _check_far_fits(self) -> None:
        config = self.config
        num_lines = config.num_facts[1] + min(config.num_facts[1], config.num_queries[1])
        filler = self.seq_length - num_lines * self.max_line
        # Facts and questions snap to line ends, which are at most MAX_FILLER_LINE apart.
        query_low = filler - max(int(config.query_region * filler), MAX_FILLER_LINE)
        if query_low - config.min_distance < MAX_FILLER_LINE:
            raise ValueError(
                f"min_distance={config.min_distance} with {num_lines} lines of {self.max_line} "
                f"tokens does not fit into seq_length={self.seq_length} (query_region="
                f"{config.query_region}); lower data.recall.min_distance or raise data.seq_length"
            )

    def sample(self, index: int, *, layout: Layout | None = None) -> Sample:
        """Document `index`, of a layout drawn by the configured weights unless one is named."""
        rng = np.random.default_rng([self.seed, index])
        weights = self.config.layout_weights
        share = np.asarray(list(weights.values()))
        drawn = list(weights)[int(rng.choice(len(share), p=share / share.sum()))]
        layout = layout or drawn
        lines, filler, offsets = getattr(self, f"_{layout}")(rng)
        return self._assemble(lines, filler, offsets, layout, index)

    def _line(self, pair: int, pairs: list[tuple[int, int]], *, query: bool) -> _Line:
        key, value = pairs[pair]
        mark = self._recall if query else self._note
        head = [*mark, *self._keys[key], *self._separator]
        tokens = [*head, *self._values[value], *self._newline]
        end = len(head) + len(self._values[value])
        return _Line(tokens, len(head), end, pair, query)

    def _pairs(self, rng: np.random.Generator, bounds: tuple[int, int]) -> list[tuple[int, int]]:
        count = int(rng.integers(bounds[0], bounds[1] + 1))
        keys = rng.choice(len(self._keys), size=count, replace=False)
        values = rng.choice(len(self._values), size=count, replace=False)
        return [(int(k), int(v)) for k, v in zip(keys, values, strict=True)]

    def _far(self, rng: np.random.Generator) -> tuple[list[_Line], NDArray[np.int32], list[int]]:
        config = self.config
        pairs = self._pairs(rng, config.num_facts)
        wanted = int(rng.integers(config.num_queries[0], config.num_queries[1] + 1))
        asked = rng.choice(len(pairs), size=min(wanted, len(pairs)), replace=False)
        facts = [self._line(i, pairs, query=False) for i in range(len(pairs))]
        queries = [self._line(int(i), pairs, query=True) for i in asked]
        length = self.seq_length - sum(len(line.tokens) for line in (*facts, *queries))
        filler, borders = self.filler.stretch(length, rng)
        query_low = length - max(int(config.query_region * length), MAX_FILLER_LINE)
        query_borders = borders[borders >= query_low]
        fact_high = min(
            int(query_borders[0]) - config.min_distance,
            max(int(config.fact_region * length), MAX_FILLER_LINE),
        )
        fact_borders = borders[borders <= fact_high]
        # Uniform over tokens, then back to the line's begin: short lines get no more than others.
        at_facts = _snap(fact_borders, rng.integers(0, fact_high + 1, size=len(facts)))
        at_queries = _snap(query_borders, rng.integers(query_low, length + 1, size=len(queries)))
        return [*facts, *queries], filler, [*at_facts, *at_queries]

    def _mixed(self, rng: np.random.Generator) -> tuple[list[_Line], NDArray[np.int32], list[int]]:
        config = self.config
        pairs = self._pairs(rng, config.num_facts)
        fraction = float(rng.uniform(*config.filler_fraction))
        budget = self.seq_length - int(fraction * self.seq_length)
        lines = self._interleave(rng, pairs, budget, spread=0.5)
        length = self.seq_length - sum(len(line.tokens) for line in lines)
        filler, borders = self.filler.stretch(length, rng)
        at = np.sort(rng.integers(0, length + 1, size=len(lines)))
        return lines, filler, _snap(borders, at)

    def _dense(self, rng: np.random.Generator) -> tuple[list[_Line], NDArray[np.int32], list[int]]:
        pairs = self._pairs(rng, self.config.dense_facts)
        lines = self._interleave(rng, pairs, self.seq_length, spread=0.25)
        # Less than a line remains; empty lines make the length exact.
        rest = self.seq_length - sum(len(line.tokens) for line in lines)
        filler = np.resize(np.asarray(self._newline, dtype=np.int32), rest)
        return lines, filler, [0] * len(lines)

    def _interleave(
        self, rng: np.random.Generator, pairs: list[tuple[int, int]], budget: int, *, spread: float
    ) -> list[_Line]:
        """Facts within the first `spread` of the lines, else questions about a stated one."""
        num_lines = max(budget // self.max_line, len(pairs) + 1)
        last = max(int(spread * num_lines), len(pairs))
        places = {0, *(1 + rng.choice(last - 1, size=len(pairs) - 1, replace=False)).tolist()}
        lines: list[_Line] = []
        stated = used = 0
        while True:
            if len(lines) in places:
                line = self._line(stated, pairs, query=False)
                stated += 1
            else:
                line = self._line(int(rng.integers(stated)), pairs, query=True)
            if used + len(line.tokens) > budget:
                return lines
            lines.append(line)
            used += len(line.tokens)

    def _assemble(
        self,
        lines: Sequence[_Line],
        filler: NDArray[np.int32],
        offsets: Sequence[int],
        layout: Layout,
        index: int,
    ) -> Sample:
        """Puts `lines[i]` before filler token `offsets[i]`; equal offsets keep their order."""
        order = np.argsort(np.asarray(offsets), kind="stable")
        parts: list[NDArray[np.int32]] = []
        latest: dict[int, tuple[int, int]] = {}
        facts: dict[int, int] = {}
        queries: list[dict[str, Any]] = []
        mask = np.zeros(self.seq_length, dtype=np.uint8)
        done = position = 0
        for i in order:
            line, offset = lines[i], int(offsets[i])
            parts.append(filler[done:offset])
            position += offset - done
            done = offset
            start, end = position + line.value_start, position + line.value_end
            if line.is_query:
                evidence = latest[line.pair]
                mask[start:end] = 1
                queries.append(
                    {
                        "answer_start": start,
                        "answer_end": end,
                        "evidence_start": evidence[0],
                        "evidence_end": evidence[1],
                        "distance": start - evidence[0],
                        "fact_start": facts[line.pair],
                    }
                )
            else:
                facts[line.pair] = start
            latest[line.pair] = (start, end)
            parts.append(np.asarray(line.tokens, dtype=np.int32))
            position += len(line.tokens)
        parts.append(filler[done:])
        if self.config.loss_on == "all":
            mask[1:] = 1
        return Sample(
            tokens=np.concatenate(parts),
            loss_mask=mask,
            cu_seqlens=np.asarray([0, self.seq_length], dtype=np.int32),
            meta={
                "kind": "recall",
                "source": f"recall/{layout}",
                "ids": [f"recall-{self.seed}-{index}"],
                "queries": queries,
                "num_padding": 0,
            },
        )


def _snap(borders: NDArray[np.int64], places: NDArray[np.int64]) -> list[int]:
    """The last border at or before each place (the first border where there is none)."""
    at = np.maximum(np.searchsorted(borders, places, side="right") - 1, 0)
    return [int(b) for b in borders[at]]
