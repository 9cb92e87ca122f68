"""Tasks in tables and figures: what is drawn and printed is what the results hold."""

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from pipeline.evaluating.figures import norms_figure, scores_figure
from pipeline.report import write_report

NAMES = {"full": 60.0, "swa": 10.0, "allmem": 50.0}
CONTROLS = {"memory_off": 9.0, "write_off": 11.0, "state_shuffled": 12.0}


def task_metrics(level: float, *, control: bool = False) -> dict[str, dict[str, float]]:
    found = {
        "recall/single_512": {"exact_match": level, "stderr": 2.0, "n": 20.0, "num_refused": 0.0},
        "recall/single_512_by_length": {"256-511": level},
        "recall/single_512_by_distance": {"16-31": level + 5, "256-511": level - 5},
        "recall/single_512_by_length_and_depth": {"512@0.10": level, "512@0.90": level + 5},
    }
    if not control:
        found["short/piqa"] = {"acc": level, "stderr": 3.0, "n": 8.0}
    return found


def results() -> dict[str, Any]:
    mixers = {name: task_metrics(level) for name, level in NAMES.items()}
    for layer in (0, 1):
        for kind, start in (("weights", 1.0), ("momentum", 0.0)):
            norms = {str(16 * i): start + 0.01 * i * (layer + 1) for i in range(1, 9)}
            mixers["allmem"][f"{kind}_norm_layer_{layer}_by_position"] = norms
    return {
        "mixers": mixers,
        "controls": {name: task_metrics(v, control=True) for name, v in CONTROLS.items()},
        "tasks": {
            "recall/single_512": {
                **{"suite": "recall", "metric": "exact_match", "prompts": "own", "n": 20},
                **{"num_truncated": 0, "num_refused": 0},
            },
            "short/piqa": {"suite": "short", "metric": "acc", "prompts": "upstream:lm_eval"},
        },
        "missing": {},
        "config": {
            **{"mixers": list(NAMES), "controls": list(CONTROLS), "length": 512},
            **{"window_size": 64, "num_sinks": 4, "chunk_size": 32, "long_context": 131072},
        },
        "commit": "0123abc",
    }


def test_the_report_of_tasks_alone_has_their_tables_and_pictures(tmp_path: Path) -> None:
    files = write_report(results(), tmp_path, {})
    pictures = {path.stem for path in files if path.suffix == ".png"}
    assert pictures == {
        *("scores", "score_by_length", "score_by_distance", "needle_map", "memory_norms"),
    }
    for path in files:
        if path.suffix == ".png":
            image = matplotlib.image.imread(path)
            assert min(image.shape[:2]) > 200
            assert image.std() > 0.02
    text = (tmp_path / "table.md").read_text()
    assert "loss beyond window" not in text  # no held-out documents
    assert "| recall/single_512 | exact_match |       20 | 60.00 ± 2.00†" in text
    assert "allmem, state shuffled" in text
    assert "prompts: own; not comparable" in text


def test_every_score_is_drawn_with_its_error() -> None:
    figure = scores_figure(results())
    assert figure is not None
    (axis,) = figure.axes
    drawn = {
        (container.get_label(), float(x))
        for container in axis.containers
        for x in container.lines[0].get_xdata()
    }
    titles = {"memory_off": "allmem, memory off", "write_off": "allmem, write off"}
    titles["state_shuffled"] = "allmem, state shuffled"
    expected = {(titles.get(name, name), v) for name, v in {**NAMES, **CONTROLS}.items()}
    assert drawn == expected
    assert [label.get_text().splitlines()[0] for label in axis.get_yticklabels()] == [
        *("recall/single_512", "short/piqa"),
    ]
    without = {**results(), "tasks": {}}
    assert scores_figure(without) is None


def test_norms_are_drawn_by_layer_along_the_document() -> None:
    figure = norms_figure(results())
    assert figure is not None
    weights, momentum = figure.axes
    assert [line.get_label() for line in weights.lines] == ["layer 0", "layer 1"]
    assert list(weights.lines[1].get_xdata()) == [16 * i for i in range(1, 9)]
    assert math.isclose(momentum.lines[1].get_ydata()[-1], 0.16)
    assert "‖W" in weights.get_ylabel()


def test_norms_of_a_memory_follow_its_writes(task_run: Any) -> None:
    import torch

    from allmem_megatron.config import MixerSettings
    from pipeline.evaluating.memory_norms import memory_norms
    from pipeline.generation import Generator
    from pipeline.generation_models import hf_model_from_megatron
    from pipeline.models import load_model

    config = task_run.task_config()
    model = load_model(config, task_run.dir, branch="allmem", device=torch.device("cpu"))
    settings = MixerSettings(mode="allmem", window_size=12, num_sinks=2, chunk_size=6)
    generator = Generator(hf_model_from_megatron(model, settings), prefill_chunk=5)
    tokens = [(7 * i) % 250 for i in range(41)]
    norms = memory_norms(generator, tokens)
    assert sorted(norms) == [
        f"{kind}_norm_layer_{layer}_by_position"
        for kind in ("momentum", "weights")
        for layer in (0, 1)
    ]
    cache = generator.read(tokens[:36]).cache
    for layer, held in enumerate(cache.layers):
        weights = {part: held.tensors[f"weights_{part}"] for part in ("gate", "up", "down")}
        memory = generator.model.model.layers[layer].memory
        squares = sum(float(w.double().square().sum()) for w in weights.values())
        start = sum(float(getattr(memory, f"fast_{p}").double().square().sum()) for p in weights)
        found = norms[f"weights_norm_layer_{layer}_by_position"]
        assert list(found) == ["6", "12", "18", "24", "30", "36"]
        assert found["36"] == pytest.approx((squares / start) ** 0.5, rel=1e-5)
    assert memory_norms(generator, tokens[:5]) == {}
