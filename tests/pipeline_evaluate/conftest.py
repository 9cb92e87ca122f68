"""A tiny run: a base model with random weights, shards of random tokens, trained branches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from allmem_megatron.config import BaseModelConfig, MemoryConfig
from allmem_megatron.convert import model_to_hf, save_hf_dir
from allmem_megatron.model import build_model
from data_prep.config import PrepareConfig
from data_prep.sample import Sample
from data_prep.shards import Manifest, write_shard
from evals.config import EvalConfig, GenerationConfig
from evals.task import SuiteConfig
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


@contextlib.contextmanager
def unrendered() -> Iterator[None]:
    """Figures become empty files: to render them takes longer than all else of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b""))
        yield


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
        model = build_model(self.base, branch=branch, memory=MEMORY, seed=seed)
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

    def evaluate(
        self,
        config: RunConfig,
        ranks: Ranks | None = None,
        *,
        drawn: bool = False,
        commit: str = "0123abc",
    ) -> dict[str, Any]:
        """Run the stage and read its results; figures are built, and rendered where `drawn`."""
        context = dataclasses.replace(self.context(config, ranks), commit=commit)
        with contextlib.nullcontext() if drawn else unrendered():
            evaluate.run(config, context)
        results: dict[str, Any] = json.loads((self.dir / "evaluate/results.json").read_text())
        return results


WORDS = ("river", "house", "old", "man", "sea", "wind", "stone", "walked", "under", "green")
TEXT_BASE = dataclasses.replace(BASE, vocab_size=257, max_position_embeddings=700)
END = "<|end|>"


def save_byte_tokenizer(folder: Path) -> None:
    """256 bytes and an end token, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={x: i for i, x in enumerate([*letters, END])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.save_pretrained(folder)


def write_questions(folder: Path, name: str, count: int, seed: int = 0) -> None:
    """A data file in LongBench's format; every third context is longer than the model takes."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w") as file:
        for index in range(count):
            words = [rng.choice(WORDS) for _ in range(300 if index % 3 == 2 else 12 + index)]
            record = {
                "input": "Where did the man walk?",
                "context": " ".join(words),
                "answers": ["under the old stone"],
                "length": len(words),
                "dataset": name,
                "language": "en",
                "all_classes": None,
                "_id": f"{name}-{index}",
            }
            file.write(json.dumps(record) + "\n")


class TaskRun(TinyRun):
    """A tiny run whose model reads bytes, with trained branches and questions."""

    base = TEXT_BASE

    def prepare(self) -> None:
        """Write model, tokenizer, branch and questions; no shards."""
        model = build_model(TEXT_BASE, seed=0, init_std=0.3)
        save_hf_dir(self.base_dir, TEXT_BASE, model_to_hf(model))
        save_byte_tokenizer(self.base_dir)
        self.train("convert", alpha=0.7)
        write_questions(self.base_dir / "longbench", "2wikimqa", 9)

    def write_documents(self) -> None:
        """Held-out documents beside the questions."""
        write_shards(self.dir / "prepare")

    def task_config(
        self, *, tasks: tuple[str, ...] = ("longbench/2wikimqa",), **changes: Any
    ) -> RunConfig:
        """Tasks alone, without documents; changes of the section `eval`."""
        generation = changes.pop("generation", {})
        own = SuiteConfig(tasks=tasks, longbench_data=str(self.base_dir / "longbench"))
        settings: dict[str, Any] = {
            "kinds": (),
            "mixers": ("swa", "allmem"),
            "timing_repeats": 0,
            "suites": own,
            "generation": GenerationConfig(
                **{"batch_size": 2, "prefill_chunk": 64, "resamples": 50, **generation}
            ),
            **changes,
        }
        config = self.config(stages=("prepare", "convert", "evaluate"))
        data = dataclasses.replace(config.data, tokenizer=None)
        settings = dataclasses.replace(EVAL, **settings)
        return dataclasses.replace(config, data=data, eval=settings)

    def journals(self) -> dict[str, list[str]]:
        """`subject/id` of every journalled answer, by file."""
        files = sorted((self.dir / "evaluate" / "journal").glob("*/*/*/rank_*.jsonl"))
        return {
            str(file): [
                f"{file.parents[2].name}/{json.loads(line)['id']}"
                for line in file.read_bytes().splitlines(keepends=True)
                if line.endswith(b"\n")
            ]
            for file in files
        }


@pytest.fixture
def tiny_run(tmp_path: Path) -> TinyRun:
    """A prepared run with nothing trained yet."""
    run = TinyRun(tmp_path)
    run.prepare()
    return run


@pytest.fixture
def task_run(tmp_path: Path) -> TaskRun:
    """A tiny run with tokenizer, trained branch and LongBench questions."""
    run = TaskRun(tmp_path)
    run.prepare()
    return run
