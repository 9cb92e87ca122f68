"""The parts that preparation is made of: processes, the encoder, cutting, orders, stores."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import tokenize
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.engine import plan
from data_prep.engine.documents import PortableTokenizer
from data_prep.engine.parts import mask_spans
from data_prep.engine.pool import Pool, choose_processes
from data_prep.loader import ShardLoader
from data_prep.pack import CutCounts, Cutting
from data_prep.prepare import prepare_shards, what_is_missing
from data_prep.shards import Manifest, read_shard
from data_prep.sources import SampleOrder, shuffle_places
from data_prep.tokenize import TextEncoder, cut_text, encode_text

# --- processes --------------------------------------------------------------------------


def pool_of(num_processes: int, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """A pool that does what `pool_work.py` says."""
    folder = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", folder)
    monkeypatch.syspath_prepend(folder)
    return Pool(importlib.import_module("pool_work").setup, (100,), num_processes)


def test_results_come_in_order_from_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_of(3, monkeypatch) as pool:
        results = list(pool.map(iter(range(50))))
        again = list(pool.map(iter(range(5))))
    assert [value for value, _ in results] == list(range(100, 150))
    assert [value for value, _ in again] == list(range(100, 105))
    assert 1 < len({pid for _, pid in results}) <= 3
    assert os.getpid() not in {pid for _, pid in results}


def test_errors_and_deaths_in_a_process_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_of(2, monkeypatch) as pool:
        with pytest.raises(ValueError, match="task=-1 must not be negative"):
            list(pool.map([1, -1, 2]))
        with pytest.raises(OSError, match=r"ended with status -9 \(out of memory\?\)"):
            list(pool.map([1, -2, 2]))


def test_one_process_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_of(1, monkeypatch) as pool:
        assert list(pool.map([1, 2])) == [(101, os.getpid()), (102, os.getpid())]


def test_processes_are_started_where_they_pay() -> None:
    assert choose_processes(5, pays=False) == 5
    assert choose_processes(0, pays=False) == 1
    assert choose_processes(0, pays=True) == min(8, len(os.sched_getaffinity(0)))


# --- tokens -----------------------------------------------------------------------------


@given(st.text(max_size=60), st.integers(1, 12))
def test_cut_texts_join_to_the_whole(text: str, most: int) -> None:
    stretches = cut_text(text, most)
    assert "".join(stretches) == text
    assert max(map(len, stretches)) <= most


def test_the_encoder_gives_what_the_tokenizer_gives(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["one two\n\nthree", "", "<|im_end|> stays text", "äöü 漢字 🙂" * 30, " falcon" * 9]
    encoder = TextEncoder(tokenizer.backend_tokenizer, np.dtype("<u2"))
    rows = encoder(texts)
    assert [row.tolist() for row in rows] == encode_text(tokenizer, texts)
    assert {row.dtype for row in rows} == {np.dtype("<u2")}
    lines = "".join(f"line {i} of a long text\n" for i in range(200))
    cut = TextEncoder(tokenizer.backend_tokenizer, max_characters=300)
    assert cut([lines])[0].tolist() == encode_text(tokenizer, lines)
    monkeypatch.setattr(tokenize, "_CALL_CHARACTERS", 40)  # several calls for these texts
    many = [*texts, lines, *texts]
    assert [row.tolist() for row in cut(many)] == encode_text(tokenizer, many)


def test_a_portable_tokenizer_survives_the_journey(tokenizer: Any) -> None:
    import pickle

    there = pickle.loads(pickle.dumps(PortableTokenizer(tokenizer)))  # noqa: S301
    assert there.vocab_size == len(tokenizer)
    assert there.dtype == np.dtype("<u2")
    text = "def f(x):\n    return x"
    assert TextEncoder(there.backend)([text])[0].tolist() == encode_text(tokenizer, text)
    assert there.full.chat_template == tokenizer.chat_template


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
def test_spans_say_what_the_mask_says(bits: list[int]) -> None:
    mask = np.asarray(bits, dtype=np.uint8)
    spans = mask_spans(mask)
    again = np.zeros_like(mask) if spans is not None else np.ones_like(mask)
    for start, end in [] if spans is None else spans.tolist():
        again[start:end] = 1
    assert np.array_equal(again, mask)


# --- cutting and order ------------------------------------------------------------------


def hashes_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, size=(count, 2), dtype=np.uint64)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), max_size=30),
    policy=st.sampled_from(["split", "truncate", "drop"]),
    min_tail=st.integers(1, 20),
    drawn=st.sampled_from([(), (8,), (16, 40)]),
)
def test_every_token_is_a_piece_or_counted(
    lengths: list[int], policy: str, min_tail: int, drawn: tuple[int, ...]
) -> None:
    cutting = Cutting(
        seq_length=64,
        packing="best_fit",
        long_documents=policy,
        min_tail=min_tail,
        lengths=drawn,
        shares=(1.0,) * len(drawn),
    )
    counts, hashes = CutCounts(), hashes_of(len(lengths))
    pieces = cutting.cut(np.asarray(lengths, dtype=np.int64), hashes, counts)
    limits = cutting.limits(hashes)
    assert set(limits.tolist()) <= (set(drawn) or {64})
    assert (pieces.length <= limits[pieces.document]).all()
    left_out = counts.tail_tokens + counts.truncated_tokens + counts.long_tokens
    assert int(pieces.length.sum()) + left_out == sum(lengths)
    seen: Counter[tuple[int, int]] = Counter()
    for document, start, length in zip(
        pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True
    ):
        seen.update((document, start + i) for i in range(length))
    assert not seen or max(seen.values()) == 1
    short = [i for i, n in enumerate(lengths) if n <= limits[i]]
    assert all(seen[i, 0] and seen[i, lengths[i] - 1] for i in short)  # kept whole
    sure = cutting.sure(np.asarray(lengths, dtype=np.int64), hashes)
    assert int(sure.sum()) == int(pieces.length.sum())


def test_lengths_are_drawn_by_their_shares() -> None:
    cutting = Cutting(seq_length=64, packing="best_fit", lengths=(16, 64), shares=(1.0, 3.0))
    drawn = Counter(cutting.limits(hashes_of(20_000)).tolist())
    assert abs(drawn[16] / 20_000 - 0.25) < 0.02


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**48))
def test_the_network_is_a_shuffle(size: int, seed: int) -> None:
    order = shuffle_places(np.arange(size), size, seed)
    assert np.array_equal(np.sort(order), np.arange(size))
    part = shuffle_places(np.arange(size // 2, size), size, seed)
    assert np.array_equal(part, order[size // 2 :])


def test_large_orders_are_mixed_well(monkeypatch: pytest.MonkeyPatch) -> None:
    order = SampleOrder(3_000_000, 5).take(0, 4096)
    assert len(set(order.tolist())) == 4096
    assert abs(order.mean() / 3_000_000 - 0.5) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    small = SampleOrder(1000, 5)
    whole = np.random.default_rng(5).permutation(1000)
    assert np.array_equal(small.take(100, 50), whole[100:150])
    assert SampleOrder(None, 5).take(7, 3).tolist() == [7, 8, 9]


# --- preparation with these settings ------------------------------------------------------


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    file = tmp_path_factory.mktemp("lines") / "data.jsonl"
    texts = [f"w{i} " * int(n) for i, n in enumerate(rng.lognormal(3.5, 1.0, size=300))]
    file.write_text("\n".join(json.dumps({"id": f"d{i}", "text": t}) for i, t in enumerate(texts)))
    return file


def pieces_of(folder: Path) -> dict[str, dict[int, list[int]]]:
    found: dict[str, dict[int, list[int]]] = {}
    for record in Manifest.load(folder).splits["train"]:
        for sample in read_shard(folder / record.path):
            borders = sample.cu_seqlens.tolist()
            meta = sample.meta
            for name, offset, start, end in zip(
                meta["ids"], meta["offsets"], borders, borders[1:], strict=False
            ):
                assert offset not in found.setdefault(name, {})
                found[name][offset] = sample.tokens[start:end].tolist()
    return found


def test_packing_in_small_windows_loses_nothing(
    lines: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "WINDOW_PIECES", 23)
    source = SourceConfig(kind="jsonl", path=str(lines))
    config = PrepareConfig(sources=[source], seq_length=64, eval_fraction=0.0)
    manifest = prepare_shards(config, tmp_path, tokenizer=tokenizer)
    found = pieces_of(tmp_path)
    for line in lines.read_text().splitlines():
        document = json.loads(line)
        whole = [t for _, part in sorted(found[document["id"]].items()) for t in part]
        assert whole == [*encode_text(tokenizer, document["text"]), 0]
    report = manifest.reports["train/jsonl"]
    fill = manifest.num_tokens("train") / (64 * manifest.num_samples("train"))
    assert report["fill"] == pytest.approx(fill, abs=1e-6)
    assert sum(report["lengths"]) == 300


def test_lengths_and_policies_hold_in_the_shards(
    lines: Path, tokenizer: Any, tmp_path: Path
) -> None:
    source = SourceConfig(kind="jsonl", path=str(lines), lengths={32: 1, 96: 1}, min_tail=8)
    config = PrepareConfig(sources=[source], seq_length=96, eval_fraction=0.0)
    manifest = prepare_shards(config, tmp_path / "a", tokenizer=tokenizer)
    found = pieces_of(tmp_path / "a")
    lengths = {name: [len(p) for _, p in sorted(ps.items())] for name, ps in found.items()}
    assert {max(own) for own in lengths.values()} >= {32, 96}
    assert all(min(own) >= 8 for own in lengths.values() if len(own) > 1)
    report = manifest.reports["train/jsonl"]
    kept = sum(map(sum, lengths.values()))
    assert kept + report["dropped"]["tail"]["tokens"] == report["num_tokens"]
    assert set(Counter(max(own) for own in lengths.values() if len(own) > 1)) == {32, 96}
    for policy in ("truncate", "drop"):
        source = SourceConfig(kind="jsonl", path=str(lines), long_documents=policy)
        config = PrepareConfig(sources=[source], seq_length=96, eval_fraction=0.0)
        manifest = prepare_shards(config, tmp_path / policy, tokenizer=tokenizer)
        found = pieces_of(tmp_path / policy)
        assert all(list(own) == [0] for own in found.values())
        assert (len(found) == 300) == (policy == "truncate")
        dropped = manifest.reports["train/jsonl"]["dropped"]
        reason = {"truncate": "end beyond the first window", "drop": "longer than a sample"}
        assert dropped[reason[policy]]["documents"] > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": {"4x": 1}}, "lengths {4x: 1} must be a number of tokens"),
        ({"lengths": {512: 1}}, r"go beyond seq_length=96; raise data.seq_length"),
        ({"lengths": {32: 0}}, "a share above 0"),
        ({"lengths": {32: 1}, "packing": "none"}, "set data.packing=best_fit"),
        ({"long_documents": "cut"}, "is not one of split, truncate, drop"),
        ({"min_tail": 0}, "min_tail=0 must be at least 1"),
    ],
)
def test_wrong_lengths_are_refused(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    packing = changes.pop("packing", "best_fit")

    def make() -> PrepareConfig:
        source = SourceConfig(kind="jsonl", path="x", **changes)
        return PrepareConfig(sources=[source], seq_length=96, packing=packing)

    with pytest.raises(ValueError, match=message):
        make()


# --- stores -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "file", "path"])
def test_shards_go_to_other_places(lines: Path, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    place = {
        "memory": f"memory://{tmp_path.name}/corpus",
        "file": f"file://{tmp_path}/there",
        "path": str(tmp_path / "there"),
    }[kind]
    source = SourceConfig(kind="jsonl", path=str(lines))
    fields: dict[str, Any] = {"sources": [source], "seq_length": 64, "samples_per_shard": 40}
    prepare_shards(PrepareConfig(**fields), tmp_path / "here", tokenizer=tokenizer)
    config = PrepareConfig(**fields, dir=place)
    out = tmp_path / "out"
    manifest = prepare_shards(config, out, tokenizer=tokenizer)
    assert [p.name for p in out.iterdir()] == ["manifest.json"]
    assert manifest.splits == Manifest.load(tmp_path / "here").splits
    steps = [ShardLoader(p, batch_size=3, epochs=1) for p in (tmp_path / "here", out, place)]
    for batches in zip(*steps, strict=True):
        assert all(batch.tokens.equal(batches[0].tokens) for batch in batches)

    def missing() -> str | None:
        return what_is_missing(config, out, tokenizer=tokenizer, verify=True)

    assert missing() is None
    files, root = fsspec.url_to_fs(place)
    name = manifest.splits["train"][1].path
    data = bytearray(files.cat_file(f"{root}/{name}"))
    data[700] ^= 1
    files.pipe_file(f"{root}/{name}", bytes(data))
    assert missing() == f"{name} is damaged"
    with pytest.raises(ValueError, match="does not match the manifest's sha256"):
        list(ShardLoader(out, batch_size=3, epochs=1))
    files.rm_file(f"{root}/{manifest.splits['train'][2].path}.json")
    assert prepare_shards(config, out, tokenizer=tokenizer) == manifest
    assert missing() is None
    other = PrepareConfig(**{**fields, "seed": 3}, dir=place)
    with pytest.raises(ValueError, match="holds shards of another configuration"):
        prepare_shards(other, tmp_path / "other", tokenizer=tokenizer)


def test_a_store_that_fails_leaves_no_record(
    lines: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"memory://{tmp_path.name}/corpus"
    config = PrepareConfig(
        sources=[SourceConfig(kind="jsonl", path=str(lines))], seq_length=64, dir=place
    )
    files, root = fsspec.url_to_fs(place)
    whole = type(files).put_file

    def full(self: Any, local: str, there: str, **words: Any) -> None:
        if there.endswith("shard-00000.tar"):
            raise OSError(28, "No space left on device")
        whole(self, local, there, **words)

    monkeypatch.setattr(type(files), "put_file", full)
    with pytest.raises(OSError, match=r"could not write memory://.*finished shards are kept"):
        prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    assert not [path for path in files.find(root) if ".tar" in path]
    monkeypatch.setattr(type(files), "put_file", whole)
    prepare_shards(config, tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_protocol_that_nobody_knows_is_refused(
    lines: Path, tokenizer: Any, tmp_path: Path
) -> None:
    source = SourceConfig(kind="jsonl", path=str(lines))
    config = PrepareConfig(sources=[source], seq_length=64, dir="gopher://x/y")
    with pytest.raises(ValueError, match=r"data.dir=gopher://x/y cannot be opened"):
        prepare_shards(config, tmp_path, tokenizer=tokenizer)
