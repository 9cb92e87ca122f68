"""`stage=plan` as a user calls it."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from allmem_megatron.parallel import destroy_model_parallel
from pipeline.config import compose
from pipeline.run import main


@dataclass(frozen=True)
class Done:
    """What a call came to."""

    returncode: int
    stdout: str
    stderr: str


def plan(*words: str) -> Done:
    """Call the command line, in this process: it needs no ranks of its own."""
    destroy_model_parallel()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["stage=plan", *words, "tracking=none"])
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A plan of the recipe with every stage, for four ranks of a CPU."""
    run_dir = tmp_path_factory.mktemp("planned")
    words = ["recipe=tiny", f"run.dir={run_dir}", "plan.gpu=cpu", "plan.num_gpus=4", "plan.top=4"]
    words += ["plan.stage=convert", "data.seq_length=64"]
    return plan(*words), run_dir


def test_every_training_stage_is_planned_in_one_call(planned: tuple[Done, Path]) -> None:
    done, run_dir = planned
    assert done.returncode == 0, done.stderr
    found = json.loads((run_dir / "plan" / "plan.json").read_text(encoding="utf-8"))
    entries = [stage["entry"] for stage in found["stages"]]
    assert entries == [
        *("pretrain", "align", "convert", "convert@mamba2", "convert:on_policy", "sft"),
    ]
    for stage in found["stages"]:
        assert stage["refused"] is None
        assert stage["memory"]["fits"]
        assert stage["memory"]["total_bytes"] == pytest.approx(
            sum(stage["memory"]["parts"].values())
        )
        assert all(phase["seconds_per_step"] > 0 for phase in stage["phases"])
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"]))


def test_layouts_are_ranked_and_each_tells_how_to_run_it(planned: tuple[Done, Path]) -> None:
    _, run_dir = planned
    search = json.loads((run_dir / "plan" / "plan.json").read_text(encoding="utf-8"))["search"]
    times = [layout["seconds_per_step"] for layout in search["fitting"]]
    assert len(times) >= 4
    assert times == sorted(times)
    ways = {(item["layout"]["tp"], item["layout"]["cp"]) for item in search["fitting"]}
    assert len(ways) > 1
    for item in search["fitting"]:
        compose(["recipe=tiny", "run.dir=unused", *item["overrides"].split()])
    assert any("tp=4" in reason for reason in search["refused"])  # two heads


def test_the_terminal_shows_parameters_memory_layouts_and_reasons(
    planned: tuple[Done, Path],
) -> None:
    done, run_dir = planned
    for words in ("Parameters of", "Memory of the fullest rank", "Layouts of", "Refused", "fits"):
        assert words in done.stdout
    assert (run_dir / "plan" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_leaves_no_mark_and_takes_no_lock(planned: tuple[Done, Path]) -> None:
    _, run_dir = planned
    assert not (run_dir / "plan" / "DONE.json").exists()
    assert not (run_dir / ".lock").exists()


def test_a_large_model_is_planned_without_its_weights(tmp_path: Path) -> None:
    done = plan("recipe=qwen3_8b", f"run.dir={tmp_path}", "plan.search=false")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan" / "plan.json").read_text(encoding="utf-8"))
    counts = dict.fromkeys((True, False), 0)
    for kind in found["parameters"]:
        counts[kind["trained"]] += kind["count"]
    assert counts[False] == pytest.approx(8.19e9, rel=1e-3)
    assert counts[True] == pytest.approx(315e6, rel=0.01)
    assert "published sizes" in found["base"]["source"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["parallel.tp=4"], "does not split over parallel.tp=4"),
        (["parallel.cp=3"], "do not divide the 4 rank"),
        (
            ["convert.batch_size=6", "convert.micro_batch_size=1"],
            "does not split over 4 data-parallel ranks",
        ),
        (["plan.gpu=rtx4090", "plan.reserve_gb=30"], "rtx4090 has"),
    ],
    ids=["heads", "ranks", "batch", "memory"],
)
def test_a_refused_layout_ends_with_status_2_and_its_reason(
    tmp_path: Path, words: list[str], reason: str
) -> None:
    common = ["recipe=tiny", "stages=[prepare,pretrain,convert]", f"run.dir={tmp_path}"]
    common += ["plan.gpu=cpu", "plan.num_gpus=4", "plan.search=false"]
    done = plan(*common, *words)
    assert done.returncode == 2, done.stderr
    assert reason in " ".join(done.stderr.split())
    assert reason in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "plan" / "plan.json").read_text(encoding="utf-8"))
    assert any(reason in text for text in found["refused"])


def test_a_model_that_nobody_knows_names_the_file_that_is_needed(tmp_path: Path) -> None:
    done = plan("recipe=demo", f"run.dir={tmp_path}", "model.path=models/unheard-of")
    assert done.returncode == 2
    assert "config.json" in done.stderr


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = plan("recipe=tiny", f"run.dir={tmp_path}", "plan.num_gpus=4")
    assert done.returncode == 2
    assert "without torchrun" in done.stderr


def test_plan_is_no_stage_of_a_recipe() -> None:
    with pytest.raises(ValueError, match="no part of a recipe"):
        compose(["recipe=tiny", "run.dir=unused", "stages=[prepare,plan]"])


def test_unknown_gpus_and_shares_out_of_range_are_refused() -> None:
    for words in ("plan.gpu=h1000", "plan.mfu=0", "plan.num_gpus=0", "plan.loss_fraction=2"):
        with pytest.raises(ValueError, match=words.partition("=")[0]):
            compose(["recipe=tiny", "run.dir=unused", words])
