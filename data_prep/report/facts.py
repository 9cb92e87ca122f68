"""What the report says, as numbers: from the manifest, and some samples from the shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_prep.decontaminate import CONTAMINATED
from data_prep.dedup import EXACT, NEAR
from data_prep.reasons import PIECE_REASONS
from data_prep.sample import Sample
from data_prep.shard_files import ShardFile
from data_prep.shards import Manifest, ShardRecord
from data_prep.storage import RemoteStorage, Storage

SPLITS = ("train", "eval")
KEPT, UNREADABLE = "kept", "unreadable"
CATEGORIES = (
    KEPT,
    "filters",
    "language",
    "evaluation text",
    EXACT,
    NEAR,
    "length in tokens",
    UNREADABLE,
)
"""Groups of reasons, as figures show them."""
_LENGTH_REASONS = (
    "too few tokens",
    "too many tokens",
    "longer than a sample",
    "conversation too long",
    "no response within seq_length",
    "no room for the document",
)


@dataclass(frozen=True)
class Dropped:
    """What one reason took out of one source."""

    reason: str
    documents: int
    """Documents; pieces of them for `PIECE_REASONS`."""
    amount: int
    unit: str
    """Of amount: `characters` or `tokens`."""

    @property
    def whole(self) -> bool:
        """Whether it takes whole documents."""
        return self.reason not in PIECE_REASONS


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """One source in one split."""

    split: str
    name: str
    kind: str
    num_shards: int
    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    room: int
    """Tokens that its samples have room for."""
    report: dict[str, Any]
    counts_bad: bool = True
    """False where the other split was cut from the same files and counts their bad records."""

    @property
    def generated(self) -> bool:
        """Whether its samples were made up, around a filler of read text."""
        return "num_filler_tokens" in self.report

    @property
    def num_read(self) -> int:
        """Documents that were read."""
        return int(self.report.get("num_read", self.report.get("num_filler_documents", 0)))

    @property
    def num_bad(self) -> int:
        """Records that could not be read."""
        return int(self.report.get("num_bad", 0)) if self.counts_bad else 0

    @property
    def dropped(self) -> list[Dropped]:
        """By reason, most documents first."""
        found = []
        for reason, counts in self.report.get("dropped", {}).items():
            unit = "tokens" if "tokens" in counts else "characters"
            found.append(Dropped(reason, counts["documents"], counts.get(unit, 0), unit))
        return sorted(found, key=lambda drop: (-drop.documents, drop.reason))

    @property
    def num_dropped(self) -> int:
        """Whole documents that were dropped."""
        return sum(drop.documents for drop in self.dropped if drop.whole)

    @property
    def num_kept(self) -> int:
        """Documents that went into samples, or could have where fewer samples were asked for."""
        return self.num_read - self.num_dropped

    @property
    def fill(self) -> float:
        """Share of the samples' room that is text."""
        return self.num_tokens / self.room if self.room else 0.0

    @property
    def loss_share(self) -> float:
        """Share of the text that is a loss target."""
        return self.num_loss_tokens / self.num_tokens if self.num_tokens else 0.0

    def by_category(self) -> dict[str, int]:
        """Documents by `CATEGORIES`."""
        counts = dict.fromkeys(CATEGORIES, 0)
        counts[KEPT], counts[UNREADABLE] = self.num_kept, self.num_bad
        for drop in self.dropped:
            if drop.whole:
                counts[category(drop.reason)] += drop.documents
        return counts


def category(reason: str) -> str:
    """The group of a reason."""
    if reason in (EXACT, NEAR):
        return reason
    if reason == CONTAMINATED:
        return "evaluation text"
    if reason.startswith("language "):
        return "language"
    return "length in tokens" if reason in _LENGTH_REASONS else "filters"


@dataclass(frozen=True)
class Shown:
    """A sample to show."""

    sample: Sample
    shard: str
    number: int
    """In the shard."""


@dataclass(frozen=True)
class Facts:
    """All that the report says."""

    manifest: Manifest
    sources: list[SourceFacts]
    """Train first, in the configuration's order."""
    shown: dict[tuple[str, str], list[Shown]] = field(default_factory=dict)
    """Samples by split and source."""

    def of(self, split: str) -> list[SourceFacts]:
        """Sources of a split."""
        return [source for source in self.sources if source.split == split]


def collect(manifest: Manifest, storage: Storage, *, num_train: int = 2) -> Facts:
    """The facts of a preparation.

    Args:
        manifest: of the shards.
        storage: where the shards are.
        num_train: samples of each source to show; of the eval split one.

    Raises:
        ValueError: a shard is missing or broken.
    """
    order = [source["name"] for source in manifest.config.get("sources", [])]
    sources, shown = [], {}
    for split in SPLITS:
        records = manifest.splits.get(split, ())
        names = dict.fromkeys([*order, *(record.source for record in records)])
        for name in names:
            own = [record for record in records if record.source == name]
            report = manifest.reports.get(f"{split}/{name}")
            if not own and report is None:
                continue
            sources.append(_facts(manifest, split, name, own, report or {}))
            if own:
                number = num_train if split == "train" else 1
                shown[split, name] = _samples(storage, own, number)
    return Facts(manifest, sources, shown)


def _facts(
    manifest: Manifest,
    split: str,
    name: str,
    records: list[ShardRecord],
    report: dict[str, Any],
) -> SourceFacts:
    kinds = {source["name"]: source["kind"] for source in manifest.config.get("sources", [])}
    num_samples = sum(record.num_samples for record in records)
    return SourceFacts(
        split=split,
        name=name,
        kind=kinds.get(name, records[0].kind if records else ""),
        num_shards=len(records),
        num_samples=num_samples,
        num_tokens=sum(record.num_tokens for record in records),
        num_loss_tokens=sum(record.num_loss_tokens for record in records),
        room=num_samples * manifest.seq_length,
        report=report,
        counts_bad=counts_bad(manifest, split, name),
    )


def counts_bad(manifest: Manifest, split: str, name: str) -> bool:
    """Whether a source's unreadable records are counted with this split: not with `eval` where it
    was cut from the same files as `train`, so that both have met the same ones."""
    train, own = manifest.reports.get(f"train/{name}"), manifest.reports.get(f"{split}/{name}", {})
    keys = ("num_bad", "bad_reasons", "bad")
    return split == "train" or train is None or any(train.get(k) != own.get(k) for k in keys)


def _samples(storage: Storage, records: list[ShardRecord], number: int) -> list[Shown]:
    """Some samples of a source: of a folder the first of evenly spaced shards; of a remote place,
    where a shard is copied to be read, some of the smallest."""
    if isinstance(storage, RemoteStorage):
        chosen = [min(records, key=lambda record: record.num_bytes)]
    else:
        step = max(len(records) // number, 1)
        chosen = records[::step][:number]
    shown: list[Shown] = []
    for place, record in enumerate(chosen):
        with ShardFile(storage, record.path, record).samples() as samples:
            left = number - len(shown)
            wanted = left if place == len(chosen) - 1 else 1
            for index in range(min(wanted, len(samples))):
                shown.append(Shown(samples[index], record.path, index))
    return shown
