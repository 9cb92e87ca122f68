"""One rank of a tiny evaluation: `python rank_worker.py FOLDER [tasks]`, with RANK and the like."""

import sys
from pathlib import Path

from conftest import TaskRun, TinyRun

from allmem_megatron.parallel import init_model_parallel
from pipeline.distributed import init_distributed, shutdown

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ranks = init_distributed(device="cpu", timeout_s=60)
    init_model_parallel()
    if sys.argv[2:] == ["tasks"]:
        tasks = TaskRun(folder)
        tasks.evaluate(tasks.task_config(), ranks)
    else:
        run = TinyRun(folder)
        run.evaluate(run.config(), ranks)
    shutdown()
