"""`python -m pipeline.run stage=NAME recipe=NAME run.dir=DIR [group=option] [key=value …]`.

Runs one stage, or with `stage=all` the recipe's stages in order. A stage that is done with the
same configuration and inputs is skipped and an unfinished one goes on from its newest checkpoint,
so the same command, given again, resumes.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import PROJECT_ROOT, compose, split_entry, to_plain
from pipeline.help import help_text
from pipeline.schema import RunConfig
from pipeline.survival import (
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    MainRankFailedError,
    RankLostError,
    StopRequested,
    exit_code,
    hearing_signals,
    this_rank,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (`pipeline.survival` has them all)."""
    with hearing_signals():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(words: list[str]) -> int:
    debug = any(word.replace(" ", "").lower() == "run.debug=true" for word in words)
    try:
        if not words or words[0] == "help" or {"-h", "--help"} & set(words):
            print(help_text(_section_asked(words)))
            return 0
        show = "--cfg" in words
        config = compose([word for word in words if word != "--cfg"])
        if show:
            print(json.dumps(to_plain(config), indent=2))
            return 0
        return _run(config)
    except (ValueError, OSError, ArithmeticError) as error:
        return _report(error, debug)
    except KeyboardInterrupt as error:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return exit_code(error)


def _report(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    elif getattr(error, "told_by_rank_0", False):
        return EXIT_USER_ERROR
    line = " ".join(str(error).split()) or type(error).__name__
    hint = "" if debug else " (run.debug=true shows where)"
    rank = this_rank()
    where = f" on rank {rank}" if rank else ""
    print(f"error{where}: {line}{hint}", file=sys.stderr)
    return EXIT_USER_ERROR


def _section_asked(words: list[str]) -> str | None:
    """The section in `--help SECTION`, wherever it stands: the first word without a value."""
    names = [word for word in words if word not in ("-h", "--help", "help") and "=" not in word]
    return names[0] if names else None


def _run(config: RunConfig) -> int:
    if config.stage.name == "plan":
        return _plan(config)
    if config.data.num_workers > 1 and config.stage.name != "prepare":
        raise ValueError(
            f"data.num_workers={config.data.num_workers} shares the work of stage=prepare alone; "
            f"stage={config.stage.name} needs it left out"
        )
    if config.data.worker_rank > 0:
        return _assist(config)
    import torch

    from allmem_megatron.parallel import init_model_parallel
    from pipeline.crew import crew_of
    from pipeline.distributed import init_distributed, seed_everything
    from pipeline.layout import check_layout
    from pipeline.models import base_config
    from pipeline.summary import print_summary

    if config.parallel.num_threads:
        torch.set_num_threads(config.parallel.num_threads)
    parallel = config.parallel
    ranks = init_distributed(device=parallel.device, timeout_s=parallel.timeout_s)
    try:
        with crew_of(parallel, ranks) as crew:
            ranks = ranks.with_layout(tp=parallel.tp, cp=parallel.cp)
            check_layout(config, base_config(config), ranks)
            init_model_parallel(parallel.tp, parallel.cp)
            seed_everything(config.run.seed)
            run_dir = Path(config.run.dir)
            with _only_user(run_dir, config) if ranks.is_main else contextlib.nullcontext():
                wanted = config.stage.name
                for entry in config.stages if wanted == "all" else (wanted,):
                    _run_stage(config, entry, run_dir, ranks, crew)
                if ranks.is_main and wanted in ("all", "evaluate"):
                    print_summary(config, run_dir)
    except StopRequested as request:
        if ranks.is_main:
            print(request, file=sys.stderr)
        return EXIT_REQUEUE
    except RankLostError as error:
        return error.code  # told
    except MainRankFailedError as error:
        return exit_code(error)  # rank 0 prints the reason
    return 0


def _plan(config: RunConfig) -> int:
    """`stage=plan`: one process without a process group; no lock, and done anew at every call."""
    import torch

    from pipeline.artifacts import clear_artifacts
    from pipeline.console import Reporter
    from pipeline.context import StageContext
    from pipeline.distributed import Ranks
    from pipeline.metrics_log import MetricsLog
    from pipeline.stages import plan
    from pipeline.tracking import track

    run_dir = Path(config.run.dir)
    device = torch.device("cpu")
    context = StageContext(
        entry="plan",
        branch=config.mixer.branch,
        run_dir=run_dir,
        ranks=Ranks(rank=0, local_rank=0, world_size=1, device=device),
        reporter=Reporter(every_s=config.run.log_every_s),
        metrics=MetricsLog(run_dir / "plan" / "metrics.jsonl", enabled=True),
        fingerprint={},
        commit=commit(),
    )
    (run_dir / "plan").mkdir(parents=True, exist_ok=True)
    clear_artifacts(run_dir, "plan")
    with track(config, context):
        plan.run(config, context)
    return 0


def _assist(config: RunConfig) -> int:
    """A worker of `stage=prepare` beside worker 0: one process without a process group."""
    from pipeline.stages.prepare import assist

    try:
        with _only_user(Path(config.run.dir), config):
            assist(config)
    except StopRequested as request:
        print(request, file=sys.stderr)
        return EXIT_REQUEUE
    return 0


def _leave() -> None:
    """End the process group; only at the process's end, for DeepSpeed keeps groups by itself."""
    if "torch" in sys.modules:
        from pipeline.crew import linger
        from pipeline.distributed import shutdown

        linger()
        shutdown()


@contextlib.contextmanager
def _only_user(run_dir: Path, config: RunConfig) -> Iterator[None]:
    """Hold the run's folder for this process, so that no two write the same files.

    Workers of `stage=prepare` share the folder with each other, each rank once.

    Raises:
        ValueError: another process has it.
    """
    data = config.data
    locks = [(run_dir / ".lock", fcntl.LOCK_SH if data.num_workers > 1 else fcntl.LOCK_EX)]
    if data.num_workers > 1:
        name = f".lock.worker{data.worker_rank}of{data.num_workers}"
        locks.append((run_dir / name, fcntl.LOCK_EX))
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for path, kind in locks:
            file = stack.enter_context(path.open("a"))
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"run.dir={run_dir} is in use by another process ({path.name}); wait for it or "
                    "set another one"
                ) from None
        yield


def _run_stage(config: RunConfig, entry: str, run_dir: Path, ranks: Any, crew: Any) -> None:
    from pipeline.artifacts import clear_artifacts
    from pipeline.atomic import remove_unfinished, write_json
    from pipeline.console import Reporter
    from pipeline.context import DONE_FILE, StageContext, folder_name
    from pipeline.crew import announcing
    from pipeline.distributed import on_main
    from pipeline.done import is_done, mark_done, start
    from pipeline.fingerprint import fingerprint
    from pipeline.lineage import branch_of
    from pipeline.metrics_log import MetricsLog
    from pipeline.models import choose_dtype
    from pipeline.survival import stop_if_asked
    from pipeline.tracking import track
    from pipeline.wording import duration

    name, _ = split_entry(entry)
    folder = run_dir / folder_name(entry)
    settings = run_dir / "configs" / f"{folder.name}.json"
    dtype = choose_dtype(config.parallel, ranks.device)
    context = StageContext(
        entry=entry,
        branch=branch_of(config, entry),
        run_dir=run_dir,
        ranks=ranks,
        reporter=Reporter(enabled=ranks.is_main, every_s=config.run.log_every_s),
        metrics=MetricsLog(folder / "metrics.jsonl", enabled=ranks.is_main),
        fingerprint=fingerprint(config, entry, dtype=dtype, device=ranks.device),
        commit=commit(),
    )
    stop_if_asked(ranks, f"stopped before {entry}")
    if on_main(ranks, lambda: is_done(config, context)):
        context.say(f"{entry}: already complete ({folder / DONE_FILE})")
        with track(config, context, resume_only=True):
            return
    if ranks.is_main:
        for place in (run_dir, run_dir / "configs", folder):
            remove_unfinished(place)
    inputs = on_main(ranks, lambda: start(config, context))
    on_main(ranks, lambda: write_json(settings, to_plain(config)))
    on_main(ranks, lambda: clear_artifacts(run_dir, folder.name))
    context.artifact(settings, folder="config")
    module = importlib.import_module(f"pipeline.stages.{name}")
    started = time.time()
    with track(config, context), announcing(crew):
        module.run(config, context)
        context.metrics.close()
    seconds = time.time() - started
    on_main(ranks, lambda: mark_done(context, inputs, seconds=seconds))
    context.say(f"{entry}: complete in {duration(seconds)}")


def commit() -> str:
    """The program's commit, with `+` behind it when files differ from it."""
    try:
        found = subprocess.run(
            ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # not a clone: an installed copy has no commit
    return found.stdout.strip()


if __name__ == "__main__":
    try:
        status = main()
    finally:
        _leave()
    sys.exit(status)
