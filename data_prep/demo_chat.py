"""Conversations about facts in a long document: chat data that every machine can make."""

from __future__ import annotations

import numpy as np

from data_prep.chat import join_turns, parse_template
from data_prep.config import RecallConfig
from data_prep.filler import MAX_FILLER_LINE, FillerBank
from data_prep.recall import Placement, RecallGenerator, place_lines, query_record
from data_prep.sample import Sample
from data_prep.tokenize import TokenizerLike, encode_text
from data_prep.words import RECALL_KEYS

FIRST_QUESTION = "What is noted for"
NEXT_QUESTION = "And for"


class DemoChatGenerator:
    """The user shows a document with facts, then asks for some of them, a turn each.

    The assistant answers with the line `# recall: key -> value`. Sample `index` has exactly
    `seq_length` tokens and depends on (seed, index), the filler and the tokenizer only. Of the
    configuration `num_facts`, `num_queries`, `min_distance` and `separator` count.
    """

    def __init__(
        self,
        config: RecallConfig,
        tokenizer: TokenizerLike,
        filler: FillerBank,
        *,
        seq_length: int,
        seed: int,
        source: str = "demo_chat",
    ) -> None:
        self._recall = RecallGenerator(
            config, tokenizer, filler, seq_length=seq_length, seed=seed, source=source
        )
        self.config = config
        self.seq_length = seq_length
        self.seed = seed
        self.source = source
        self._tokenizer = tokenizer
        self._filler = filler
        keys = [f" {key}?" for key in RECALL_KEYS]
        self._first = encode_text(tokenizer, ["\n" + FIRST_QUESTION + key for key in keys])
        self._next = encode_text(tokenizer, [NEXT_QUESTION + key for key in keys])
        self._templates = {
            turns: parse_template(("user", "assistant") * turns, tokenizer)
            for turns in range(1, config.num_queries[1] + 1)
        }

    def sample(self, index: int) -> Sample:
        """Conversation number `index`."""
        config, recall = self.config, self._recall
        rng = np.random.default_rng([self.seed, index])
        pairs = recall.draw_pairs(rng, config.num_facts)
        wanted = int(rng.integers(config.num_queries[0], config.num_queries[1] + 1))
        asked = rng.choice(len(pairs), size=min(wanted, len(pairs)), replace=False)
        facts = [recall.line(i, pairs, query=False) for i in range(len(pairs))]
        answers = [recall.line(int(i), pairs, query=True) for i in asked]
        contents: list[list[int]] = []
        for turn, pair in enumerate(asked):
            question = self._first if turn == 0 else self._next
            contents += [question[pairs[int(pair)][0]], answers[turn].tokens]
        template = self._templates[len(asked)]
        fixed = template.num_tokens + sum(map(len, contents)) + recall.num_line_tokens(facts)
        length = self.seq_length - fixed
        high = length - config.min_distance
        if high < MAX_FILLER_LINE:
            raise ValueError(
                f"min_distance={config.min_distance} leaves no room for facts in {length} tokens "
                f"of filler (seq_length={self.seq_length}); lower recall.min_distance of "
                f"source {self.source}"
            )
        filler = self._filler.stretch(length, rng)
        last = int(np.searchsorted(filler.borders, high, side="right"))
        at = filler.snap(slice(0, last), rng.integers(0, high + 1, size=len(facts)))
        document, places = place_lines(Placement(facts, filler, at), recall.newline)
        contents[0] = [*document.tolist(), *contents[0]]
        roles = ("user", "assistant") * len(asked)
        tokens, mask, starts = join_turns(template, roles, contents)
        queries = []
        for turn, pair in enumerate(asked):
            line, fact = answers[turn], facts[int(pair)]
            answer = starts[2 * turn + 1]
            evidence = starts[0] + places[int(pair)]
            queries.append(
                query_record(
                    (answer + line.value_start, answer + line.value_end),
                    (evidence + fact.value_start, evidence + fact.value_end),
                )
            )
        mask[0] = 0
        return Sample(
            tokens=tokens,
            loss_mask=mask,
            cu_seqlens=np.asarray([0, self.seq_length], dtype=np.int32),
            meta={
                "kind": "chat",
                "source": self.source,
                "ids": [f"{self.source}-{self.seed}-{index}"],
                "queries": queries,
                "num_padding": 0,
            },
        )
