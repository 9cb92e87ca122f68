"""One of several context-parallel ranks on gloo; started by the `ranks` fixture of conftest.py.

python worker.py FILE; the ranks meet at FILE, rank and world come by environment. All get the same
lines of JSON, {"case": NAME, …}, run the case together, and each answers with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch
import torch.distributed as dist


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    import attention_cases
    import exchange_cases
    import layouts
    import model_cases

    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[1]}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    layouts.switch(1, int(os.environ["WORLD_SIZE"]))
    cases = {**exchange_cases.CASES, **attention_cases.CASES, **model_cases.CASES}
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"result": cases[arguments.pop("case")](**arguments)}
        except Exception:  # noqa: BLE001  # told to the test, which ends all ranks
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    layouts.leave()


if __name__ == "__main__":
    main()
