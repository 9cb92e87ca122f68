"""Peak memory of a distillation step grows with the tokens, not with their square or vocabulary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BYTES_PER_TOKEN = 24_000
"""Above the measured 14,000. Logits of all tokens would add 80,000, a [T, T] mask 65,000 a head."""


def test_peak_memory_of_convert_is_linear_in_tokens(environment: dict[str, str]):
    worker = Path(__file__).with_name("memory_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = [line.split() for line in done.stdout.strip().splitlines()]
    assert [int(tokens) for tokens, _ in lines] == [8192, 16384]
    for tokens, mebibytes in lines:
        assert float(mebibytes) * 2**20 < BYTES_PER_TOKEN * int(tokens)
