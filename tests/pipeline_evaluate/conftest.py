"""A tiny run: a base model with random weights, shards of random tokens, trained branches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allmem_megatron.config import BaseModelConfig, MemoryConfig
from allmem_megatron.convert import model_to_hf, save_hf_dir
from allmem_megatron.model import build_model
from data_prep.config import PrepareConfig
from data_prep.sample import Sample
from data_prep.shards import Manifest, write_shard
from evals.config import EvalConfig
from pipeline.checkpoint import save_checkpoint
from pipeline.console import Reporter
from pipeline.context import StageContext
from pipeline.distributed import Ranks
from pipeline.fingerprint import fingerprint
from pipeline.metrics_log import MetricsLog
from pipeline.models import choose_dtype
from pipeline.schema import MixerConfig, ModelSettings, ParallelSettings, RunConfig, RunSettings
from pipeline.stages import evaluate

VOCABULARY, LENGTH, WINDOW = 61, 48, 12
MEMORY = MemoryConfig(memory_size=16, eta_init=0.5)
BASE = BaseModelConfig(
    family="qwen3",
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=VOCABULARY,
    qk_norm=True,
    tie_word_embeddings=True,
)
EVAL = EvalConfig(
    window_size=WINDOW,
    num_sinks=2,
    chunk_size=6,
    batch_size=3,
    logits_rows=20,
    num_bins=4,
    timing_repeats=1,
)


def text_sample(number: int) -> Sample:
    rng = np.random.default_rng(number)
    mask = np.ones(LENGTH, dtype=np.uint8)
    mask[0] = 0
    return Sample(
        tokens=rng.integers(0, VOCABULARY, LENGTH, dtype=np.int32),
        loss_mask=mask,
        cu_seqlens=np.array([0, LENGTH], dtype=np.int32),
        meta={"kind": "text", "source": "text", "ids": [f"text-{number}"], "num_padding": 0},
    )


def recall_sample(number: int) -> Sample:
    """A near question (distance 4) and a far one (distance 32, evidence behind the sinks)."""
    sample = text_sample(1000 + number)
    queries = [
        {"evidence_start": 5, "evidence_end": 7, "answer_start": 11, "answer_end": 13},
        {"evidence_start": 8, "evidence_end": 10, "answer_start": 42, "answer_end": 44},
    ]
    meta = {"kind": "recall", "source": "recall", "ids": [f"recall-{number}"], "queries": queries}
    return dataclasses.replace(sample, meta={**meta, "num_padding": 0})


def write_shards(folder: Path) -> None:
    """`eval/` with 5 text and 4 recall documents, and the manifest."""
    (folder / "eval").mkdir(parents=True)
    records = []
    for number, (kind, make, count) in enumerate(
        (("text", text_sample, 5), ("recall", recall_sample, 4))
    ):
        samples = [make(i) for i in range(count)]
        path = folder / "eval" / f"shard-{number:05d}.tar"
        records.append(write_shard(path, samples, first_key=0, source=kind, kind=kind))
    Manifest(
        tokenizer_hash="none",
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        config_hash="none",
        config={},
        splits={"train": (), "eval": tuple(records)},
        reports={},
    ).save(folder)


class TinyRun:
    """A prepared run under `folder`, to train branches in and to evaluate."""

    base = BASE
    length = LENGTH
    text_sample = staticmethod(text_sample)
    recall_sample = staticmethod(recall_sample)

    def __init__(self, folder: Path) -> None:
        self.dir = folder / "run"
        self.base_dir = folder / "base"

    def prepare(self) -> None:
        """Write the base model and the shards."""
        model = build_model(BASE, seed=0, init_std=0.3)
        save_hf_dir(self.base_dir, BASE, model_to_hf(model))
        write_shards(self.dir / "prepare")

    def train(self, entry: str, *, alpha: float, seed: int = 1, step: int = 7) -> None:
        """Write the checkpoint of a finished conversion: a random branch with this alpha."""
        branch = "mamba2" if entry.endswith("@mamba2") else "allmem"
        model = build_model(BASE, branch=branch, memory=MEMORY, seed=seed)
        with torch.no_grad():
            for mixer in model.mixers():
                mixer.memory.alpha.fill_(alpha)
        folder = self.dir / entry.replace("@", "_") / "checkpoints"
        weights = {name: t for name, t in model_to_hf(model).items() if ".memory." in name}
        save_checkpoint(
            folder, step=step, model=weights, optimizer={}, state={"tokens": 0}, keep_last=1
        )
        (folder.parent / "DONE.json").write_text("{}")

    def config(
        self,
        stages: tuple[str, ...] = ("prepare", "convert", "convert@mamba2", "evaluate"),
        **changes: Any,
    ) -> RunConfig:
        """The run's configuration, with changes of the section `eval`."""
        return RunConfig(
            recipe="tiny",
            stages=stages,
            run=RunSettings(dir=str(self.dir)),
            model=ModelSettings(path=str(self.base_dir)),
            mixer=MixerConfig(memory=MEMORY, window_size=WINDOW, num_sinks=2, chunk_size=6),
            data=PrepareConfig(tokenizer="none", seq_length=LENGTH, sources=[]),
            parallel=ParallelSettings(device="cpu"),
            eval=dataclasses.replace(EVAL, **changes),
        )

    def context(self, config: RunConfig, ranks: Ranks | None = None) -> StageContext:
        """What `pipeline.run` would hand to the stage."""
        ranks = ranks or Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
        return StageContext(
            entry="evaluate",
            branch="allmem",
            run_dir=self.dir,
            ranks=ranks,
            reporter=Reporter(enabled=ranks.is_main),
            metrics=MetricsLog(self.dir / "evaluate" / "metrics.jsonl", enabled=ranks.is_main),
            fingerprint=fingerprint(
                config,
                "evaluate",
                dtype=choose_dtype(config.parallel, ranks.device),
                device=ranks.device,
            ),
            commit="0123abc",
        )

    def evaluate(self, config: RunConfig, ranks: Ranks | None = None) -> dict[str, Any]:
        """Run the stage and read its results."""
        evaluate.run(config, self.context(config, ranks))
        results: dict[str, Any] = json.loads((self.dir / "evaluate/results.json").read_text())
        return results


@pytest.fixture
def tiny_run(tmp_path: Path) -> TinyRun:
    """A prepared run with nothing trained yet."""
    run = TinyRun(tmp_path)
    run.prepare()
    return run
