"""`benchmarks/gpu_conversion.sh`: a conversion in pieces, with what is measured so far."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import ROOT

ENVIRONMENT = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def script(*words: str) -> subprocess.CompletedProcess[str]:
    """The script's result."""
    return subprocess.run(
        ["bash", "benchmarks/gpu_conversion.sh", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_converts_measures_and_keeps_the_memory(tmp_path: Path):
    out, run = tmp_path / "out", tmp_path / "run"
    words = [str(out), "--run-dir", str(run), "recipe=tiny", "parallel.device=cpu"]
    found = script(*words, "stages=[prepare,pretrain,convert,evaluate,export]")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"complete: {out}" in found.stdout
    results = json.loads((out / "results.json").read_text())
    assert "allmem" in results["mixers"]
    newest = sorted((run / "convert" / "checkpoints").glob("*/model.safetensors"))[-1]
    assert (out / "memory.safetensors").read_bytes() == newest.read_bytes()
    assert (out / "convert.jsonl").read_bytes() == (run / "convert" / "metrics.jsonl").read_bytes()
    assert not (out / "convert_mamba2.jsonl").exists()


def test_an_error_is_passed_on_and_an_option_checked(tmp_path: Path):
    found = script(str(tmp_path / "out"), "recipe=tiny", "convert.stepps=3")
    assert found.returncode == 2
    assert "convert.stepps is not a setting" in found.stdout
    assert "not complete (exit status 2): the same command goes on" in found.stdout
    refused = script("--nothing")
    assert refused.returncode == 2
    assert "error: --nothing is no option" in refused.stderr
