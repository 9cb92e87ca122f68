"""`python -m evals.compare A B … [--out DIR]`: several evaluations side by side.

A run is given by its folder, its `evaluate` folder or its `results.json`, as `PATH` or
`NAME=PATH`. Tables go to the terminal; with `--out` they are written to `DIR/comparison.md`
together with figures.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.compare_plots import draw_all
from evals.config import MIXERS
from evals.paper_tables import Subject, paper_tables, subjects_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare runs; 0 where all went well, 2 where something given is wrong."""
    options = _parser().parse_args(arguments)
    try:
        runs = read_runs(options.runs)
        mixers = _mixers(options.mixers)
        subjects = subjects_of(runs, mixers=mixers, controls=options.controls)
        if not subjects:
            raise ValueError(
                f"no run has one of the mixers {', '.join(mixers or ())}; leave --mixers out"
            )
        text = _head(runs) + paper_tables(subjects)
        if options.out is None:
            print(text)
        else:
            for path in write(text, subjects, Path(options.out)):
                print(path)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.compare",
        description="Put evaluations side by side: tables in the shape of the paper's, with its "
        "published numbers, and figures.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, its evaluate folder or a results.json; NAME=PATH gives it a name",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write comparison.md and figures there instead of printing"
    )
    parser.add_argument(
        "--mixers", metavar="A,B", help=f"only these of {', '.join(MIXERS)} (default: all)"
    )
    parser.add_argument(
        "--controls", action="store_true", help="the memory's controls as rows and lines too"
    )
    return parser


def _mixers(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in MIXERS:
            near = difflib.get_close_matches(name, MIXERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(MIXERS)}"
            raise ValueError(f"--mixers has {name!r}; {hint}")
    if not names:
        raise ValueError(f"--mixers is empty; name some of {', '.join(MIXERS)}")
    return names


def read_runs(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results by label, in the order given; equal names are told apart by their folders.

    Raises:
        ValueError: a path is not there or holds no results of `stage=evaluate`.
    """
    paths: dict[str, Path] = {}
    for argument in given:
        name, equals, rest = argument.partition("=")
        if equals and not Path(argument).exists():
            path, label = find_results(Path(rest).expanduser()), name
        else:
            path = find_results(Path(argument).expanduser())
            label = _label(path)
        if path.resolve() in (other.resolve() for other in paths.values()):
            raise ValueError(f"{argument!r} is given twice; name each run once")
        if label in paths:
            longer = f"{path.resolve().parent.parent.parent.name}/{label}"
            label = longer if not equals and longer not in paths else f"{label} ({len(paths) + 1})"
        paths[label] = path
    return {label: read_results(path) for label, path in paths.items()}


def _label(path: Path) -> str:
    """The run's folder: `demo/evaluate/results.json` to `demo`, `demo/evaluate_w4` to `demo/w4`."""
    folder = path.resolve().parent
    if not folder.name.startswith("evaluate"):
        return folder.name
    rest = folder.name.removeprefix("evaluate").strip("_-")
    return f"{folder.parent.name}/{rest}" if rest else folder.parent.name


def find_results(path: Path) -> Path:
    """The results of a run, from any of the places by which one may name it.

    Raises:
        ValueError: there are none.
    """
    if path.is_file():
        return path
    for place in ("results.json", "evaluate/results.json"):
        if (path / place).is_file():
            return path / place
    if not path.exists():
        raise ValueError(f"{path} is not there; give a run's folder or a results.json")
    raise ValueError(
        f"{path} has no evaluate/results.json; run stage=evaluate there first, or give another run"
    )


def read_results(path: Path) -> dict[str, Any]:
    """Results of `stage=evaluate`.

    Raises:
        ValueError: the file is something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({error}); run stage=evaluate again"
        ) from error
    lacking = [
        key
        for key in ("mixers", "config")
        if not (isinstance(results, dict) and isinstance(results.get(key), dict))
    ]
    if lacking:
        raise ValueError(
            f"{path} has no {' and no '.join(lacking)}: not the results.json of stage=evaluate"
        )
    return dict(results)


def _head(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """What was run, a line each."""
    lines = ["# Evaluations side by side\n"]
    for label, results in runs.items():
        config = results["config"]
        facts = [
            f"recipe {config['recipe']}" if config.get("recipe") else "",
            f"model {config['model']}" if config.get("model") else "",
            f"{config['dtype']} on {config.get('device', 'an unnamed device')}"
            if config.get("dtype")
            else "",
            f"window {config['window_size']:,}" if config.get("window_size") else "",
            f"commit {results['commit']}" if results.get("commit") else "",
        ]
        lines.append(f"- **{label}**: " + (", ".join(filter(None, facts)) or "no description"))
    return "\n".join(lines) + "\n\n"


def write(text: str, subjects: Sequence[Subject], folder: Path) -> list[Path]:
    """Write `comparison.md` and the figures it shows.

    Raises:
        ValueError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made ({error}); name another folder") from error
    figures = draw_all(subjects, folder)
    shown = "".join(f"\n![{path.stem.replace('_', ' ')}]({path.name})\n" for path in figures)
    page = folder / "comparison.md"
    page.write_text(text + shown, encoding="utf-8")
    return [page, *figures]


if __name__ == "__main__":
    sys.exit(main())
