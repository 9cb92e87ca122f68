"""The loader gives every sample once, to one rank, and goes on exactly where it stood."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import loader_order
from data_prep.loader import ShardLoader, collate
from data_prep.sample import Sample
from data_prep.shards import MEMBERS, Manifest, ShardRecord, index_shard, write_shard
from tests.data_prep.loader_data import LENGTH, TOTAL, make_sample, numbers, take, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_an_epoch_holds_every_sample_once(data: Path) -> None:
    loader = ShardLoader(data, batch_size=4, epochs=2)
    seen = numbers(loader)
    assert sorted(seen[:TOTAL]) == sorted(seen[TOTAL:]) == list(range(TOTAL))
    assert seen[:TOTAL] != seen[TOTAL:]
    assert loader.num_samples == TOTAL
    with pytest.raises(StopIteration):
        next(loader)


def test_batches_have_the_promised_types(data: Path) -> None:
    batch = next(ShardLoader(data / "manifest.json", batch_size=3))
    assert batch.tokens.shape == batch.loss_mask.shape == (3, LENGTH)
    assert batch.tokens.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool
    assert batch.cu_seqlens is None
    assert batch.num_loss_tokens == 3 * (LENGTH - 1)
    assert {"kind", "source", "ids"} <= batch.meta[0].keys()
    assert batch.to("cpu").tokens.equal(batch.tokens)


def test_borders_run_over_all_rows() -> None:
    batch = collate([make_sample(0, "code", (0, 2, 6)), make_sample(1, "code")])
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 12]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.to("cpu").cu_seqlens is not None


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ranks=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 4)), max_size=4),
    seed=st.integers(0, 3),
)
def test_no_sample_is_lost_over_stops_with_other_ranks(
    data: Path, ranks: list[tuple[int, int, int]], seed: int
) -> None:
    """Runs of (ranks, batch size, steps), each from the state of the one before, then the rest."""
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for dp_size, batch_size, steps in ranks:
        states = []
        parts: list[list[list[int]]] = []
        for rank in range(dp_size):
            loader = ShardLoader(
                data, batch_size=batch_size, seed=seed, dp_rank=rank, dp_size=dp_size
            )
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            parts.append(take(loader, steps))
            states.append(loader.state_dict())
        assert all(other == states[0] for other in states)
        state = states[0]
        seen += [n for step in zip(*parts, strict=True) for part in step for n in part]
    one = ShardLoader(data, batch_size=1, seed=seed)
    whole = [step[0] for step in take(one, max(len(seen), 2 * TOTAL))]
    assert seen == whole[: len(seen)]
    for start in range(0, len(whole) - TOTAL + 1, TOTAL):
        assert sorted(whole[start : start + TOTAL]) == list(range(TOTAL))


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[list[int]], int, list[tuple[int, int, int, int]]]:
    """Shard sizes by source, samples of a block, and (ranks, batch, steps, ahead) of each run."""
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=5)
    plan = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 6), st.integers(0, 3))
    return (
        draw(st.lists(sizes, min_size=1, max_size=3)),
        draw(st.integers(1, 40)),
        draw(st.lists(plan, min_size=1, max_size=4)),
    )


@settings(deadline=None, max_examples=80)
@given(case=runs(), weighted=st.booleans(), seed=st.integers(0, 3))
def test_any_shards_ranks_and_stops_give_every_sample_once_an_epoch(
    case: tuple[list[list[int]], int, list[tuple[int, int, int, int]]], weighted: bool, seed: int
) -> None:
    """Each run goes on from the state of the one before, with other ranks and another prefetch."""
    sizes, block, plans = case
    with tempfile.TemporaryDirectory() as folder, _epoch_block(block):
        total = _write_sources(Path(folder), sizes)
        weights = {f"s{i}": float(i + 1) for i in range(len(sizes))} if weighted else None

        def loader(**words: Any) -> ShardLoader:
            return ShardLoader(folder, seed=seed, weights=weights, **words)

        seen: list[int] = []
        state: dict[str, Any] | None = None
        for dp_size, batch_size, steps, ahead in plans:
            parts, states = [], []
            for rank in range(dp_size):
                words = {"dp_rank": rank, "dp_size": dp_size, "prefetch": ahead}
                one = loader(batch_size=batch_size, **words)
                if state is not None:
                    one.load_state_dict(json.loads(json.dumps(state)))
                parts.append(take(one, steps))
                states.append(one.state_dict())
                one.close()
            assert all(other == states[0] for other in states)
            state = states[0]
            seen += [n for step in zip(*parts, strict=True) for part in step for n in part]
        whole = loader(batch_size=1, prefetch=0)
        straight = [step[0] for step in take(whole, max(len(seen), 2 * total))]
        assert seen == straight[: len(seen)]
        if not weighted:
            for start in range(0, len(straight) - total + 1, total):
                assert sorted(straight[start : start + total]) == list(range(total))


@contextlib.contextmanager
def _epoch_block(size: int) -> Iterator[None]:
    """Epochs in blocks of about so many samples, as those of large corpora are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_order, "EPOCH_BLOCK", size)
        yield


def _write_sources(folder: Path, sources: list[list[int]]) -> int:
    (folder / "train").mkdir(parents=True)
    records: list[ShardRecord] = []
    number = 0
    for source, sizes in enumerate(sources):
        for size in sizes:
            path = folder / "train" / f"shard-{len(records):05d}.tar"
            samples = [
                Sample(
                    tokens=np.full(LENGTH, number + i, dtype=np.int32),
                    loss_mask=np.ones(LENGTH, dtype=np.uint8),
                    cu_seqlens=np.asarray([0, LENGTH], dtype=np.int32),
                    meta={"kind": "text", "source": f"s{source}", "ids": []},
                )
                for i in range(size)
            ]
            records.append(
                write_shard(path, samples, first_key=number, source=f"s{source}", kind="text")
            )
            number += size
    Manifest(
        tokenizer_hash="t",
        vocab_size=100,
        seq_length=LENGTH,
        config_hash="c",
        config={},
        splits={"train": tuple(records)},
        reports={},
    ).save(folder)
    return number


def test_what_is_read_ahead_and_not_taken_does_not_count(data: Path) -> None:
    ahead = ShardLoader(data, batch_size=2, seed=1, prefetch=5)
    first = take(ahead, 3)
    state = ahead.state_dict()
    assert state["consumed"] == 6
    following = take(ahead, 2)
    ahead.load_state_dict(state)
    assert take(ahead, 2) == following
    plain = ShardLoader(data, batch_size=2, seed=1, prefetch=0)
    assert take(plain, 5) == first + following
    with pytest.raises(ValueError, match="prefetch=-1 must be at least 0"):
        ShardLoader(data, batch_size=2, prefetch=-1)


def test_an_error_while_reading_ahead_comes_with_its_batch(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    (folder / "train" / "shard-00003.tar").unlink()
    loader = ShardLoader(folder, batch_size=1, prefetch=4, shuffle=False)
    assert numbers(iter([next(loader) for _ in range(13)])) == list(range(13))
    for _ in range(2):  # it does not go away, and no sample is skipped
        with pytest.raises(ValueError, match=r"shard-00003.tar is missing"):
            next(loader)
    assert loader.consumed == 13


def test_each_rank_compares_its_share_of_the_shards(tmp_path: Path) -> None:
    """A damaged shard is found by one rank; the others would read it unnoticed."""
    folder = write_data(tmp_path / "data")
    shard = folder / "train" / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 128] ^= 1
    shard.write_bytes(data)
    for rank in range(3):
        loader = ShardLoader(folder, batch_size=2, dp_rank=rank, dp_size=3, epochs=6)
        if rank == 1:
            with pytest.raises(ValueError, match="does not match the manifest's sha256"):
                numbers(loader)
        else:
            assert numbers(loader)


def test_notes_of_places_that_do_not_fit_are_not_believed(data: Path, tmp_path: Path) -> None:
    """A shard's own record saves reading the headers; one that lies does no harm."""
    straight = numbers(ShardLoader(data, batch_size=4, epochs=1))
    manifest = Manifest.load(data)
    for wrong in ("right", "outside", "another shard", "no list", "too few"):
        folder = write_data(tmp_path / wrong)
        for record in manifest.splits["train"]:
            with open(folder / record.path, "rb") as stream:
                parts = index_shard(stream, record.path)
            places = [[p[MEMBERS[0]][0] - 512, *(n for _, n in p.values())] for p in parts]
            own = dataclasses.asdict(record)
            if wrong == "outside":
                places[0][0] = 10**9
            elif wrong == "another shard":
                own["sha256"] = "0" * 64
                places.reverse()
            elif wrong == "no list":
                places = [[1, 2]] * len(places)
            elif wrong == "too few":
                places.pop()
            text = json.dumps({**own, "samples": places})
            (folder / f"{record.path}.json").write_text(text)
        assert numbers(ShardLoader(folder, batch_size=4, epochs=1)) == straight


def test_manifests_of_the_first_version_are_read(data: Path, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    plain = json.loads((folder / "manifest.json").read_text())
    del plain["root"]
    (folder / "manifest.json").write_text(json.dumps({**plain, "schema_version": 1}))
    old, new = (ShardLoader(place, batch_size=4, epochs=1) for place in (folder, data))
    assert numbers(old) == numbers(new)


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(dp_size=st.integers(1, 5), batch_size=st.integers(1, 7), epochs=st.integers(1, 2))
def test_finite_epochs_split_over_ranks_without_loss(
    data: Path, dp_size: int, batch_size: int, epochs: int
) -> None:
    seen = [
        number
        for rank in range(dp_size)
        for number in numbers(
            ShardLoader(data, batch_size=batch_size, dp_rank=rank, dp_size=dp_size, epochs=epochs)
        )
    ]
    assert Counter(seen) == dict.fromkeys(range(TOTAL), epochs)


def test_resume_in_the_middle_is_exact(data: Path) -> None:
    weights = {"code": 0.5, "recall": 0.3, "chat": 0.2}
    straight = ShardLoader(data, batch_size=3, seed=5, weights=weights)
    first = take(straight, 400)
    again = ShardLoader(data, batch_size=3, seed=5, weights=weights)
    take(again, 123)
    state = json.loads(json.dumps(again.state_dict()))
    resumed = ShardLoader(data, batch_size=3, seed=5, weights=weights)
    resumed.load_state_dict(state)
    assert resumed.consumed == 369
    assert take(resumed, 277) == first[123:]


def test_weights_hold_and_every_pool_is_passed_evenly(data: Path) -> None:
    loader = ShardLoader(data, batch_size=10, weights={"code": 3, "recall": 1})
    counts = Counter(number for step in take(loader, 200) for number in step)
    by_source = {
        "code": sum(counts[n] for n in range(13)),
        "recall": sum(counts[n] for n in range(13, 21)),
    }
    assert by_source == {"code": 1500, "recall": 500}
    assert not any(counts[n] for n in range(21, TOTAL))
    assert max(counts[n] for n in range(13)) - min(counts[n] for n in range(13)) <= 1
    by_kind = ShardLoader(data, batch_size=10, weights={"chat": 1, "text": 1})
    assert Counter(b["kind"] for b in next(by_kind).meta).keys() <= {"chat", "text"}


def test_kinds_filter_and_plain_order(data: Path) -> None:
    loader = ShardLoader(data, batch_size=5, kinds=["recall"], epochs=1, shuffle=False)
    assert numbers(loader) == list(range(13, 21))
    loader = ShardLoader(data, batch_size=5, epochs=1, shuffle=False)
    assert numbers(loader) == list(range(TOTAL))


def test_seeds_give_other_orders(data: Path) -> None:
    one, two = (take(ShardLoader(data, batch_size=TOTAL, seed=s), 1) for s in (0, 1))
    assert one != two


def test_state_of_other_data_is_refused(data: Path) -> None:
    loader = ShardLoader(data, batch_size=2)
    with pytest.raises(ValueError, match="other shards or another mixture"):
        loader.load_state_dict(ShardLoader(data, batch_size=2, kinds=["text"]).state_dict())
    with pytest.raises(ValueError, match="seed=1"):
        loader.load_state_dict(ShardLoader(data, batch_size=2, seed=1).state_dict())
