"""`srun python -m pipeline.preflight WORDS…`: is every node of a job fit for the run?

Takes the words of `pipeline.run`, runs on all tasks before it, and ends within a minute: with 0, or
with `EXIT_PREFLIGHT` and one line for each thing that is wrong, which names the node. The tasks
talk through files in `run.dir`, because whether that is shared is one of the questions; only the
last check, an all-reduce, uses the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import compose
from pipeline.preflight_checks import (
    all_reduce,
    gpu_identity,
    gpu_problems,
    import_packages,
    recipe_problems,
    room_problems,
    versions,
)
from pipeline.preflight_place import Place
from pipeline.schema import RunConfig
from pipeline.survival import leave

# Heavy packages are imported by the checks that need them: one that is broken on a node is found,
# and not met here.

EXIT_PREFLIGHT = 78
"""Nodes or recipe are not fit, and nothing was started (EX_CONFIG of sysexits.h)."""

SHARED_S = 20.0
"""Seconds within which what rank 0 writes into run.dir is to be seen on the other nodes."""
REPORTS_S = 35.0
"""Seconds after the imports within which every rank is to have reported."""
LIMIT_S = 55.0
"""Seconds after the imports after which every rank leaves, wherever it is."""
COMING_S = 10.0
"""Seconds within which a rank is to say that it imports, for rank 0 to wait for that."""
IMPORT_LIMIT_S = 300.0
"""Seconds that importing packages may take before the clock of the others starts: from a network
file system that was not used for a while it takes minutes, and is not a fault."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank found."""

    rank: int
    node: str
    problems: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    gpu: list[str] = field(default_factory=list)
    """The GPU that the rank computes on, if any."""


class Meeting:
    """Files by which the ranks of one start of one job talk to each other.

    Args:
        run_dir: where they are to share a folder.
        place: this rank.
    """

    def __init__(self, run_dir: Path, place: Place) -> None:
        self.folder = run_dir / ".preflight" / place.meeting
        self.place = place

    def write(self, name: str, content: Any) -> None:
        """Put a file there that the others see whole.

        Raises:
            OSError: this node cannot write there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.folder / name)

    def read(self, name: str, until: float) -> Any:
        """Wait for a file of another rank; None where it does not come.

        Args:
            name: of the file.
            until: `time.monotonic()` at which to give up; it is looked for once at least.
        """
        pause = 0.05
        while True:
            # Network file systems remember that a file was not there; one's own change of the
            # folder makes them look again.
            probe = self.folder / f".look-{self.place.rank}"
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
                probe.unlink()
            with contextlib.suppress(OSError):
                return json.loads((self.folder / name).read_text(encoding="utf-8"))
            if time.monotonic() >= until:
                return None
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)

    def remove(self) -> None:
        """Leave nothing behind, neither of this start nor of those that failed an hour ago."""
        for folder in self.folder.parent.glob("*"):
            with contextlib.suppress(OSError):
                if folder == self.folder or time.time() - folder.stat().st_mtime > 3600:
                    shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    place = Place.from_environment()
    try:
        config = compose(words)
    except ValueError as error:
        return _refused(place, str(error))
    meeting = Meeting(Path(config.run.dir), place)
    begun = time.monotonic()
    token: str | None = secrets.token_hex(8)
    if place.rank == 0:
        try:
            meeting.remove()
            meeting.write("start.json", token)
        except OSError as error:
            return _say(f"{place.who(0)}: run.dir={config.run.dir} is not writable: {error}")
    with _limit(place, IMPORT_LIMIT_S) as doing:
        token = _import(meeting, token, begun, doing)
    started = time.monotonic()
    with _limit(place, LIMIT_S) as doing:
        if place.rank == 0:
            return _lead(config, meeting, token, started, doing)
        return _follow(config, meeting, token, started, doing)


def _import(meeting: Meeting, token: str | None, begun: float, doing: Doing) -> str | None:
    """Import what the checks need, and wait for each other: nodes may be differently fast at it.

    Args:
        meeting: of the ranks.
        token: of this start, known to rank 0.
        begun: `time.monotonic()` at this rank's start.
        doing: told what is waited for.

    Returns:
        The token; None where this rank cannot see what rank 0 writes.
    """
    place = meeting.place
    if place.rank:
        doing(f"looking for rank 0's file in {meeting.folder}")
        token = meeting.read("start.json", begun + SHARED_S)
        if token is not None:
            with contextlib.suppress(OSError):  # the report, which comes next, tells it
                meeting.write(f"importing-{place.rank}.json", token)
    doing("importing its packages")
    import_packages(place)
    if place.rank == 0:
        for rank in range(1, place.world_size):
            if meeting.read(f"importing-{rank}.json", begun + COMING_S) == token:
                doing(f"waiting for {place.who(rank)} to import its packages")
                meeting.read(f"imported-{rank}.json", begun + IMPORT_LIMIT_S)
        meeting.write("clock.json", token)
        return token
    token = meeting.read("start.json", time.monotonic())
    if token is not None:
        with contextlib.suppress(OSError):
            meeting.write(f"imported-{place.rank}.json", token)
        doing("waiting for the other ranks to import their packages")
        meeting.read("clock.json", begun + IMPORT_LIMIT_S)
    return token


def _refused(place: Place, text: str) -> int:
    """The words are wrong, on all ranks alike: rank 0 says so."""
    if place.rank == 0:
        print(f"preflight: {' '.join(text.split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # the first task that fails ends the others
    return EXIT_PREFLIGHT


Doing = Callable[[str], None]


@contextlib.contextmanager
def _limit(place: Place, limit_s: float) -> Iterator[Doing]:
    """End the process when the time is over, whatever it waits for, and say what that was."""
    started = time.monotonic()
    state = {"at": "the start"}

    def end() -> None:
        seconds = time.monotonic() - started
        line = f"preflight: {place.who(place.rank)}: not through with {state['at']} after "
        leave(EXIT_PREFLIGHT, f"{line}{seconds:.0f} s")

    # rank 0 a little earlier: the first task that fails ends the others, and rank 0 knows most
    timer = threading.Timer(limit_s + (0 if place.rank == 0 else 2), end)
    timer.daemon = True
    timer.start()
    try:
        yield lambda what: state.update(at=what)
    finally:
        timer.cancel()


def _own_report(config: RunConfig, place: Place) -> Report:
    report = Report(rank=place.rank, node=place.node)
    try:
        report.problems.extend([*gpu_problems(config, place), *room_problems(place)])
        report.versions.update(versions(config, place))
        report.gpu.extend(filter(None, [gpu_identity(config, place)]))
        if place.rank == 0:
            report.problems.extend(recipe_problems(config, place))
    except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
        report.problems.append(f"its environment is broken: {type(error).__name__}: {error}")
    return report


def _follow(
    config: RunConfig, meeting: Meeting, token: str | None, started: float, doing: Doing
) -> int:
    """A rank other than 0."""
    place = meeting.place
    if token is None:
        return _say(
            f"{place.who(place.rank)}: run.dir={config.run.dir} is not shared: what "
            f"{place.who(0)} wrote there more than {SHARED_S:.0f} s ago cannot be seen; put it on "
            "a file system that all nodes mount (ALLMEM_RUNS)"
        )
    doing("the checks of its own node")
    report = _own_report(config, place)
    try:
        meeting.write(f"rank-{place.rank}.json", {**asdict(report), "token": token})
    except OSError as error:
        return _say(f"{place.who(place.rank)}: run.dir={config.run.dir} not writable: {error}")
    doing("waiting for the other ranks' reports")
    verdict = meeting.read("verdict.json", started + LIMIT_S)
    if verdict is None or not verdict["go"]:
        return EXIT_PREFLIGHT  # rank 0 has said why
    doing(verdict["next"])
    _reduce(config, meeting)
    return 0


def _lead(
    config: RunConfig, meeting: Meeting, token: str | None, started: float, doing: Doing
) -> int:
    """Rank 0: gathers what all found, and says it."""
    place = meeting.place
    doing("the checks of its own node")
    reports = [_own_report(config, place)]
    problems = []
    until = max(started + REPORTS_S, time.monotonic() + 1)
    for rank in range(1, place.world_size):
        doing(f"waiting for {place.who(rank)}")
        found = meeting.read(f"rank-{rank}.json", until)
        if found is None or found.pop("token") != token:
            problems.append(
                f"{place.who(rank)}: no report within {REPORTS_S:.0f} s: it hangs or is very slow, "
                f"or run.dir={config.run.dir} is not shared with it"
            )
        else:
            reports.append(Report(**found))
    for report in reports:
        problems += [f"{place.who(report.rank)}: {problem}" for problem in report.problems]
    problems += _different_versions(reports, place) + shared_gpus(reports, place)
    following = "an all-reduce among the ranks" if place.world_size > 1 else "nothing"
    meeting.write("verdict.json", {"go": not problems, "next": following})
    code = _say(*problems) if problems else 0
    if code == 0:
        doing(following)
        code = _lead_reduce(config, meeting, started, doing)
    if code == 0:
        seconds = time.monotonic() - started
        nodes = ", ".join(place.nodes) or place.node
        print(
            f"preflight: {place.world_size} task(s) on {nodes} are fit ({seconds:.1f} s); "
            + ", ".join(f"{key} {value}" for key, value in reports[0].versions.items()),
            flush=True,
        )
        meeting.remove()
    return code


def _lead_reduce(config: RunConfig, meeting: Meeting, started: float, doing: Doing) -> int:
    """The all-reduce, and who did not come through it."""
    place = meeting.place
    if place.world_size == 1:
        return 0
    stuck = threading.Event()

    def watch() -> None:
        """Before the limit: who has not come through?"""
        if stuck.wait(max(LIMIT_S - 5 - (time.monotonic() - started), 1)):
            return
        missing = {0: "come to it", 1: "come through it"}
        for stage, word in missing.items():
            late = [
                place.who(rank)
                for rank in range(place.world_size)
                if meeting.read(f"reduce-{stage}-{rank}.json", 0) is None
            ]
            if late:
                where = f"an all-reduce at {os.environ.get('MASTER_ADDR')}"
                _say(f"{where} stands still; these have not {word}: {', '.join(late)}")
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        _reduce(config, meeting)
    finally:
        stuck.set()
    for rank in range(1, place.world_size):
        doing(f"waiting for {place.who(rank)} to come through the all-reduce")
        if meeting.read(f"reduce-1-{rank}.json", started + LIMIT_S) is None:
            return _say(f"{place.who(rank)}: did not come through the all-reduce")
    return 0


def _reduce(config: RunConfig, meeting: Meeting) -> None:
    place = meeting.place
    if place.world_size == 1:
        return
    meeting.write(f"reduce-0-{place.rank}.json", True)
    if problem := all_reduce(config, place):
        _say(f"{place.who(place.rank)}: {problem}")
        leave(EXIT_PREFLIGHT)
    meeting.write(f"reduce-1-{place.rank}.json", True)


def _different_versions(reports: list[Report], place: Place) -> list[str]:
    """One line for each rank and thing that is not as on most ranks."""
    problems = []
    for key in sorted({key for report in reports for key in report.versions}):
        found = {r.rank: r.versions.get(key, "not there") for r in reports if r.versions}
        usual, times = Counter(found.values()).most_common(1)[0]
        problems += [
            f"{place.who(rank)}: {key} is {version}, but {usual} on {times} other rank(s); start "
            "the same environment on all nodes (ALLMEM_ENV, ALLMEM_CONTAINER)"
            for rank, version in found.items()
            if version != usual
        ]
    return problems


def shared_gpus(reports: Sequence[Report], place: Place) -> list[str]:
    """One line for each GPU that several ranks would compute on."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for report in reports:
        for gpu in report.gpu:
            ranks.setdefault((report.node, gpu), []).append(report.rank)
    return [
        f"{place.who(found[-1])}: shares a GPU with rank {', '.join(map(str, found[:-1]))}; set "
        "--ntasks-per-node and --gpus-per-node to the same number"
        for found in ranks.values()
        if len(found) > 1
    ]


def _say(*lines: str) -> int:
    for line in lines:
        print(f"preflight: {' '.join(line.split())}", file=sys.stderr, flush=True)
    return EXIT_PREFLIGHT


if __name__ == "__main__":
    status = main()
    leave(status)  # no clean-up of process groups: it could wait for a node that is ill
