"""Documents to shards: reads, tokenizes, packs and writes what a `PrepareConfig` describes.

In three phases (`data_prep.engine`), each resumable: text to tokens in work files, a plan from
their index, samples to shards. One worker or many do it, with one process each or many; the samples
and the bytes of every shard are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.complete import (
    find_missing,
    identity_of,
    other_configuration,
    root_of,
    what_is_missing,
)
from data_prep.config import PrepareConfig
from data_prep.counts import share_samples, summary
from data_prep.engine import documents, write
from data_prep.engine.documents import PortableTokenizer
from data_prep.engine.encode import EncodePhase, Progress
from data_prep.engine.plan import StreamPlan, make_plans
from data_prep.engine.pool import Pool, choose_processes
from data_prep.engine.streams import Stream, list_streams, units_digest
from data_prep.engine.workers import (
    Fellows,
    Missing,
    MissingUnits,
    Say,
    WorkersMissingError,
    owner_of,
    wait_for_others,
)
from data_prep.engine.write import ShardTask, existing, list_shards
from data_prep.reasons import what_became_of
from data_prep.shards import MANIFEST_NAME, Manifest, ShardRecord, record_name
from data_prep.sources import SPLITS, filler_path, load_filler, make_filler
from data_prep.storage import Storage, open_storage
from data_prep.tokenize import TokenizerLike

__all__ = [
    "Progress",
    "WorkersMissingError",
    "prepare_shards",
    "share_samples",
    "summary",
    "what_is_missing",
]

PLAN_NAME = "plan.json"
WORK_NAME = "work"
_PAYS_BYTES = 32 << 20
"""Text (bytes on disk) from which starting processes takes less time than it saves."""
_PAYS_TOKENS = 64 << 20
"""The same for writing shards, in tokens."""


def prepare_shards(
    config: PrepareConfig,
    out_dir: str | Path,
    *,
    tokenizer: TokenizerLike,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Manifest:
    """Writes `{train,eval}/shard-00000.tar …` and `manifest.json`, and gives the manifest.

    Can be killed at any moment and called again: finished work is kept, and the bytes are those of
    an uninterrupted run. Where everything is there already, shards are only read to compare their
    SHA-256; missing and damaged ones are written again.

    Args:
        config: what to prepare, and with how many processes and workers.
        out_dir: folder of one configuration, made where it is missing; shards go there too unless
            `config.dir` names another place.
        tokenizer: a fast tokenizer (`data_prep.tokenizer.load_tokenizer`).
        progress: told after each piece of work.
        say: told what is waited for.

    Raises:
        ValueError: out_dir holds shards of another configuration, tokenizer or text; a source is
            missing, unreadable or has too few samples.
        OSError: the disk is full.
        WorkersMissingError: other workers have not done their part within `config.wait_s`.
    """
    if not config.sources:
        raise ValueError("sources is empty; give at least one entry in data.sources")
    shares = {split: share_samples(config, split) for split in SPLITS}
    out_path = Path(out_dir)
    identity = identity_of(config, tokenizer)
    if find_missing(config, out_path, identity, verify=True) is None:
        return Manifest.load(out_path)
    return _Preparation(config, out_path, tokenizer, identity, shares, progress, say).run()


class _Preparation:
    """One worker's run of all phases."""

    def __init__(
        self,
        config: PrepareConfig,
        out_path: Path,
        tokenizer: TokenizerLike,
        identity: dict[str, Any],
        shares: dict[str, list[int | None]],
        progress: Progress | None,
        say: Say | None,
    ) -> None:
        self.config, self.out_path, self.tokenizer = config, out_path, tokenizer
        self.identity, self.shares = identity, shares
        self.progress, self.say = progress, say
        self.portable = PortableTokenizer(tokenizer)
        self.owner = owner_of(config)
        self.place = root_of(config) or str(out_path)
        self.storage: Storage = open_storage(self.place, owner=self.owner)
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self.work = out_path / WORK_NAME / name
        self.fellows = Fellows(config, self.work)

    def run(self) -> Manifest:
        """All phases, then the manifest."""
        self.fellows.start()
        try:
            return self._run()
        except Exception as error:
            self.fellows.failed(error)
            raise

    def _run(self) -> Manifest:
        streams = list_streams(self.config, self.shares)
        self.fellows.agree(units_digest(streams))
        self._encode(streams)
        fillers = self._make_fillers()
        plans = make_plans(self.config, streams, self.work, owner=self.owner)
        reports = self._reports(streams, plans, fillers)
        tasks = self._tasks(streams, plans, reports)
        self._claim({name: report["fingerprint"] for name, report in reports.items()})
        records = self._write(streams, tasks)
        manifest = Manifest(
            tokenizer_hash=self.identity["tokenizer_hash"],
            vocab_size=len(self.tokenizer),
            seq_length=self.config.seq_length,
            config_hash=self.identity["config_hash"],
            config=self.config.contents(),
            splits=records,
            reports=reports,
            root=root_of(self.config),
        )
        self._finish(manifest)
        return manifest

    def _encode(self, streams: list[Stream]) -> None:
        phase = EncodePhase(
            self.config,
            self.portable,
            streams,
            self.work,
            owner=self.owner,
            progress=self.progress,
        )
        processes = choose_processes(self.config.num_processes, pays=phase.num_bytes >= _PAYS_BYTES)
        with Pool(documents.setup, (self.config, self.portable), processes) as pool:
            phase.run(pool)
        self._wait("pieces of text", MissingUnits(streams, self.work))

    def _wait(self, what: str, missing: Callable[[], Missing]) -> None:
        wait_for_others(self.config, what, missing, self.say, self.fellows)

    def _make_fillers(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The reports of the fillers, by split and source."""
        wanted = [
            (split, number)
            for split in SPLITS
            for number, source in enumerate(self.config.sources)
            if source.generated and self.shares[split][number] != 0
        ]
        paths = {
            filler_path(self.work, self.config.sources[number], split): (split, number)
            for split, number in reversed(wanted)
        }
        for turn, (path, (split, number)) in enumerate(reversed(paths.items())):
            if turn % self.config.num_workers == self.config.worker_rank and not path.is_file():
                source = self.config.sources[number]
                make_filler(self.config, source, split, self.tokenizer, self.work, owner=self.owner)
        order = [path for path, _ in reversed(paths.items())]
        self._wait(
            "filler texts",
            lambda: Missing([turn for turn, path in enumerate(order) if not path.is_file()]),
        )
        return {
            (split, number): load_filler(self.work, self.config.sources[number], split)[1]
            for split, number in wanted
        }

    def _reports(
        self,
        streams: list[Stream],
        plans: list[StreamPlan],
        fillers: dict[tuple[str, int], dict[str, Any]],
    ) -> dict[str, dict[str, Any]]:
        """By `SPLIT/SOURCE`."""
        found = {
            (stream.split, stream.source_number): {**plan.report, "fingerprint": plan.fingerprint}
            for stream, plan in zip(streams, plans, strict=True)
        } | fillers
        return {
            f"{split}/{self.config.sources[number].name}": found[split, number]
            for split in SPLITS
            for number in range(len(self.config.sources))
            if (split, number) in found
        }

    def _tasks(
        self, streams: list[Stream], plans: list[StreamPlan], reports: dict[str, dict[str, Any]]
    ) -> dict[str, list[ShardTask]]:
        """The shards of each split.

        Raises:
            ValueError: a source has too few samples, or none to train on.
        """
        available: dict[tuple[str, int], int | None] = {
            (stream.split, stream.source_number): plan.num_available
            for stream, plan in zip(streams, plans, strict=True)
        }
        tasks = {}
        for split in SPLITS:
            there = [available.get((split, n)) for n in range(len(self.config.sources))]
            counts = [
                self._count(number, share, there[number], split, reports)
                for number, share in enumerate(self.shares[split])
            ]
            tasks[split] = list_shards(
                split, counts, there, samples_per_shard=self.config.samples_per_shard
            )
        return tasks

    def _count(
        self,
        number: int,
        wanted: int | None,
        available: int | None,
        split: str,
        reports: dict[str, dict[str, Any]],
    ) -> int:
        name = self.config.sources[number].name
        few = available is not None and (wanted is not None and available < wanted)
        none = available == 0 and wanted is None and split == "train"
        story = what_became_of(reports[f"{split}/{name}"]) if few or none else ""
        if none:
            raise ValueError(
                f"source {name} has no train sample: {story}; loosen that setting, mend its path, "
                "or leave the source out"
            )
        if few:
            raise ValueError(
                f"source {name} has {available} {split} samples, {wanted} are wanted; lower "
                f"data.{split}_samples or its weight, or give it more text ({story})"
            )
        return (available or 0) if wanted is None else wanted

    def _claim(self, fingerprints: dict[str, str]) -> None:
        """Notes what the place is for before the first shard, so that no two plans mix in it."""
        plan = {**self.identity, "text": fingerprints}
        data = json.dumps(plan, indent=1, sort_keys=True).encode() + b"\n"
        try:
            found = self.storage.read(PLAN_NAME)
        except FileNotFoundError:
            with self.storage.create(PLAN_NAME) as stream:
                stream.write(data)
            return
        if found != data:
            raise other_configuration(self.place)

    def _write(
        self, streams: list[Stream], tasks: dict[str, list[ShardTask]]
    ) -> dict[str, tuple[ShardRecord, ...]]:
        """Writes this worker's shards; the records of all, once the others are there too."""
        config = self.config
        everything = [task for split in SPLITS for task in tasks[split]]
        own = [t for n, t in enumerate(everything) if n % config.num_workers == config.worker_rank]
        for split in SPLITS:
            self.storage.delete_partials(split)
        tokens = sum(task.count for task in own) * config.seq_length
        processes = choose_processes(config.num_processes, pays=tokens >= _PAYS_TOKENS)
        if self.place.startswith("memory://"):
            processes = 1  # it is this process's own
        light = [dataclasses.replace(stream, units=[]) for stream in streams]
        arguments = (config, self.portable, light, self.work, self.place, self.owner)
        records: dict[str, ShardRecord] = {}
        with Pool(write.setup, arguments, min(processes, max(len(own), 1))) as pool:
            for task, record in zip(own, pool.map(own), strict=True):
                records[task.name] = record
                self._tell(task, own)
        self._wait("shards", lambda: self._missing(everything, records))
        return {split: tuple(records[task.name] for task in tasks[split]) for split in SPLITS}

    def _tell(self, task: ShardTask, own: Sequence[ShardTask]) -> None:
        if self.progress is not None:
            same = [t.number for t in own if t.split == task.split]
            self.progress(f"{task.split} shards", same.index(task.number) + 1, len(same))

    def _missing(self, tasks: Sequence[ShardTask], records: dict[str, ShardRecord]) -> Missing:
        """Numbers of shards that are not there; records of those that are go into `records`."""
        missing = []
        names = {split: self.storage.names(split) for split in SPLITS}
        for number, task in enumerate(tasks):
            if task.name in records:
                continue
            source = self.config.sources[task.source]
            record = None
            if record_name(task.name) in names[task.split]:
                planned = (source.name, source.sample_kind, task.count)
                record = existing(self.storage, task.name, planned, verify=False)
            if record is None:
                missing.append(number)
            else:
                records[task.name] = record
        return Missing(missing)

    def _finish(self, manifest: Manifest) -> None:
        """The manifest, beside the shards and in the stage's folder; work files go."""
        if manifest.root:
            beside = dataclasses.replace(manifest, root="")
            with self.storage.create(MANIFEST_NAME) as stream:
                stream.write(beside.to_bytes())
        self.out_path.mkdir(parents=True, exist_ok=True)
        manifest.save(self.out_path, owner=self.owner)
        clean = open_storage(self.place)
        for split in SPLITS:
            clean.delete_partials(split)
        if not self.config.keep_work:
            with contextlib.suppress(FileNotFoundError):  # another worker does the same
                shutil.rmtree(self.work.parent)
