"""The report of a preparation: numbers from the manifest, samples from the shards, no markup."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepareConfig, RecallConfig, SourceConfig
from data_prep.decontaminate import CONTAMINATED
from data_prep.dedup import EXACT, NEAR
from data_prep.prepare import prepare_shards
from data_prep.reasons import explain
from data_prep.report import write_report
from data_prep.report.facts import Facts, collect
from data_prep.report.figures import figures, human, percent, png
from data_prep.settings import DecontaminateConfig, DedupConfig, EvalSetConfig, FilterConfig
from data_prep.shards import Manifest
from data_prep.storage import open_storage, shards_of

EVIL = "<script>alert('x')</script><img src=http://example.org/x onerror=alert(1)>"
WORDS = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]


def passage(first: int, count: int = 60) -> str:
    return " ".join(WORDS[(first * 7 + i * (1 + first % 5)) % 600] for i in range(count))


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which everything goes wrong once."""
    folder = tmp_path_factory.mktemp("report")
    records = [{"id": f"{EVIL}{i}", "text": f"{passage(i)} {EVIL} \x00 end {i}"} for i in range(40)]
    records.append({"id": "copy", "text": records[3]["text"]})
    records.append({"id": "near", "text": records[5]["text"] + " x"})
    records.append({"id": "short", "text": "few"})
    records.append({"id": "leak", "text": passage(91) + " unseen"})
    lines = [json.dumps(record).encode() for record in records]
    lines[7:7] = [b'{"text": "<b>' + bytes([255]) + b'"}', b"<i>no json"]
    (folder / "texts.jsonl").write_bytes(b"\n".join(lines))
    (folder / "eval.jsonl").write_text(json.dumps({"question": passage(91, 30)}), "utf-8")
    packages: dict[str, Any] = {"packages": ("email",), "eval_packages": ("json",)}
    config = PrepareConfig(
        tokenizer=str(tokenizer_dir),
        seq_length=512,
        samples_per_shard=4,
        train_samples=24,
        eval_samples=2,
        eval_fraction=0.2,
        max_bad_fraction=0.2,
        sources=[
            SourceConfig(
                kind="jsonl",
                name=f"my $texts {EVIL}",
                path=str(folder / "texts.jsonl"),
                filters=FilterConfig(min_characters=20),
            ),
            SourceConfig(kind="recall", recall=RecallConfig(min_distance=60), **packages),
        ],
        dedup=DedupConfig(mode="near"),
        decontaminate=DecontaminateConfig(sets=[EvalSetConfig(path=str(folder / "eval.jsonl"))]),
    )
    manifest = prepare_shards(config, folder / "out", tokenizer=tokenizer)
    write_report(manifest, folder / "out", tokenizer=tokenizer)
    return folder / "out"


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network_and_holds_no_foreign_markup(folder: Path) -> None:
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "@import" not in text
    assert "url(" not in text
    assert EVIL in page.text  # shown as text
    assert "\x00" not in text
    assert "␀ end" in page.text


def test_the_page_says_what_was_read_and_dropped(folder: Path) -> None:
    manifest = Manifest.load(folder)
    facts = collect(manifest, shards_of(manifest, folder))
    texts = facts.of("train")[0]
    page = Page((folder / "report.html").read_text("utf-8"))
    assert (texts.num_bad, facts.of("eval")[0].num_bad) == (2, 0)  # one file, counted once
    both = [source for source in facts.sources if not source.generated]
    assert sum(source.num_read for source in both) == 44
    reasons = {drop.reason for source in both for drop in source.dropped}
    assert reasons >= {EXACT, NEAR, CONTAMINATED, "fewer than 20 characters"}
    for source in both:
        assert source.num_kept == sum(source.report["lengths"])
        assert source.num_read + source.num_bad == sum(source.by_category().values())
        for drop in source.dropped:
            assert drop.reason in page.text
            assert explain(drop.reason)
    for words in (
        "texts.jsonl:8: invalid UTF-8",
        "texts.jsonl:9: invalid JSON",
        "<i>no json",
        "near: near duplicate of",
        "copy: exact duplicate of",
        "leak: in an evaluation set",
        manifest.config_hash,
        manifest.tokenizer_hash,
        manifest.splits["train"][0].sha256,
        f"{manifest.num_tokens('train') / 1000:.1f}".rstrip("0").rstrip(".") + " k",
    ):
        assert words in page.text, words


def test_samples_are_shown_with_their_loss(folder: Path, tokenizer: Any) -> None:
    text = (folder / "report.html").read_text("utf-8")
    manifest = Manifest.load(folder)
    facts = collect(manifest, shards_of(manifest, folder))
    assert {name for _, name in facts.shown} == {source.name for source in facts.sources}
    assert [len(shown) for shown in facts.shown.values()] == [2, 2, 1, 1]
    sample = facts.shown["train", "recall"][0].sample
    answer = tokenizer.decode(sample.tokens[sample.loss_mask == 1][:1].tolist()).strip()
    assert re.search(rf"<span class=loss>[^<]*{re.escape(answer)}", text)
    assert "<span class=read>" in text


def test_figures_are_images_and_the_same_every_time(
    folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    names = {"tokens.png", "lengths.png", "kept.png", "packing.png"}
    assert {p.name for p in (folder / "plots").iterdir()} == names
    before = {p: p.read_bytes() for p in [folder / "report.html", *(folder / "plots").iterdir()]}
    assert all(d.startswith(b"\x89PNG") for p, d in before.items() if p.suffix == ".png")
    (folder / "plots" / "old.png").write_bytes(b"")
    files = write_report(Manifest.load(folder), folder, tokenizer=tokenizer)
    assert {p: p.read_bytes() for p in files} == before
    assert not (folder / "plots" / "old.png").exists()


def test_many_sources_and_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(folder)
    record = manifest.splits["train"][0]
    many = [replace(record, source=f"source {i}") for i in range(40)]
    reports = {f"train/source {i}": manifest.reports[f"train/{record.source}"] for i in range(40)}
    wide = replace(manifest, splits={"train": tuple(many)}, reports=reports, root=str(folder))
    files = write_report(wide, tmp_path, tokenizer=None)
    page = Page(files[0].read_text("utf-8"))
    assert all(f"source {i}" in page.text for i in range(40))
    assert "0 of 0" not in page.text


def test_numbers_are_for_people() -> None:
    assert [human(n) for n in (0, 999, 1000, 12_345, 4_560_000, 2.5e12)] == [
        *("0", "999", "1 k", "12.3 k", "4.56 M", "2,500 G")
    ]
    assert [percent(s) for s in (0, 0.0001, 0.5, 0.625, 0.99999, 1)] == [
        *("0 %", "< 0.1 %", "50 %", "62.5 %", "99.9+ %", "100 %")
    ]


@pytest.mark.parametrize(
    ("lines", "filters", "words"),
    [
        ([b""], {}, ["no document was read", "mend its path"]),
        (
            [json.dumps({"text": f"text {i}"}).encode() for i in range(30)],
            {"min_characters": 100},
            ["30 documents were read", "'fewer than 100 characters' (30", "filters.min_characters"],
        ),
        (
            [json.dumps({"text": f"un deux trois {i} " * 40}).encode() for i in range(30)],
            {"languages": ("en",)},
            ["30 documents were read", "'language fr' (30", "filters.languages"],
        ),
    ],
)
def test_nothing_left_names_the_reason_and_the_mend(
    tokenizer: Any, tmp_path: Path, lines: list[bytes], filters: dict[str, Any], words: list[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    for wanted in (None, 5):
        source = SourceConfig(
            kind="jsonl", path=str(tmp_path / "a.jsonl"), filters=FilterConfig(**filters)
        )
        config = PrepareConfig(
            sources=[source], seq_length=64, eval_fraction=0.0, train_samples=wanted, eval_samples=0
        )
        with pytest.raises(ValueError, match="source jsonl has") as caught:
            prepare_shards(config, tmp_path / f"out{wanted}", tokenizer=tokenizer)
        message = str(caught.value)
        assert all(w in message for w in words if wanted is None or not w.startswith("mend"))
        assert "\n" not in message
        names = {p.name for p in (tmp_path / f"out{wanted}").iterdir()}
        assert not names & {"manifest.json", "plan.json", "train", "eval"}


def test_shards_of_a_remote_place_are_shown(folder: Path) -> None:
    manifest = Manifest.load(folder)
    storage = open_storage("memory://report")
    for records in manifest.splits.values():
        for record in records:
            with storage.create(record.path) as stream:
                stream.write((folder / record.path).read_bytes())
    facts = collect(replace(manifest, root="memory://report"), storage)
    assert [len(shown) for shown in facts.shown.values()] == [2, 2, 1, 1]


def test_figures_have_room_for_their_words(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    manifest = Manifest.load(folder)
    text = collect(manifest, shards_of(manifest, folder)).sources[0]
    long_one = replace(
        text, report={**text.report, "lengths": [0] * 20 + [1]}, name="name " * 30, room=10**12
    )
    every = ("language fr", CONTAMINATED, EXACT, NEAR, "too few tokens", "fewer than 3 words")
    dropped = {reason: {"documents": 3, "characters": 9} for reason in every}
    reasons = replace(text, report={**text.report, "dropped": dropped})
    for sources in ([long_one], [reasons], [text] * 60):
        for figure in figures(Facts(manifest, sources)).values():
            png(figure)
    assert [str(warning.message) for warning in recwarn] == []
