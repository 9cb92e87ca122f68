"""`stage=prepare`: documents to tokens to webdataset shards."""

from __future__ import annotations

import time

from data_prep.prepare import prepare_shards, summary
from data_prep.shards import MANIFEST_NAME, Manifest
from pipeline.context import StageContext
from pipeline.distributed import on_main
from pipeline.models import check_base
from pipeline.schema import RunConfig
from pipeline.survival import stop
from pipeline.tokenizer import open_tokenizer
from pipeline.wording import count


def run(config: RunConfig, context: StageContext) -> None:
    """Write the shards of `config.data` into the stage's folder, on rank 0.

    Raises:
        ValueError: no base model, one that does not fit the configuration, no tokenizer, an
            unreadable source, too few samples, or shards of another configuration in the folder.
        OSError: the disk is full; finished shards are kept.
        StopRequested: the run was asked to stop; finished shards are kept.
    """
    on_main(context.ranks, lambda: _prepare(config, context))


def _prepare(config: RunConfig, context: StageContext) -> None:
    started = time.perf_counter()
    check_base(config)
    tokenizer = open_tokenizer(config)
    with context.reporter.progress(f"{context.entry}:", None) as advance, stop.interrupting():
        manifest = prepare_shards(
            config.data,
            context.data_dir,
            tokenizer=tokenizer,
            progress=lambda what, done, total: advance(done, what, total),
        )
    context.artifact(context.data_dir / MANIFEST_NAME)
    _report(manifest, context, time.perf_counter() - started)


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
                f"{prefix}/bad_records": report["num_bad"],
                "tokens_per_s": tokens / max(seconds, 1e-9),
            },
        )
    for name, report in manifest.reports.items():
        if report["num_bad"]:
            reasons = ", ".join(f"{n} × {why}" for why, n in report["bad_reasons"].items())
            context.say(f"{name}: {count(report['num_bad'], 'unreadable record')} ({reasons})")
