"""`stage=prepare`: documents to tokens to webdataset shards."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from data_prep.prepare import WorkersMissingError, prepare_shards, summary
from data_prep.report import FIGURES, REPORT_NAME, counts_bad, write_report
from data_prep.shards import MANIFEST_NAME, Manifest
from pipeline.console import Reporter
from pipeline.context import StageContext
from pipeline.distributed import on_main, on_some
from pipeline.models import check_base
from pipeline.schema import RunConfig
from pipeline.survival import StopRequested, stop
from pipeline.tokenizer import check_vocabulary, open_tokenizer
from pipeline.wording import count


def run(config: RunConfig, context: StageContext) -> None:
    """Write the shards of `config.data`; the ranks, or the workers of `data.num_workers`, share it.

    Raises:
        ValueError: no base model, one that does not fit the configuration, no tokenizer, an
            unreadable source, too few samples, or shards of another configuration in the folder.
        OSError: the disk is full; finished work is kept.
        StopRequested: the run was asked to stop, or other workers have not done their part;
            finished work is kept.
    """
    started = time.perf_counter()
    ranks = context.ranks
    on_main(ranks, lambda: _check(config))
    if ranks.world_size > 1:
        if config.data.num_workers > 1:
            raise ValueError(
                f"data.num_workers={config.data.num_workers} is for separate processes, this run "
                f"has {ranks.world_size} ranks that share the work already; leave it out"
            )
        data = replace(config.data, num_workers=ranks.world_size, worker_rank=ranks.rank)
        config = replace(config, data=data)
    # Ranks wait here for those that have more to do, and end together if one is asked to stop.
    manifest = on_some(
        ranks, True, lambda: _prepare(config, context.data_dir, context.entry, context.reporter)
    )
    assert manifest is not None
    tokenizer = open_tokenizer(config)
    page, *figures = on_main(
        ranks, lambda: write_report(manifest, context.data_dir, tokenizer=tokenizer)
    )
    context.artifact(context.data_dir / MANIFEST_NAME, page)
    context.artifact(*figures, folder=FIGURES)
    if ranks.is_main:
        _report(manifest, context, time.perf_counter() - started)


def _check(config: RunConfig) -> None:
    check_base(config)
    check_vocabulary(config)


def assist(config: RunConfig) -> None:
    """The part of a worker beside worker 0: text and shards, but no metrics, MLflow or DONE.json.

    Raises:
        ValueError, OSError, StopRequested: as `run`.
    """
    _check(config)
    reporter = Reporter(every_s=config.run.log_every_s)
    entry = f"prepare, worker {config.data.worker_rank}"
    _prepare(config, Path(config.run.dir) / "prepare", entry, reporter)
    reporter.say(f"{entry}: complete; worker 0 ends the stage")


def _prepare(config: RunConfig, folder: Path, entry: str, reporter: Reporter) -> Manifest:
    tokenizer = open_tokenizer(config)
    # The manifest says where the tokenizer is, also where it is the model's own.
    data = replace(config.data, tokenizer=config.data.tokenizer or str(config.model.path))
    with reporter.progress(f"{entry}:", None) as advance, stop.interrupting():
        try:
            return prepare_shards(
                data,
                folder,
                tokenizer=tokenizer,
                progress=lambda what, done, total: advance(done, what, total),
                say=reporter.say,
            )
        except WorkersMissingError as error:
            raise StopRequested(f"{entry}: {error}") from error


def _report(manifest: Manifest, context: StageContext, seconds: float) -> None:
    context.metrics.truncate_after(-1)
    tokens = 0
    for step, row in enumerate(summary(manifest)):
        tokens += row["num_tokens"]
        context.say(
            f"{context.entry}: {row['split']}/{row['source']}: "
            f"{count(row['num_samples'], 'sample')}, {count(row['num_tokens'], 'token')}, "
            f"{row['num_loss_tokens']:,} of them with loss, {count(row['num_shards'], 'shard')}"
        )
        prefix = f"prepare/{row['split']}/{row['source']}"
        report = manifest.reports[f"{row['split']}/{row['source']}"]
        context.log(
            step,
            {
                "tokens": tokens,
                f"{prefix}/samples": row["num_samples"],
                f"{prefix}/tokens": row["num_tokens"],
                f"{prefix}/loss_fraction": row["num_loss_tokens"] / max(row["num_tokens"], 1),
                f"{prefix}/fill": row["num_tokens"] / (row["num_samples"] * manifest.seq_length),
                f"{prefix}/bad_records": report["num_bad"],
                "tokens_per_s": tokens / max(seconds, 1e-9),
            },
        )
    for name, report in manifest.reports.items():
        if report["num_bad"] and counts_bad(manifest, *name.split("/", 1)):
            reasons = ", ".join(f"{n} × {why}" for why, n in report["bad_reasons"].items())
            context.say(f"{name}: {count(report['num_bad'], 'unreadable record')} ({reasons})")
    context.say(f"{context.entry}: {context.data_dir / REPORT_NAME} shows it all")
