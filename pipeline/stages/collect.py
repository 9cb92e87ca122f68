"""`stage=collect`: the model's own responses to prompts, as shards for `convert:on_policy`.

AllMem (arXiv 2602.13680) distils last on responses that the student gave beforehand, with the
teacher's distribution on them as the target. The stage writes `responses/` (a chat data set in
JSONL, which `prepare` takes too) and shards of it in its own folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.prepare import WorkersMissingError, prepare_shards
from data_prep.report.write import FIGURES, write_report
from data_prep.shards import MANIFEST_NAME, Manifest
from pipeline.atomic import remove_unfinished, write_json
from pipeline.checkpoint import refuse_other_config
from pipeline.collecting.prompts import Prompt, PromptReport, read_prompts
from pipeline.collecting.responses import (
    FOLDER,
    MANIFEST_FILE,
    PLAN_FILE,
    Progress,
    ResponseFiles,
    for_worker,
    shards_of_responses,
    write_manifest,
)
from pipeline.collecting.student import ModelStudent, load_student
from pipeline.context import StageContext
from pipeline.distributed import on_main, on_some
from pipeline.lineage import check_sources
from pipeline.schema import RunConfig
from pipeline.survival import StopRequested, stop
from pipeline.tokenizer import open_tokenizer
from pipeline.wording import count


def run(config: RunConfig, context: StageContext) -> None:
    """Collect responses and make shards of them; all ranks share the prompts.

    Raises:
        ValueError: no prompts, a tokenizer without a chat template, a stage before without a
            checkpoint, or responses of another configuration in the folder.
        OSError: the disk is full; finished responses are kept.
        StopRequested: the run was asked to stop; finished responses are kept.
    """
    check_sources(config)
    folder, ranks = context.dir / FOLDER, context.ranks
    report = PromptReport()
    prompts = on_some(ranks, True, lambda: _own_prompts(config, context, report))
    assert prompts is not None
    on_main(ranks, lambda: _claim(context, folder, report.digest))
    seconds = _collect(config, context, prompts)
    per_file = config.collect.prompts_per_file
    left_out = {"left_out": report.left_out, "num_bad": report.num_bad}
    manifest = on_main(
        ranks,
        lambda: write_manifest(
            folder, num_files=-(-report.num_prompts // per_file), more={"prompts": left_out}
        ),
    )
    totals = manifest["totals"]
    if not totals["num_kept"]:
        raise ValueError(
            f"none of {totals['num_responses']} responses is left: {totals['num_empty']} are "
            f"empty, {totals['num_unfinished']} were cut at collect.max_new_tokens="
            f"{config.collect.max_new_tokens}; raise it or set collect.keep_unfinished=true"
        )
    shards = on_some(ranks, True, lambda: _make_shards(config, context))
    assert shards is not None
    page, *figures = on_main(
        ranks, lambda: write_report(shards, context.dir, tokenizer=open_tokenizer(config))
    )
    context.artifact(folder / MANIFEST_FILE, context.dir / MANIFEST_NAME, page)
    context.artifact(*figures, folder=FIGURES)
    _tell(context, totals, seconds)


def _own_prompts(config: RunConfig, context: StageContext, report: PromptReport) -> list[Prompt]:
    """The prompts of this rank's files; every rank reads all of them.

    Raises:
        ValueError: there are none, or too many records cannot be read.
    """
    settings, ranks = config.collect, context.ranks
    own = [
        prompt
        for prompt in read_prompts(settings, open_tokenizer(config), report)
        if prompt.number // settings.prompts_per_file % ranks.world_size == ranks.rank
    ]
    why = ", ".join(f"{n} × {reason}" for reason, n in report.left_out.items())
    most = config.data.max_bad_fraction * (report.num_prompts + report.num_bad)
    if report.num_bad > most:
        raise ValueError(
            f"{report.num_bad} records of collect.sources cannot be read, more than "
            f"data.max_bad_fraction={config.data.max_bad_fraction} of them; mend them: "
            f"{'; '.join(report.examples[:3])}"
        )
    if not report.num_prompts:
        raise ValueError(
            f"collect.sources hold no prompt that can be used ({why or 'no record'}); correct "
            "their paths, or raise collect.max_prompt_tokens"
        )
    if why:
        context.say(f"{context.entry}: left out {why}")
    return own


def _claim(context: StageContext, folder: Path, prompts: str) -> None:
    """Note what the responses are made from, before the first.

    Raises:
        ValueError: there are responses of other settings or prompts.
    """
    remove_unfinished(folder)
    path = folder / PLAN_FILE
    plan = {"config": dict(context.fingerprint), "prompts": prompts}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        refuse_other_config(folder, stored["config"], context.fingerprint)
        if stored["prompts"] != prompts:
            raise ValueError(
                f"{folder} has responses to other prompts than collect.sources hold now; put the "
                f"former files back, or delete {folder.parent} to collect anew"
            )
        return
    write_json(path, plan)


def _collect(config: RunConfig, context: StageContext, prompts: list[Prompt]) -> float:
    """Make the responses; the seconds that it took."""
    ranks = context.ranks
    model = load_student(
        config, context.run_dir, entry=context.entry, branch=context.branch, device=context.device
    )
    student = ModelStudent(model, open_tokenizer(config), config.collect)
    files = ResponseFiles(context.dir / FOLDER, prompts, config.collect, config.run.seed)
    title = f"{context.entry}:" if ranks.world_size == 1 else f"{context.entry} (a rank's share):"
    done, _ = files.there()
    context.metrics.truncate_after(done)
    if done:
        context.say(f"{context.entry}: going on after {count(done, 'response')}")
    started = time.perf_counter()

    def make() -> None:
        with context.reporter.progress(title, files.total) as advance, stop.interrupting():
            files.make(student, _teller(context, advance), stop.check)

    on_some(ranks, True, make)
    return time.perf_counter() - started


def _teller(
    context: StageContext, advance: Callable[[int, str], None]
) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        advance(progress.done, f"{progress.tokens_per_s:.0f} tokens/s")
        values = {"tokens": float(progress.tokens), "tokens_per_s": progress.tokens_per_s}
        context.log(progress.done, values)

    return tell


def _make_shards(config: RunConfig, context: StageContext) -> Manifest:
    ranks = context.ranks
    data = for_worker(shards_of_responses(config, context.dir), ranks.rank, ranks.world_size)
    title = f"{context.entry} shards:"
    with context.reporter.progress(title, None) as advance, stop.interrupting():
        try:
            return prepare_shards(
                data,
                context.dir,
                tokenizer=open_tokenizer(config),
                progress=lambda what, done, total: advance(done, what, total),
                say=context.say,
            )
        except WorkersMissingError as error:
            raise StopRequested(f"{context.entry}: {error}") from error


def _tell(context: StageContext, totals: dict[str, int], seconds: float) -> None:
    responses = totals["num_responses"]
    shares = {
        "collect/finished_fraction": 1 - totals["num_unfinished"] / responses,
        "collect/empty_fraction": totals["num_empty"] / responses,
        "collect/same_tokens_fraction": totals["num_same_tokens"] / responses,
        "collect/mean_response_tokens": totals["response_tokens"] / responses,
    }
    context.log(responses + 1, shares)
    context.say(
        f"{context.entry}: {count(totals['num_kept'], 'response')} kept of {responses:,}, "
        f"{shares['collect/mean_response_tokens']:.0f} tokens on average, "
        f"{shares['collect/finished_fraction']:.0%} ended by themselves ({seconds:.0f} s)"
    )
