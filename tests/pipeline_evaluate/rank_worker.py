"""One rank of a tiny evaluation: `python rank_worker.py FOLDER KIND…`, with RANK and the like."""

import sys
from pathlib import Path

from conftest import TaskRun

from allmem_megatron.parallel import init_model_parallel
from pipeline.distributed import init_distributed, shutdown

if __name__ == "__main__":
    run = TaskRun(Path(sys.argv[1]))
    ranks = init_distributed(device="cpu", timeout_s=180)
    init_model_parallel()
    run.evaluate(run.task_config(kinds=tuple(sys.argv[2:])), ranks)
    shutdown()
