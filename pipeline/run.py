"""`python -m pipeline.run stage=NAME recipe=NAME run.dir=DIR [group=option] [key=value …]`.

Runs one stage, or with `stage=all` the recipe's stages in order. A stage whose `DONE.json` has the
same configuration hash is skipped and an unfinished one goes on from its newest checkpoint, so the
same command, given again, resumes.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import PROJECT_ROOT, compose, split_entry, to_plain
from pipeline.help import help_text
from pipeline.schema import TRAINING_STAGES, RunConfig

EXIT_USER_ERROR = 2
"""Something that the user can mend."""
EXIT_STOPPED = 143
"""Asked to stop; the state is on disk."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Megatron-Core tells at import which optional packages it does without.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    debug = any(word.replace(" ", "").lower() == "run.debug=true" for word in words)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(help_text(words[1] if len(words) > 1 else None))
            return 0
        show = "--cfg" in words
        config = compose([word for word in words if word != "--cfg"])
        if show:
            print(json.dumps(to_plain(config), indent=2))
            return 0
        return _run(config)
    except (ValueError, OSError, ArithmeticError) as error:
        return _report(error, debug)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _report(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    line = " ".join(str(error).split()) or type(error).__name__
    hint = "" if debug else " (run.debug=true shows where)"
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" on rank {rank}"
    print(f"error{where}: {line}{hint}", file=sys.stderr)
    return EXIT_USER_ERROR


def _run(config: RunConfig) -> int:
    import torch

    from allmem_megatron.parallel import init_model_parallel
    from pipeline.distributed import (
        MainRankFailedError,
        init_distributed,
        seed_everything,
    )
    from pipeline.train_loop import StopRequested

    if config.parallel.num_threads:
        torch.set_num_threads(config.parallel.num_threads)
    ranks = init_distributed(device=config.parallel.device, timeout_s=config.parallel.timeout_s)
    try:
        init_model_parallel()
        seed_everything(config.run.seed)
        run_dir = Path(config.run.dir)
        with _only_user(run_dir) if ranks.is_main else contextlib.nullcontext():
            wanted = config.stage.name
            for entry in config.stages if wanted == "all" else (wanted,):
                _run_stage(config, entry, run_dir, ranks)
    except StopRequested as stop:
        if ranks.is_main:
            print(stop, file=sys.stderr)
        return EXIT_STOPPED
    except MainRankFailedError:
        return EXIT_USER_ERROR  # rank 0 prints the reason
    return 0


def _leave() -> None:
    """End the process group; only at the process's end, for DeepSpeed keeps groups by itself."""
    if "torch" in sys.modules:
        from pipeline.distributed import shutdown

        shutdown()


@contextlib.contextmanager
def _only_user(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this process, so that no two write the same files.

    Raises:
        ValueError: another process has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run.dir={run_dir} is in use by another process; wait for it or set another one"
            ) from None
        yield


def _run_stage(config: RunConfig, entry: str, run_dir: Path, ranks: Any) -> None:
    from pipeline.checkpoint import remove_unfinished, write_json
    from pipeline.console import Reporter
    from pipeline.context import StageContext, folder_name
    from pipeline.distributed import on_main
    from pipeline.fingerprint import digest, fingerprint
    from pipeline.lineage import branch_of
    from pipeline.metrics_log import MetricsLog
    from pipeline.tracking import track

    name, _ = split_entry(entry)
    flat = fingerprint(config, entry)
    folder = run_dir / folder_name(entry)
    done = folder / "DONE.json"
    context = StageContext(
        entry=entry,
        branch=branch_of(config, entry),
        run_dir=run_dir,
        ranks=ranks,
        reporter=Reporter(enabled=ranks.is_main, every_s=config.run.log_every_s),
        metrics=MetricsLog(folder / "metrics.jsonl", enabled=ranks.is_main),
        fingerprint=flat,
        commit=commit(),
    )
    if on_main(ranks, lambda: _is_done(context, done, digest(flat))):
        context.say(f"{entry}: already complete ({done})")
        with track(config, context, resume_only=True):
            return
    if ranks.is_main:
        for place in (run_dir, run_dir / "configs", folder):
            remove_unfinished(place)
    on_main(
        ranks, lambda: write_json(run_dir / "configs" / f"{folder.name}.json", to_plain(config))
    )
    module = importlib.import_module(f"pipeline.stages.{name}")
    started = time.time()
    with track(config, context):
        module.run(config, context)
        context.metrics.close()
    on_main(
        ranks,
        lambda: write_json(
            done,
            {
                "stage": entry,
                "hash": digest(flat),
                "config": flat,
                "commit": context.commit,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "seconds": round(time.time() - started, 1),
            },
        ),
    )
    context.say(f"{entry}: complete in {time.time() - started:.0f} s")


def _is_done(context: Any, done: Path, wanted: str) -> bool:
    """Whether the stage is complete with this configuration.

    Raises:
        ValueError: a training stage is complete with another configuration; its weights are not
            thrown away without being asked.
    """
    from pipeline.checkpoint import refuse_other_config

    if not done.is_file():
        return False
    mark = json.loads(done.read_text(encoding="utf-8"))
    if mark.get("hash") == wanted:
        return True
    if context.name in TRAINING_STAGES:
        refuse_other_config(context.dir, mark["config"], context.fingerprint)
    done.unlink()
    return False


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
