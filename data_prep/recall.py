"""Recall documents: facts stated early in real text, asked for far later.

A fact is one line, `# note: amber -> falcon`; a question is `# recall: amber -> falcon`, whose
answer is what follows the arrow. Values are drawn anew for every document, so the answer can only
be found in the context. Three layouts:

- `far`: facts among the filler of the early part, each asked for at most once near the end;
- `mixed`: facts and questions all over the document, the same fact asked several times;
- `dense`: no filler, a small dictionary repeated to the end (the curriculum that a tiny base model
  needs: spec section 4).

Everything is placed at token level: the filler is tokenized once (`FillerBank`), lines are put
together from ready token lists, so that thousands of documents take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.config import Layout, RecallConfig
from data_prep.filler import MAX_FILLER_LINE, FillerBank, Stretch
from data_prep.sample import Sample
from data_prep.tokenize import TokenizerLike, encode_text
from data_prep.words import RECALL_KEYS, RECALL_VALUES

NOTE_MARK = "# note:"
RECALL_MARK = "# recall:"


def recall_words() -> tuple[str, ...]:
    """The words of facts as they stand in a line, each with its leading space."""
    return tuple(f" {word}" for word in (*RECALL_KEYS, *RECALL_VALUES))


def recall_symbols(separator: str = " ->") -> tuple[str, ...]:
    """Symbols to hand to the training of a tokenizer, so that each is one token there."""
    marks = (NOTE_MARK, RECALL_MARK, separator) if separator else (NOTE_MARK, RECALL_MARK)
    return (*marks, *recall_words())


@dataclass(frozen=True)
class Line:
    """A fact or a question, without its newline; `value_start:value_end` is its value's tokens."""

    tokens: list[int]
    value_start: int
    value_end: int
    pair: int
    is_query: bool


@dataclass(frozen=True)
class Placement:
    """Lines and the border numbers of the filler at which they are put in."""

    lines: list[Line]
    filler: Stretch
    places: list[int]


class RecallGenerator:
    """Recall documents by number: document `index` depends on (seed, index) and the filler only.

    Args:
        config: what documents look like.
        tokenizer: a fast tokenizer; words may take several tokens in a foreign one.
        filler: text between the facts; the evaluation split brings its own.
        seq_length: tokens per document, exactly.
        seed: another seed gives other documents.
        source: name in `meta`.

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
        source: str = "recall",
    ) -> None:
        self.config = config
        self.source = source
        self.filler = filler
        self.seq_length = seq_length
        self.seed = seed
        texts = [NOTE_MARK, RECALL_MARK, "\n", *recall_words()]
        encoded = encode_text(tokenizer, texts)
        self._note, self._recall, self.newline = encoded[:3]
        self._separator = encode_text(tokenizer, [config.separator])[0] if config.separator else []
        self._keys = encoded[3 : 3 + len(RECALL_KEYS)]
        self._values = encoded[3 + len(RECALL_KEYS) :]
        self.max_line = (
            max(len(self._note), len(self._recall))
            + max(map(len, self._keys))
            + len(self._separator)
            + max(map(len, self._values))
            + len(self.newline)
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
        placement: Placement = getattr(self, f"_{layout}")(rng)
        return self._assemble(placement, layout, index)

    def line(self, pair: int, pairs: list[tuple[int, int]], *, query: bool) -> Line:
        key, value = pairs[pair]
        mark = self._recall if query else self._note
        head = [*mark, *self._keys[key], *self._separator]
        tokens = [*head, *self._values[value]]
        return Line(tokens, len(head), len(tokens), pair, query)

    def num_line_tokens(self, lines: Sequence[Line]) -> int:
        """Tokens that lines take up, newlines included."""
        return sum(len(line.tokens) + len(self.newline) for line in lines)

    def draw_pairs(
        self, rng: np.random.Generator, bounds: tuple[int, int]
    ) -> list[tuple[int, int]]:
        count = int(rng.integers(bounds[0], bounds[1] + 1))
        keys = rng.choice(len(self._keys), size=count, replace=False)
        values = rng.choice(len(self._values), size=count, replace=False)
        return [(int(k), int(v)) for k, v in zip(keys, values, strict=True)]

    def _far(self, rng: np.random.Generator) -> Placement:
        config = self.config
        pairs = self.draw_pairs(rng, config.num_facts)
        wanted = int(rng.integers(config.num_queries[0], config.num_queries[1] + 1))
        asked = rng.choice(len(pairs), size=min(wanted, len(pairs)), replace=False)
        facts = [self.line(i, pairs, query=False) for i in range(len(pairs))]
        queries = [self.line(int(i), pairs, query=True) for i in asked]
        length = self.seq_length - self.num_line_tokens([*facts, *queries])
        filler = self.filler.stretch(length, rng)
        query_low = length - max(int(config.query_region * length), MAX_FILLER_LINE)
        first_query = int(np.searchsorted(filler.borders, query_low))
        fact_high = min(
            int(filler.borders[first_query]) - config.min_distance,
            max(int(config.fact_region * length), MAX_FILLER_LINE),
        )
        last_fact = int(np.searchsorted(filler.borders, fact_high, side="right"))
        # Uniform over tokens, then back to the line's begin: short lines get no more than others.
        at_facts = rng.integers(0, fact_high + 1, size=len(facts))
        at_queries = rng.integers(query_low, length + 1, size=len(queries))
        places = [
            *filler.snap(slice(0, last_fact), at_facts),
            *filler.snap(slice(first_query, None), at_queries),
        ]
        return Placement([*facts, *queries], filler, places)

    def _mixed(self, rng: np.random.Generator) -> Placement:
        config = self.config
        pairs = self.draw_pairs(rng, config.num_facts)
        fraction = float(rng.uniform(*config.filler_fraction))
        budget = self.seq_length - int(fraction * self.seq_length)
        lines = self._interleave(rng, pairs, budget, spread=0.5)
        length = self.seq_length - self.num_line_tokens(lines)
        filler = self.filler.stretch(length, rng)
        at = np.sort(rng.integers(0, length + 1, size=len(lines)))
        return Placement(lines, filler, filler.snap(slice(0, None), at))

    def _dense(self, rng: np.random.Generator) -> Placement:
        pairs = self.draw_pairs(rng, self.config.dense_facts)
        lines = self._interleave(rng, pairs, self.seq_length, spread=0.25)
        # Less than a line remains; empty lines make the length exact.
        rest = self.seq_length - self.num_line_tokens(lines)
        empty = np.resize(np.asarray(self.newline, dtype=np.int32), rest)
        filler = Stretch(empty, np.asarray([0]), np.asarray([False]))
        return Placement(lines, filler, [0] * len(lines))

    def _interleave(
        self, rng: np.random.Generator, pairs: list[tuple[int, int]], budget: int, *, spread: float
    ) -> list[Line]:
        """Facts within the first `spread` of the lines, else questions about a stated one."""
        num_lines = max(budget // self.max_line, len(pairs) + 1)
        last = max(int(spread * num_lines), len(pairs))
        places = {0, *(1 + rng.choice(last - 1, size=len(pairs) - 1, replace=False)).tolist()}
        lines: list[Line] = []
        stated = used = 0
        while True:
            if len(lines) in places:
                line = self.line(stated, pairs, query=False)
                stated += 1
            else:
                line = self.line(int(rng.integers(stated)), pairs, query=True)
            used += self.num_line_tokens([line])
            if used > budget:
                return lines
            lines.append(line)

    def _assemble(self, placement: Placement, layout: Layout, index: int) -> Sample:
        lines = placement.lines
        tokens, starts = place_lines(placement, self.newline)
        latest: dict[int, tuple[int, int]] = {}
        facts: dict[int, int] = {}
        queries: list[dict[str, Any]] = []
        mask = np.zeros(self.seq_length, dtype=np.uint8)
        for i in np.argsort(starts):
            line = lines[i]
            start, end = starts[i] + line.value_start, starts[i] + line.value_end
            if line.is_query:
                mask[start:end] = 1
                record = query_record((start, end), latest[line.pair])
                queries.append({**record, "fact_start": facts[line.pair]})
            else:
                facts[line.pair] = start
            latest[line.pair] = (start, end)
        if self.config.loss_on == "all":
            mask[1:] = 1
        return Sample(
            tokens=tokens,
            loss_mask=mask,
            cu_seqlens=np.asarray([0, self.seq_length], dtype=np.int32),
            meta={
                "kind": "recall",
                "source": self.source,
                "layout": layout,
                "ids": [f"{self.source}-{self.seed}-{index}"],
                "queries": queries,
                "num_padding": 0,
            },
        )


def query_record(answer: tuple[int, int], evidence: tuple[int, int]) -> dict[str, int]:
    """A question as `meta.json` holds it; evidence is the last place before it with the same pair.

    Spans are [start, end) in tokens of the sample; `distance` runs from evidence to answer.
    """
    return {
        "answer_start": answer[0],
        "answer_end": answer[1],
        "evidence_start": evidence[0],
        "evidence_end": evidence[1],
        "distance": answer[0] - evidence[0],
    }


def place_lines(
    placement: Placement, newline: Sequence[int]
) -> tuple[NDArray[np.int32], list[int]]:
    """Puts the lines into the filler, each with its newline; lines at one border keep their order.

    Returns:
        the tokens, and the place of each line's first token (after a newline in front) in them.
    """
    filler, borders = placement.filler.tokens, placement.filler.borders
    parts: list[NDArray[np.int32]] = []
    starts = [0] * len(placement.lines)
    done = position = 0
    for i in np.argsort(np.asarray(placement.places), kind="stable"):
        border = placement.places[i]
        offset = int(borders[border])
        line = placement.lines[i].tokens
        front = bool(placement.filler.before_newline[border])
        parts.append(filler[done:offset])
        parts.append(np.asarray([*newline, *line] if front else [*line, *newline], dtype=np.int32))
        position += offset - done
        starts[i] = position + (len(newline) if front else 0)
        position += len(line) + len(newline)
        done = offset
    parts.append(filler[done:])
    return np.concatenate(parts).astype(np.int32), starts
