"""The stage measures what it says, on a tiny run whose rows stand in known relations."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from allmem_megatron.config import MixerSettings
from allmem_megatron.model import AllMemGPTModel
from pipeline.evaluation import find_weights
from pipeline.models import load_model
from pipeline.schema import ParallelSettings
from pipeline.stages.evaluate import headline

WINDOW = 12


def whole_logits(model: AllMemGPTModel, tokens: list[int], settings: MixerSettings) -> torch.Tensor:
    """[T, V] log-probabilities, all at once: the plain way that the stage avoids."""
    with torch.no_grad(), model.mixer(settings):
        hidden = model.hidden_states(torch.tensor([tokens]))
        return model.logits(hidden)[0].log_softmax(-1)


def expected(tiny_run: Any, config: Any, branch: str, settings: MixerSettings) -> dict[str, float]:
    """The table's losses and recall by plain loops over positions."""
    model = load_model(config, tiny_run.dir, branch=branch, device=torch.device("cpu"))
    samples = [tiny_run.text_sample(i) for i in range(5)]
    samples += [tiny_run.recall_sample(i) for i in range(4)]
    losses: list[tuple[int, float]] = []
    outside = []
    for sample in samples:
        tokens = sample.tokens.tolist()
        log_p = whole_logits(model, tokens, settings)
        queries = sample.meta.get("queries")
        targets = range(1, len(tokens))
        if queries:
            targets = [t for q in queries for t in range(q["answer_start"], q["answer_end"])]
            far = queries[1]
            answer = range(far["answer_start"], far["answer_end"])
            outside.append(all(int(log_p[t - 1].argmax()) == tokens[t] for t in answer))
        losses += [(t - 1, -float(log_p[t - 1, tokens[t]])) for t in targets]
    beyond = [loss for position, loss in losses if position >= WINDOW]
    return {
        "loss": sum(loss for _, loss in losses) / len(losses),
        "beyond": sum(beyond) / len(beyond),
        "recall": sum(outside) / len(outside),
    }


def test_rows_equal_plain_loops_and_controls_differ_as_they_must(tiny_run: Any) -> None:
    tiny_run.train("convert", alpha=0.7)
    tiny_run.train("convert@mamba2", alpha=0.7)
    config = tiny_run.config()
    results = tiny_run.evaluate(config, drawn=True)
    rows = {**results["mixers"], **results["controls"]}
    assert list(results["mixers"]) == ["full", "swa", "mamba2", "allmem"]
    assert list(results["controls"]) == ["memory_off", "write_off", "state_shuffled"]
    flags: dict[str, dict[str, Any]] = {
        "full": {"mode": "full"},
        "swa": {"mode": "swa"},
        "mamba2": {"mode": "mamba2"},
        "allmem": {"mode": "allmem"},
        "write_off": {"mode": "allmem", "write_off": True},
    }
    for name, flag in flags.items():
        settings = MixerSettings(window_size=WINDOW, num_sinks=2, chunk_size=6, **flag)
        branch = {"mamba2": "mamba2"}.get(name, "allmem")
        want = expected(tiny_run, config, branch, settings)
        got = rows[name]
        assert got["overall"]["loss"] == pytest.approx(want["loss"], abs=1e-5), name
        assert got["overall"]["loss_beyond_window"] == pytest.approx(want["beyond"], abs=1e-5)
        assert got["recall"]["exact_match_outside_window"] == want["recall"]
        assert got["recall"]["num_queries_outside_window"] == 4
        assert got["recall"]["num_queries"] == 8
    by_task = {
        task: [rows[name][task]["loss_beyond_window"] for name in ("swa", "allmem", "full")]
        for task in ("recall", "text", "overall")
    }
    assert rows["allmem"]["gap_closed_beyond_window"] == pytest.approx(
        {task: (a - b) / (a - c) for task, (a, b, c) in by_task.items() if a > c}
    )
    assert any(a > c for a, _, c in by_task.values())
    losses = {name: row["overall"]["loss"] for name, row in rows.items()}
    assert losses["memory_off"] == losses["swa"]
    assert len(set(losses.values())) == len(losses) - 1
    inside = [row["loss_by_position"]["0-11"] for row in (rows["full"], rows["swa"])]
    assert inside[0] == pytest.approx(inside[1], abs=1e-5)
    check_files_and_numbers(tiny_run, results)


def check_files_and_numbers(tiny_run: Any, results: dict[str, Any]) -> None:
    """The contract of `results.json`, and what stands beside it."""
    folder = tiny_run.dir / "evaluate"
    assert results["commit"] == "0123abc"
    assert results["missing"] == {}
    assert results["config"]["length"] == tiny_run.length
    assert results["config"]["weights"]["allmem"] == ["convert/checkpoints/step_00000007"]
    for row in (results["mixers"], results["controls"]):
        for tasks in row.values():
            for metrics in tasks.values():
                assert all(isinstance(value, int | float) for value in metrics.values())
    for tasks in results["mixers"].values():
        assert tasks["speed"]["prefill_tokens_per_s"] > 0
        assert tasks["cache"]["bytes_at_long_context"] >= tasks["cache"]["bytes_at_length"] > 0
    assert results["mixers"]["allmem"]["alpha_by_layer"] == pytest.approx({"0": 0.7, "1": 0.7})
    assert "alpha_by_layer" not in results["mixers"]["swa"]
    names = {path.stem for path in (folder / "plots").glob("*.png")}
    assert {"summary", "loss_by_position", "recall_by_distance", "alpha_by_layer"} <= names
    assert "allmem, state shuffled" in (folder / "table.md").read_text()
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(line)
    for name, value in headline(results).items():
        assert logged[name] == value
    assert "allmem/recall/exact_match_outside_window" in logged


def test_a_memory_that_learned_nothing_equals_the_window(tiny_run: Any) -> None:
    tiny_run.train("convert", alpha=0.0)
    config = tiny_run.config(mixers=("swa", "allmem"), controls=(), timing_repeats=0)
    rows = tiny_run.evaluate(config)["mixers"]
    for task in ("text", "recall", "overall", "loss_by_position", "recall_by_distance"):
        assert rows["allmem"][task] == pytest.approx(rows["swa"][task], abs=1e-6)
    assert "speed" not in rows["swa"]


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_mixer_without_trained_weights_is_named_not_skipped(
    tiny_run: Any, unfinished: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if unfinished:
        tiny_run.train("convert@mamba2", alpha=0.5)
        (tiny_run.dir / "convert_mamba2" / "DONE.json").unlink()
    tiny_run.train("convert", alpha=0.5)
    results = tiny_run.evaluate(tiny_run.config(controls=(), timing_repeats=0))
    assert list(results["missing"]) == ["mamba2"]
    why = "is not finished (step_00000007)" if unfinished else "has no checkpoint"
    assert f"stage convert@mamba2 {why}" in results["missing"]["mamba2"]
    assert set(results["mixers"]) == {"full", "swa", "allmem"}
    assert "mamba2 (not trained)" in (tiny_run.dir / "evaluate/table.md").read_text()
    assert "evaluate: mamba2 is not measured" in capfd.readouterr().err


def test_a_recipe_without_training_measures_the_base_alone(tiny_run: Any) -> None:
    config = tiny_run.config(stages=("prepare", "evaluate"), timing_repeats=0)
    results = tiny_run.evaluate(config)
    assert set(results["mixers"]) == {"full", "swa"}
    assert results["controls"] == {}
    assert "no stage that trains allmem" in results["missing"]["allmem"]
    with pytest.raises(ValueError, match=r"none of eval\.mixers has weights"):
        tiny_run.evaluate(
            tiny_run.config(stages=("prepare", "evaluate"), mixers=("allmem",), timing_repeats=0)
        )


def test_finished_rows_are_kept_until_what_decides_them_changes(tiny_run: Any) -> None:
    tiny_run.train("convert", alpha=0.5)
    config = tiny_run.config(mixers=("swa", "allmem"), controls=("memory_off",), timing_repeats=1)
    first = tiny_run.evaluate(config)
    partial = tiny_run.dir / "evaluate" / "partial"
    for name in ("swa", "allmem"):  # mark them, to see whether they are measured again
        stored = json.loads((partial / f"{name}.json").read_text())
        stored["value"]["records"][0]["target_losses"]["sums"][0] += 1000.0
        (partial / f"{name}.json").write_text(json.dumps(stored))
    (partial / "memory_off.json").unlink()  # as if killed before it
    again = tiny_run.evaluate(config)
    assert again["controls"] == first["controls"]
    for name in ("swa", "allmem"):
        assert again["mixers"][name]["text"]["loss"] > first["mixers"][name]["text"]["loss"] + 1
        assert again["mixers"][name]["speed"] == first["mixers"][name]["speed"]
    steps = (tiny_run.dir / "evaluate/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [0, 1]
    tiny_run.train("convert", alpha=0.5, seed=5)  # other weights of the memory
    changed = tiny_run.evaluate(config)
    assert changed["mixers"]["allmem"]["text"]["loss"] < 10
    assert changed["mixers"]["allmem"] != first["mixers"]["allmem"]


@pytest.mark.parametrize("commit", ["0123abc+", "unknown"])
def test_no_row_is_kept_under_a_commit_that_names_no_program(tiny_run: Any, commit: str) -> None:
    config = tiny_run.config(mixers=("swa",))
    tiny_run.evaluate(config, commit=commit)
    partial = tiny_run.dir / "evaluate" / "partial"
    for name in ("swa", "speed"):
        stored = json.loads((partial / f"{name}.json").read_text())
        (partial / f"{name}.json").write_text(json.dumps({**stored, "value": "of other code"}))
    tiny_run.evaluate(config, commit=commit)
    for name in ("swa", "speed"):
        assert json.loads((partial / f"{name}.json").read_text())["value"] != "of other code"


def test_a_row_of_another_dtype_is_not_kept(tiny_run: Any) -> None:
    config = tiny_run.config(mixers=("swa",), timing_repeats=0)
    path = tiny_run.dir / "evaluate" / "partial" / "swa.json"
    keys = []
    for dtype in ("auto", "float32", "bfloat16"):
        other = dataclasses.replace(config, parallel=ParallelSettings(device="cpu", dtype=dtype))
        tiny_run.evaluate(other)
        keys.append(json.loads(path.read_text())["key"])
    assert keys[0] == keys[1] != keys[2]


def test_a_broken_partial_file_is_named(tiny_run: Any) -> None:
    config = tiny_run.config(mixers=("swa",), timing_repeats=0)
    tiny_run.evaluate(config)
    (tiny_run.dir / "evaluate/partial/swa.json").write_text('{"key": ')
    with pytest.raises(ValueError, match=r"swa\.json cannot be read.*delete it"):
        tiny_run.evaluate(config)


def test_the_newest_stage_with_a_checkpoint_counts(tiny_run: Any) -> None:
    stages = ("prepare", "align", "convert", "sft", "convert@mamba2", "evaluate")
    config = tiny_run.config(stages=stages)
    assert find_weights(config, tiny_run.dir, "none").missing is None
    tiny_run.train("align", alpha=0.1)
    aligned = find_weights(config, tiny_run.dir, "allmem")
    assert aligned.missing is not None
    assert "stage convert has no checkpoint" in aligned.missing
    tiny_run.train("convert", alpha=0.2)
    converted = find_weights(config, tiny_run.dir, "allmem")
    assert (converted.missing, converted.before) == (None, "sft")
    tiny_run.train("sft", alpha=0.3, step=9)
    tuned = find_weights(config, tiny_run.dir, "allmem")
    assert tuned.checkpoints[-1] == "sft/checkpoints/step_00000009"
    assert find_weights(config, tiny_run.dir, "mamba2").missing is not None


def test_documents_of_another_run_can_be_measured(tiny_run: Any, tmp_path: Path) -> None:
    config = tiny_run.config(mixers=("full",), controls=())
    own = tiny_run.evaluate(config)["mixers"]["full"]["overall"]
    shutil.move(tiny_run.dir / "prepare", tmp_path / "other" / "prepare")
    config = tiny_run.config(mixers=("full",), controls=(), documents=str(tmp_path / "other"))
    assert tiny_run.evaluate(config)["mixers"]["full"]["overall"] == own
    shutil.rmtree(tmp_path / "other" / "prepare")
    with pytest.raises(ValueError, match=r"eval\.documents=.* has no prepare/manifest"):
        tiny_run.evaluate(config)


@pytest.mark.parametrize("damage", ["missing", "cut", "no manifest"])
def test_broken_shards_are_refused(tiny_run: Any, damage: str) -> None:
    shard = tiny_run.dir / "prepare/eval/shard-00001.tar"
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:5000])
    else:
        (tiny_run.dir / "prepare/manifest.json").unlink()
    with pytest.raises(ValueError, match="stage=prepare"):
        tiny_run.evaluate(tiny_run.config())


def test_documents_inside_the_window_are_refused(tiny_run: Any) -> None:
    with pytest.raises(ValueError, match="no held-out text document has 101 tokens"):
        tiny_run.evaluate(tiny_run.config(window_size=100))
