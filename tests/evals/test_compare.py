"""Several evaluations side by side: tables with the published numbers, figures, plain errors."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image as images
import pytest

from evals import compare, longbench, lveval, published
from evals.compare_plots import mean_bins, needle_figure, score_figure
from evals.paper_tables import paper_tables, subjects_of

SCORES = {"full": 60.0, "swa": 20.0, "allmem": 45.0}


def results(window: int = 2048, **changes: Any) -> dict[str, Any]:
    """An evaluation of three mixers and a control on a few tasks."""
    metrics = {
        **{f"longbench/{name}": "f1" for name in longbench.PAPER},
        **{"ruler/niah_single_1_4096": "found", "short/arc_easy": "acc"},
        **changes.pop("more", {}),
    }
    own = changes.pop("own", ())
    tasks = {
        name: {
            "suite": name.split("/")[0],
            "metric": metric,
            "prompts": "own" if name in own else "upstream:lm_eval",
        }
        for name, metric in metrics.items()
    }

    def subject(score: float) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: {metric: score + place, "stderr": 1.5, "n": 20.0, "num_refused": 0.0}
            for place, (name, metric) in enumerate(metrics.items())
        }
        for ending in ("_by_length", "_by_distance"):
            found[f"ruler/niah_single_1_4096{ending}"] = {"1024-2047": score, "2048-4095": 1.0}
        found["ruler/niah_single_1_4096_by_length_and_depth"] = {"4096@0.10": score}
        found["overall"] = {"loss": 3.0}
        found["loss_by_position"] = {"0-2047": math.log(20), "2048-4095": math.log(30)}
        return found

    return {
        "mixers": {name: subject(score) for name, score in SCORES.items()},
        "controls": {"memory_off": subject(19.0)},
        "tasks": tasks,
        "config": {
            **{"window_size": window, "num_sinks": 128, "chunk_size": 1024, "recipe": "tiny"},
            **changes,
        },
        "commit": "abc",
    }


def save(folder: Path, value: Any) -> Path:
    (folder / "evaluate").mkdir(parents=True)
    (folder / "evaluate" / "results.json").write_text(json.dumps(value))
    return folder


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Cells of a table by the first of each row; its headings under ''."""
    part = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in cells}


def test_tables_put_runs_beside_the_published_numbers() -> None:
    text = paper_tables(subjects_of({"A": results(), "B": results(4096)}))
    table = rows(text, "Table 2: LongBench")
    assert table["paper 0.6B: allmem (*published, other hardware/data*)"][-1] == "27.33"
    assert table["A: allmem"] == ["45.00", "46.00", "47.00", "48.00", "49.00", "50.00", "47.50"]
    assert "B: full" in table
    short = rows(text, "Table 1: short tasks")
    assert short[""] == ["ARC-E"]
    assert short["paper 1.7B: full (*published, other hardware/data*)"] == ["84.50"]
    assert short["A: swa"] == ["27.00"]
    assert "Table 3" not in text  # nothing measured for it
    every = rows(text, "All tasks")
    assert every["ruler/niah_single_1_4096"][:3] == ["found", "20", "66.00 ± 1.50"]
    assert text.rstrip().endswith("AllMem, arXiv 2602.13680.")


def test_an_average_needs_all_its_sets() -> None:
    some = {f"lveval/{name}_128k": "f1" for name in list(lveval.SETS)[:4]}
    text = paper_tables(subjects_of({"A": results(more=some)}))
    assert rows(text, "Table 3: InfiniteBench and LV-Eval")["allmem"] == ["–", "–", "– (4 of 11)"]
    every = {f"lveval/{name}_128k": "f1" for name in lveval.SETS}
    text = paper_tables(subjects_of({"A": results(more=every)}))
    assert rows(text, "Table 3: InfiniteBench and LV-Eval")["allmem"][-1] == "58.00"


def test_scores_that_do_not_compare_are_marked() -> None:
    limited = {"suites": {"max_examples": 5}, "short_limit": 0}
    given = results(own=("longbench/qmsum",), **limited)
    given["mixers"]["allmem"]["longbench/musique"]["num_refused"] = 3.0
    text = paper_tables(subjects_of({"A": given}))
    table = rows(text, "Table 2: LongBench")["allmem"]
    assert table == ["45.00§", "46.00§", "47.00‡§", "48.00§", "49.00†§", "50.00§", "47.50§‡†"]
    assert rows(text, "Table 1: short tasks")["allmem"] == ["52.00"]
    assert "† prompts: own; not comparable with published numbers." in text
    assert "‡ examples that the model has too few positions for" in text
    assert "§ the first examples of the data set only." in text


def test_controls_and_mixers_are_chosen() -> None:
    given = {"A": results()}
    assert [s.title for s in subjects_of(given, mixers=["allmem"])] == ["allmem"]
    assert [s.title for s in subjects_of(given, controls=True)][-1] == "allmem, memory off"


def test_published_numbers_are_the_papers() -> None:
    """Spec section 9, spot by spot; every row has both sizes."""
    assert published.LONG["infinitebench/longbook_qa_chn"]["0.6B"] == (2.18, 4.05, 8.5, 12.54)
    assert published.SHORT["mmlu_redux"][1]["0.6B"] == (44.9, 47.05)
    assert len(published.SHORT) == 10
    for _, sizes in published.SHORT.values():
        assert set(sizes) == set(published.SIZES)


def test_a_page_and_figures_are_written(tmp_path: Path) -> None:
    first, second = save(tmp_path / "one", results()), save(tmp_path / "two", results(4096))
    out = tmp_path / "out"
    assert compare.main([str(first), f"new={second}", "--out", str(out)]) == 0
    page = (out / "comparison.md").read_text()
    assert "- **one**: recipe tiny, window 2,048, commit abc" in page
    assert "new: allmem" in page
    names = ["score_by_length", "score_by_distance", "needle_map", "perplexity_by_position"]
    for name in names:
        assert f"]({name}.png)" in page
        picture = images.imread(out / f"{name}.png")
        assert picture[..., :3].std() > 0.05  # something is drawn
    assert sorted(path.stem for path in out.glob("*.png")) == sorted(names)


def test_lines_rest_on_the_tasks_that_all_have() -> None:
    given = results(more={"ruler/vt_4096": "found"})
    given["mixers"]["full"]["ruler/vt_4096_by_length"] = {"1024-2047": 0.0}
    figure = score_figure(subjects_of({"A": given}), "_by_length", "x", "t")
    assert figure is not None
    (axis,) = figure.axes
    assert axis.get_title() == "ruler (1 task)"
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axis.lines}
    assert drawn["full"] == [60.0, 1.0]
    assert mean_bins([{"8-15": 2.0, "4-7": 1.0}, {"8-15": 4.0}]) == {"4-7": 1.0, "8-15": 3.0}


def test_a_map_that_one_run_lacks_is_left_empty() -> None:
    second = results()
    for metrics in second["mixers"].values():
        del metrics["ruler/niah_single_1_4096_by_length_and_depth"]
    del second["mixers"]["swa"]
    second["mixers"]["full"]["x_by_length_and_depth"] = {"4096@0.10": 5.0}
    figure = needle_figure(subjects_of({"A": results(), "B": second}))
    assert figure is not None
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert texts.count("not measured") == 2


def test_without_figures_numbers_alone_are_compared(tmp_path: Path) -> None:
    given = results()
    for metrics in [*given["mixers"].values(), *given["controls"].values()]:
        for name in list(metrics):
            if "_by_" in name:
                del metrics[name]
    run = save(tmp_path / "one", given)
    assert compare.main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["comparison.md"]


def test_runs_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    run = save(tmp_path / "one", results())
    for place in (run, run / "evaluate", run / "evaluate" / "results.json"):
        assert list(compare.read_runs([str(place)])) == ["one"]
    twin = save(tmp_path / "other" / "one", results())
    assert list(compare.read_runs([str(run), str(twin)])) == ["one", "other/one"]
    assert list(compare.read_runs([f"a={run}", f"a={twin}"])) == ["a", "a (2)"]
    (run / "evaluate").rename(run / "evaluate_w4096")
    assert list(compare.read_runs([str(run / "evaluate_w4096")])) == ["one/w4096"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/absent"], "is not there; give a run's folder"),
        (["{}/empty"], "has no evaluate/results.json; run stage=evaluate there first"),
        (["{}/other.json"], "has no mixers and no config: not the results.json"),
        (["{}/broken.json"], "cannot be read as JSON"),
        (["{}/list.json"], "not the results.json"),
        (["{}/one", "{}/one/evaluate"], "is given twice"),
        (["{}/one", "--mixers", "alllmem"], "did you mean 'allmem'?"),
        (["{}/one", "--mixers", ","], "--mixers is empty"),
        (["{}/one", "--mixers", "mamba2"], "no run has one of the mixers mamba2"),
        (["{}/one", "--out", "{}/other.json"], "cannot be made"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    save(tmp_path / "one", results())
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    assert compare.main([argument.format(tmp_path) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_the_command_runs_and_helps(tmp_path: Path) -> None:
    run = save(tmp_path / "one", results())
    command = [sys.executable, "-m", "evals.compare"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "NAME=PATH" in told.stdout
    shown = subprocess.run([*command, str(run)], capture_output=True, text=True, check=True)
    assert "## Table 2: LongBench" in shown.stdout
