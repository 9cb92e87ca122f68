"""The speed benchmarks: what is wrong is refused, runs go on, and ratios hold on any machine.

Ratios are of CPU seconds, and medians of interleaved repeats, so that other programs on the machine
hardly change them.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels, models, speed_plots
from benchmarks.kernel_cases import make_contest
from benchmarks.measure import ROOT, Ceilings, Stopwatch
from benchmarks.model_cases import ConstantReader, FullReader, build, check_error
from benchmarks.rows import Results, measured
from benchmarks.shapes import SHAPES

CPU = torch.device("cpu")
CEILINGS = Ceilings(flops=1e10, bandwidth=1e10, dtype="float32")


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads(path.read_text("utf-8"))["rows"]
    return {(row["group"], row["name"]): row for row in found}


@pytest.mark.parametrize("op", ["memory", "attention", "mixer"])
def test_a_wrong_version_is_refused_and_the_others_are_measured(op: str, tmp_path: Path) -> None:
    spoiled = {"memory": "plain", "attention": "window: plain", "mixer": "allmem: plain"}[op]
    contest = make_contest(
        op, SHAPES["tiny"], batch=1, tokens=50, backward=True, device=CPU, dtype=torch.float32,
        compiled=False, spoil=spoiled,
    )  # fmt: skip
    results = Results(tmp_path / "rows.json", {})
    contest.run(Stopwatch(CPU), CEILINGS, results, 0.01)
    rows = {row["name"]: row for row in results.rows.values()}
    assert rows[spoiled]["status"] == "refused"
    assert "seconds" not in rows[spoiled]
    assert "tokens_per_s" not in rows[spoiled]
    right = [row for row in rows.values() if row["status"] == "measured"]
    assert right
    assert all(row["seconds"] > 0 and row["error"] <= row["error_bound"] for row in right)
    assert all(row["why"] for row in rows.values() if row["status"] == "not measured")


def test_gradients_alone_that_are_wrong_are_refused(tmp_path: Path) -> None:
    contest = make_contest(
        "memory", SHAPES["tiny"], batch=1, tokens=40, backward=True, device=CPU,
        dtype=torch.float32, compiled=False,
    )  # fmt: skip
    plain = next(one for one in contest.contenders if one.name == "plain")

    def half_of_the_gradient(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        held = {**leaves, "eta": 0.5 * leaves["eta"] + 0.5 * leaves["eta"].detach()}
        return plain.run(held)

    contest.contenders = [replace(plain, run=half_of_the_gradient)]
    results = Results(tmp_path / "rows.json", {})
    contest.run(Stopwatch(CPU), CEILINGS, results, 0.01)
    assert [row["status"] for row in results.rows.values()] == ["refused"]


@pytest.mark.parametrize("calls", [1, 2])
def test_a_version_that_fails_when_it_is_timed_ends_no_run(calls: int, tmp_path: Path) -> None:
    contest = make_contest(
        "attention", SHAPES["tiny"], batch=1, tokens=50, backward=False, device=CPU,
        dtype=torch.float32, compiled=False,
    )  # fmt: skip
    plain, full = (
        next(one for one in contest.contenders if one.name == name)
        for name in ("window: plain", "full: SDPA")
    )
    left = iter(range(calls))  # the check, then the first call alone

    def fails_later(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no room for the timed call")
        return plain.run(leaves)

    contest.contenders = [replace(plain, run=fails_later), full]
    results = Results(tmp_path / "rows.json", {})
    contest.run(Stopwatch(CPU), CEILINGS, results, 0.01)
    rows = {row["name"]: row for row in results.rows.values()}
    assert "no room for the timed call" in rows["window: plain"]["why"]
    assert rows["full: SDPA"]["status"] == ("measured" if calls == 1 else "not measured")


def test_commands_refuse_by_their_exit_status_and_go_on_where_they_were(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    words = ["--device", "cpu", "--tiny", "--no-compile", "--group-s", "0.01", "--out", str(out)]
    assert kernels.main([*words, "--ops", "attention", "--spoil", "full: SDPA"]) == 1
    before = rows_of(out)
    assert {row["status"] for row in before.values()} == {"measured", "refused", "not measured"}
    assert kernels.main([*words, "--ops", "attention", "memory", "--budget-s", "0"]) == 1
    after = rows_of(out)
    kept = [key for key, row in before.items() if row["status"] != "not measured"]
    assert all(after[key] == before[key] for key in kept)
    late = [row for (group, _), row in after.items() if group.startswith("memory")]
    assert {row["why"] for row in late} == {"--budget-s=0 was over"}
    assert out.with_suffix(".png").is_file()


def test_a_wrong_model_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    words = ["--device", "cpu", "--tiny", "--repeat-s", "0.01", "--batches", "1", "--out", str(out)]
    assert models.main([*words, "--mixers", "swa", "full", "--spoil", "swa"]) == 1
    status = {name: row["status"] for (_, name), row in rows_of(out).items()}
    assert status == {"swa": "refused", "full": "measured"}


def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    Results(path, {"device": "one"}).write()
    with pytest.raises(ValueError, match="holds results of device=one, and this is other"):
        Results(path, {"device": "other"})
    Results(path, {"device": "other"}, fresh=True)


def test_times_and_floors_of_a_row_agree() -> None:
    from benchmarks.measure import Timing, Work

    timing = Timing(seconds=2.0, least=1.0, most=3.0, cpu_seconds=None, repeats=3)
    case = {"group": "g", "tokens": 100, "batch": 4}
    row = measured(case, "it", timing, Work(flops=1e10, bytes=1e9), CEILINGS)
    assert (row["floor_s"], row["floor_by"], row["times_floor"]) == (1.0, "FLOPs", 2.0)
    assert row["tokens_per_s"] == 200.0


@pytest.mark.parametrize("mixer", ["allmem", "full", "swa", "mamba2"])
def test_models_of_the_benchmark_pass_their_own_check(mixer: str) -> None:
    assert check_error(SHAPES["tiny"], mixer, CPU, torch.float32) < 1e-5


def prefill_call(tokens: int) -> Any:
    reader = ConstantReader(MODEL, 64)
    ids = torch.randint(0, 97, (1, tokens))

    def call() -> None:
        reader.start(1, 0)
        reader.feed(ids)

    return call


def decode_call(tokens: int) -> tuple[Any, ConstantReader]:
    reader = ConstantReader(MODEL, 64)
    reader.feed(torch.randint(0, 97, (1, tokens)))
    current = torch.zeros(1, 1, dtype=torch.int64)

    def call() -> None:
        for _ in range(4):
            reader.feed(current)

    return call, reader


MODEL = build(SHAPES["tiny"], "allmem", CPU, torch.float32)


def test_seconds_a_token_of_prefill_do_not_grow_with_the_text() -> None:
    calls = {tokens: prefill_call(tokens) for tokens in (256, 2048)}
    names = {str(tokens): call for tokens, call in calls.items()}
    timings = Stopwatch(CPU).interleaved(names, budget_s=1.0, least=3, warmup=1)
    short, long = (timings[str(tokens)].steady / tokens for tokens in calls)
    assert 0.4 < long / short < 2.0  # full attention, or a copied cache, would give 4 and more


def test_seconds_of_a_decode_step_do_not_grow_with_the_text() -> None:
    calls = {str(tokens): decode_call(tokens)[0] for tokens in (128, 4096)}
    timings = Stopwatch(CPU).interleaved(calls, budget_s=1.0, least=15)
    ratio = timings["4096"].steady / timings["128"].steady
    assert 0.4 < ratio < 2.0


def test_bytes_of_the_state_are_the_same_at_every_length() -> None:
    held = {tokens: decode_call(tokens)[1].cache_bytes for tokens in (64, 128, 1024, 4096)}
    assert len(set(held.values())) == 1
    growing = FullReader(build(SHAPES["tiny"], "full", CPU, torch.float32))
    sizes = []
    for tokens in (64, 128):
        growing.start(1, tokens)
        growing.feed(torch.randint(0, 97, (1, tokens)))
        sizes.append(growing.cache_bytes)
    assert sizes[1] == 2 * sizes[0]


def test_the_command_for_a_gpu_runs_every_part(tmp_path: Path) -> None:
    script = ["bash", "benchmarks/gpu.sh", str(tmp_path), "--budget-s", "300"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        [*script, "--dry"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert first.returncode == 0, first.stdout + first.stderr
    for name in ("kernels_dry.json", "models_dry.json", "targets.json", "tests.log"):
        assert (tmp_path / name).is_file(), first.stdout
    assert "| cache at 128k, of full attention's | at most 1/23 |" in first.stdout
    training = [key for key in rows_of(tmp_path / "models_dry.json") if "training" in key[0]]
    assert len(training) == 4
    if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
        refused = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert refused.returncode == 2
        assert "--dry runs the same on the CPU" in refused.stderr


def test_the_command_for_a_gpu_names_the_packages_that_are_missing(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    script = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out")]
    environment = {"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert f"error: {python} lacks torch triton transformers numpy pytest" in run.stderr


def test_figures_are_drawn_from_the_results_alone(tmp_path: Path) -> None:
    for name in ("kernels_cpu", "models_cpu"):
        shutil.copy(ROOT / "benchmarks" / "results" / f"{name}.json", tmp_path)
        figure = speed_plots.draw(tmp_path / f"{name}.json")
        assert figure == tmp_path / f"{name}.png"
        assert figure.stat().st_size > 20_000
    assert speed_plots.main([str(tmp_path / "absent.json")]) == 2
    assert speed_plots.main([]) == 2


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports when it is imported itself: not in functions, nor for types."""
    found: set[str] = set()
    waiting = list(ast.parse(path.read_text("utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef):
            waiting += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]
    return found


def packages_behind(paths: Iterable[Path]) -> set[str]:
    """Packages from elsewhere that files of this project import, directly or by each other."""
    waiting, seen, packages = list(paths), set(), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports_of(path):
            parts = name.split(".")
            if not (ROOT / parts[0]).is_dir():
                packages.add(parts[0])
            for end in range(1, len(parts) + 1):
                at = ROOT.joinpath(*parts[:end])
                files = (at.with_suffix(".py"), at / "__init__.py")
                waiting += [file for file in files if file.is_file()]
    return packages - sys.stdlib_module_names


def test_what_runs_on_a_gpu_machine_imports_only_the_packages_that_it_asks_for() -> None:
    folders = [ROOT / "tests" / name for name in ("kernels", "allmem_hf", "benchmarks")]
    tests = [
        path
        for folder in folders
        for path in folder.glob("*.py")
        if path.name == "conftest.py" or "mark." + "gpu" in path.read_text("utf-8")
    ]
    assert len(tests) >= 8
    names = ("kernels", "models", "targets", "model_training", "tune_blocks")
    programs = [ROOT / "benchmarks" / f"{name}.py" for name in names]
    programs += [ROOT / "tests" / "conftest.py", ROOT / "tests" / "kernels" / "sanitize.py"]
    found = packages_behind([*tests, *programs])
    # numpy, safetensors and tokenizers come with transformers
    assert found <= {"torch", "triton", "transformers", "numpy", "safetensors", "pytest"}


def test_the_fused_triton_version_fits_the_benchmark_and_passes_its_check() -> None:
    pytest.importorskip("triton", reason="pip install triton (Linux) to interpret the kernels")
    contest = make_contest(
        "mixer", SHAPES["tiny"], batch=1, tokens=37, backward=True, device=CPU, dtype=torch.float32,
        compiled=False,
    )  # fmt: skip
    one = next(c for c in contest.contenders if c.name == "allmem: triton + flex, fused")
    assert contest.error_of(one) <= one.bound
