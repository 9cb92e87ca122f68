"""Repeated segments: a few random tokens, said again and again to the end of the sample.

From the second time on every token is decided by what stood before it, so a fresh model finds out
quickly how to match the present with the past; facts and questions come far more slowly alone
(docs/decisions.md has the measurement). Part of the curriculum of a base model made from scratch.
"""

from __future__ import annotations

import numpy as np

from data_prep.config import RecallConfig
from data_prep.filler import FillerBank
from data_prep.recall import recall_words
from data_prep.sample import Sample
from data_prep.tokenize import TokenizerLike, encode_text


class RepeatGenerator:
    """Samples by number: `index`, the seed, the tokenizer and the filler decide each one.

    Args:
        config: `repeat_length` bounds the segment.
        tokenizer: a fast tokenizer.
        filler: half of the segments are tokens drawn from it, the others words of recall documents.
        seq_length: tokens per sample, exactly.
        seed: another seed gives other samples.
        source: name in `meta`.

    Raises:
        ValueError: the longest segment does not fit twice into seq_length.
    """

    def __init__(
        self,
        config: RecallConfig,
        tokenizer: TokenizerLike,
        filler: FillerBank,
        *,
        seq_length: int,
        seed: int,
        source: str = "repeats",
    ) -> None:
        if 2 * config.repeat_length[1] > seq_length:
            raise ValueError(
                f"repeat_length={config.repeat_length} does not fit twice into "
                f"seq_length={seq_length}; lower data.recall.repeat_length"
            )
        words = [ids[0] for ids in encode_text(tokenizer, list(recall_words())) if len(ids) == 1]
        self._pools = [filler.tokens, np.asarray(words, dtype=np.int32)]
        if not words:  # a foreign tokenizer: its words take several tokens each
            self._pools.pop()
        self._bounds = config.repeat_length
        self._seq_length, self._seed, self._source = seq_length, seed, source

    def sample(self, index: int) -> Sample:
        """Sample `index`; loss targets are all tokens whose predecessor was seen before."""
        rng = np.random.default_rng([self._seed, index])
        length = int(rng.integers(self._bounds[0], self._bounds[1] + 1))
        pool = self._pools[int(rng.integers(len(self._pools)))]
        segment = rng.choice(pool, size=length)
        mask = np.ones(self._seq_length, dtype=np.uint8)
        mask[: length + 1] = 0
        return Sample(
            tokens=np.resize(segment, self._seq_length).astype(np.int32),
            loss_mask=mask,
            cu_seqlens=np.asarray([0, self._seq_length], dtype=np.int32),
            meta={
                "kind": "repeat",
                "source": self._source,
                "ids": [f"{self._source}-{self._seed}-{index}"],
                "queries": [],
                "num_padding": 0,
            },
        )
