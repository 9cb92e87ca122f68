"""However many processes and workers prepare, and whenever they are killed: the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepareConfig
from data_prep.engine import encode
from data_prep.engine.workers import Fellows, WorkerFailedError
from data_prep.prepare import WorkersMissingError, prepare_shards
from data_prep.settings import DedupConfig
from data_prep.shards import Manifest, read_shard
from tests.data_prep.workers_data import LIMITED, files_of, make_config, write_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", params=["all text", "limited", "near duplicates"])
def case(
    request: pytest.FixtureRequest,
    corpus: Path,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PrepareConfig, dict[str, bytes]]:
    """A configuration and the files that one process makes of it."""
    changes: dict[str, Any] = {
        "all text": {},
        "limited": LIMITED,
        "near duplicates": {"dedup": DedupConfig(mode="near")},
    }[request.param]
    config = make_config(corpus, **changes)
    out = tmp_path_factory.mktemp("whole")
    prepare_shards(dataclasses.replace(config, num_processes=1), out, tokenizer=tokenizer)
    return config, files_of(out)


def test_processes_give_the_same_bytes(
    case: tuple[PrepareConfig, dict[str, bytes]], tokenizer: Any, tmp_path: Path
) -> None:
    config, whole = case
    many = dataclasses.replace(config, num_processes=3)
    prepare_shards(many, tmp_path, tokenizer=tokenizer)
    assert files_of(tmp_path) == whole


@pytest.mark.parametrize("num_workers", [2, 5])
def test_workers_one_after_the_other_give_the_same_bytes(
    case: tuple[PrepareConfig, dict[str, bytes]], tokenizer: Any, tmp_path: Path, num_workers: int
) -> None:
    """Each call does its part and does not wait; the last one of each round finds more to do."""
    config, whole = case
    rounds, order, errors = 0, list(range(num_workers)), []
    random.Random(num_workers).shuffle(order)
    while not (tmp_path / "manifest.json").exists():
        rounds += 1
        for rank in order:
            worker = dataclasses.replace(
                config, num_workers=num_workers, worker_rank=rank, wait_s=0, num_processes=1
            )
            try:
                prepare_shards(worker, tmp_path, tokenizer=tokenizer)
            except WorkersMissingError as error:
                errors.append(str(error))
    assert all("run stage=prepare with data.worker_rank=" in error for error in errors)
    assert rounds <= 3
    assert files_of(tmp_path) == whole


def test_a_worker_that_waits_in_vain_names_the_missing_ones(
    corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    config = make_config(corpus, num_workers=4, worker_rank=1, wait_s=0.3)
    with pytest.raises(WorkersMissingError, match=r"pieces of text of workers 0, 2, 3; run"):
        prepare_shards(config, tmp_path, tokenizer=tokenizer)


def test_a_worker_that_fails_is_told_to_those_that_wait(
    corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Worker 1 waits for worker 0, whose text is at fault; an old failure does not count."""
    config = make_config(corpus, num_workers=2, num_processes=1, wait_s=60)
    first, second = (dataclasses.replace(config, worker_rank=rank) for rank in range(2))
    heard: list[str] = []

    def wait() -> None:
        try:
            prepare_shards(second, tmp_path, tokenizer=tokenizer)
        except WorkerFailedError as error:
            heard.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not list(tmp_path.glob("work/*/started.worker1of2")):
        time.sleep(0.01)
    fellows = Fellows(first, next(tmp_path.glob("work/*")))
    fellows.failed(ValueError("source jsonl: its text is at fault; mend it"))
    waiting.join(timeout=60)
    assert heard == ["worker 0 of 2 failed: source jsonl: its text is at fault; mend it"]
    with pytest.raises(WorkersMissingError):
        prepare_shards(dataclasses.replace(second, wait_s=0), tmp_path, tokenizer=tokenizer)


RUN = """
import sys, dataclasses
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from workers_data import make_config, LIMITED
from data_prep.prepare import prepare_shards
from data_prep.tokenizer import load_tokenizer
corpus, out, tokenizer, rank, workers, processes = sys.argv[2:]
prepare_shards(
    make_config(
        Path(corpus), num_workers=int(workers), worker_rank=int(rank),
        num_processes=int(processes), wait_s=120,
    ),
    out, tokenizer=load_tokenizer(tokenizer),
)
"""


def start(corpus: Path, out: Path, tokenizer_dir: Path, *numbers: int) -> subprocess.Popen[bytes]:
    words = [str(Path(__file__).parent), str(corpus), str(out), str(tokenizer_dir)]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *words, *map(str, numbers)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_workers_side_by_side_wait_for_each_other(
    corpus: Path, tokenizer: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    prepare_shards(make_config(corpus), tmp_path / "whole", tokenizer=tokenizer)
    workers = [start(corpus, tmp_path / "many", tokenizer_dir, rank, 3, 1) for rank in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    assert files_of(tmp_path / "many") == files_of(tmp_path / "whole")


def test_sigkill_while_text_is_read_costs_one_part(
    corpus: Path, tokenizer: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    prepare_shards(make_config(corpus), tmp_path / "whole", tokenizer=tokenizer)
    out = tmp_path / "killed"
    process = start(corpus, out, tokenizer_dir, 0, 1, 2)
    while len(list(out.glob("work/*/documents/*/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.0005)
    children = _children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    deadline = time.monotonic() + 20
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if _alive(child)]  # they end without their parent
    kept = {p: p.stat().st_mtime_ns for p in out.glob("work/*/documents/*/*.json")}
    assert len(kept) >= 3
    stamps: dict[Path, int] = {}

    def look(*_: Any) -> None:
        stamps.update({p: p.stat().st_mtime_ns for p in kept if p.exists()})

    prepare_shards(make_config(corpus), out, tokenizer=tokenizer, progress=look)
    assert stamps == kept
    assert files_of(out) == files_of(tmp_path / "whole")


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


class Killed(Exception):
    """Stands for a death at a certain moment."""


@pytest.mark.parametrize("death", range(1, 12, 2))
def test_a_unit_goes_on_behind_its_last_whole_part(
    corpus: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: int
) -> None:
    """The packed file is one unit; its parts are small here, and writing dies with one of them."""
    monkeypatch.setattr(encode, "PART_DOCUMENTS", 10)
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 7)
    config = make_config(corpus, num_processes=1)
    prepare_shards(config, tmp_path / "whole", tokenizer=tokenizer)
    finish, count = encode.PartWriter.finish, 0

    def dying(self: Any, **words: Any) -> Any:
        nonlocal count
        count += 1
        if count == death:
            raise Killed
        return finish(self, **words)

    monkeypatch.setattr(encode.PartWriter, "finish", dying)
    with pytest.raises(Killed):
        prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    assert len(list(tmp_path.glob("out/work/*/documents/*/*.json"))) == death - 1
    monkeypatch.setattr(encode.PartWriter, "finish", finish)
    prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_only_the_unit_that_changed_is_read_again(
    corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """A worker without its fellows leaves its units; one file is mended before it comes again."""
    copy = copy_of(corpus, tmp_path / "corpus")
    config = make_config(copy, num_workers=2, wait_s=0)
    out = tmp_path / "out"
    with pytest.raises(WorkersMissingError):
        prepare_shards(config, out, tokenizer=tokenizer)
    before = {p: p.stat().st_mtime_ns for p in out.glob("work/*/documents/*/*.json")}
    text = (copy / "chats.jsonl").read_text("utf-8")
    (copy / "chats.jsonl").write_text(text + text.splitlines()[0] + "\n", "utf-8")
    with pytest.raises(WorkersMissingError):
        prepare_shards(config, out, tokenizer=tokenizer)
    after = {p: p.stat().st_mtime_ns for p in out.glob("work/*/documents/*/*.json")}
    assert before.keys() == after.keys()
    changed = {path.parent.name for path in before if before[path] != after[path]}
    assert changed
    assert all(name.endswith("-01") for name in changed)  # the chats are source 1


def copy_of(corpus: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in corpus.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_workers_that_find_other_files_are_refused(
    corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    copy = copy_of(corpus, tmp_path / "corpus")
    config = make_config(copy, num_workers=2, wait_s=0)
    with pytest.raises(WorkersMissingError):
        prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    with open(copy / "texts.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": "more " * 20_000}) + "\n")
    second = dataclasses.replace(config, worker_rank=1)
    with pytest.raises(ValueError, match=r"worker 1 finds other files than the first worker did"):
        prepare_shards(second, tmp_path / "out", tokenizer=tokenizer)


def test_a_plan_of_text_that_has_changed_is_made_again(
    corpus: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between plan and shards, and one file has changed when the command is given again."""
    copy, out = copy_of(corpus, tmp_path / "corpus"), tmp_path / "out"
    config = make_config(copy)
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare._Preparation._claim", _die)
        with pytest.raises(Killed):
            prepare_shards(config, out, tokenizer=tokenizer)
    assert list(out.glob("work/*/plan/*.json"))
    text = (copy / "chats.jsonl").read_text("utf-8")
    (copy / "chats.jsonl").write_text(text.replace(" ", "  "), "utf-8")
    prepare_shards(config, out, tokenizer=tokenizer)
    prepare_shards(config, tmp_path / "whole", tokenizer=tokenizer)
    assert files_of(out) == files_of(tmp_path / "whole")


def _die(*_: Any) -> None:
    raise Killed


def test_settings_of_speed_and_place_do_not_change_the_hash(corpus: Path) -> None:
    config = make_config(corpus)
    other = make_config(
        corpus, num_processes=7, num_workers=3, worker_rank=2, wait_s=1, keep_work=True, dir="x"
    )
    assert config.fingerprint() == other.fingerprint()
    assert config.contents() == other.contents()
    assert config.fingerprint() != make_config(corpus, seed=1).fingerprint()


def test_work_files_stay_where_asked(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    prepare_shards(make_config(corpus, keep_work=True), tmp_path, tokenizer=tokenizer)
    assert list(tmp_path.glob("work/*/documents/*/*.bin"))


def test_copies_in_the_training_text_give_way_to_held_out_ones(
    case: tuple[PrepareConfig, dict[str, bytes]], tokenizer: Any, tmp_path: Path
) -> None:
    """Sources `jsonl` and `packed` share their first 60 lines."""
    config, whole = case
    if config.dedup.mode == "none":
        return
    plain = json.loads(whole["manifest.json"])
    dropped = [report["dropped"] for report in plain["reports"].values()]
    assert sum(d.get("exact duplicate", {}).get("documents", 0) for d in dropped) >= 65
    prepare_shards(config, tmp_path, tokenizer=tokenizer)
    seen: dict[str, set[str]] = {}
    for split, records in Manifest.load(tmp_path).splits.items():
        samples = [s for r in records for s in read_shard(tmp_path / r.path) if s.kind == "text"]
        seen[split] = {name for s in samples for name in s.meta["ids"]}
    assert not seen["train"] & seen["eval"]


FULL = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from workers_data import make_config
from data_prep.prepare import prepare_shards
from data_prep.tokenizer import load_tokenizer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]),) * 2)
config = make_config(Path(sys.argv[2]), samples_per_shard=200)
prepare_shards(config, sys.argv[3], tokenizer=load_tokenizer(sys.argv[4]))
"""


@pytest.mark.parametrize(("limit", "file"), [(20_000, "unit-"), (400_000, "shard-")])
def test_a_full_disk_is_one_clear_error_and_the_same_command_goes_on(
    corpus: Path, tokenizer: Any, tokenizer_dir: Path, tmp_path: Path, limit: int, file: str
) -> None:
    """The kernel refuses bytes past a limit, in work files or in shards."""
    out = tmp_path / "out"
    words = [str(Path(__file__).parent), str(corpus), str(out), str(tokenizer_dir), str(limit)]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"could not write {file}" in done.stderr.splitlines()[-1]
    assert "free space in" in done.stderr.splitlines()[-1]
    assert not list(out.rglob("*.partial"))
    config = make_config(corpus, samples_per_shard=200)
    prepare_shards(config, out, tokenizer=tokenizer)
    prepare_shards(config, tmp_path / "whole", tokenizer=tokenizer)
    assert files_of(out) == files_of(tmp_path / "whole")
