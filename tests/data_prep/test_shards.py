"""Shards hold what was written, byte for byte the same, and refuse what is broken."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.sample import Sample
from data_prep.shards import (
    Manifest,
    encode_sample,
    file_sha256,
    index_shard,
    members_at,
    read_shard,
    write_atomic,
    write_samples,
    write_shard,
)


def make_samples(count: int, length: int = 16) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            tokens=rng.integers(0, 1000, size=length).astype(np.int32),
            loss_mask=rng.integers(0, 2, size=length).astype(np.uint8),
            cu_seqlens=np.asarray([0, 5, length], dtype=np.int32),
            meta={"kind": "text", "source": "s", "ids": [f"dé{i}"], "num_padding": 1},
        )
        for i in range(count)
    ]


def same(one: Sample, two: Sample) -> bool:
    return (
        np.array_equal(one.tokens, two.tokens)
        and np.array_equal(one.loss_mask, two.loss_mask)
        and np.array_equal(one.cu_seqlens, two.cu_seqlens)
        and one.meta == two.meta
    )


def write(path: Path, samples: list[Sample]) -> bytes:
    write_shard(path, samples, first_key=0, source="s", kind="text")
    return path.read_bytes()


def test_samples_round_trip_and_are_described(tmp_path: Path) -> None:
    samples = make_samples(7)
    path = tmp_path / "train" / "shard-00000.tar"
    path.parent.mkdir()
    record = write_shard(path, samples, first_key=30, source="s", kind="text")
    assert all(same(a, b) for a, b in zip(samples, read_shard(path), strict=True))
    assert record.sha256 == file_sha256(path)
    assert record.path == "train/shard-00000.tar"
    assert record.num_samples == 7
    assert record.num_tokens == 7 * 15
    assert record.num_bytes == path.stat().st_size
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_bytes_do_not_depend_on_time_or_user(tmp_path: Path) -> None:
    one = write(tmp_path / "a.tar", make_samples(3))
    two = write(tmp_path / "b.tar", make_samples(3))
    assert one == two
    with tarfile.open(tmp_path / "a.tar") as archive:
        for info in archive:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")


def test_the_noted_places_are_those_of_the_headers(tmp_path: Path) -> None:
    path, places = tmp_path / "shard-00000.tar", []
    with open(path, "wb") as stream:
        write_samples(
            stream,
            make_samples(9, length=700),
            first_key=5,
            name="train/shard-00000.tar",
            source="s",
            kind="text",
            places=places,
        )
    with open(path, "rb") as stream:
        assert members_at(places) == index_shard(stream, path.name)


def test_webdataset_reads_them(tmp_path: Path) -> None:
    samples = make_samples(4)
    write(tmp_path / "shard-00000.tar", samples)
    dataset = webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False)
    read = list(dataset)
    assert [s["__key__"] for s in read] == [f"{i:09d}" for i in range(4)]
    for ours, theirs in zip(samples, read, strict=True):
        array = np.load(io.BytesIO(theirs["tokens.npy"]), allow_pickle=False)
        assert np.array_equal(array, ours.tokens)
        assert json.loads(theirs["meta.json"]) == ours.meta


def test_truncated_shards_are_refused_wherever_they_end(tmp_path: Path) -> None:
    data = write(tmp_path / "whole.tar", make_samples(2))
    path = tmp_path / "cut.tar"
    for size in [*range(0, len(data), 700), 100, 513, len(data) - 512]:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.tar.*stage=prepare again"):
            list(read_shard(path))
    big = write(tmp_path / "big.tar", make_samples(40))
    for size in range(tarfile.RECORDSIZE, len(big), tarfile.RECORDSIZE):
        path.write_bytes(big[:size])
        with pytest.raises(ValueError, match=r"cut\.tar.*stage=prepare again"):
            list(read_shard(path))


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../../evil.tokens.npy", {}),
        ("/etc/000000000.tokens.npy", {}),
        ("000000000.tokens.npy", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("000000000.tokens.npy", {"type": tarfile.LNKTYPE, "linkname": "x"}),
        ("000000000.tokens.pkl", {}),
        ("000000000.tokens.npy/", {"type": tarfile.DIRTYPE}),
    ],
)
def test_foreign_members_are_refused(tmp_path: Path, name: str, fields: dict[str, object]) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, name, **fields)
    with pytest.raises(ValueError, match="no member of a sample"):
        list(read_shard(path))


def test_broken_members_are_refused(tmp_path: Path) -> None:
    good = encode_sample(make_samples(1)[0])
    pickled = io.BytesIO()
    np.save(pickled, np.asarray([{"a": 1}], dtype=object), allow_pickle=True)
    floats = io.BytesIO()
    np.save(floats, np.zeros(16))
    for change in (
        {"tokens.npy": pickled.getvalue()},
        {"tokens.npy": floats.getvalue()},
        {"tokens.npy": good["tokens.npy"][:-4]},
        {"tokens.npy": b""},
        {"loss_mask.npy": encode_sample(make_samples(1, length=20)[0])["loss_mask.npy"]},
        {"meta.json": b"{"},
        {"meta.json": b"[]"},
        {"meta.json": None},
    ):
        path = tmp_path / "broken.tar"
        with tarfile.open(path, "w") as archive:
            for part, data in {**good, **change}.items():
                if data is not None:
                    add(archive, f"000000000.{part}", data)
        with pytest.raises(ValueError, match=r"broken\.tar.*run stage=prepare again"):
            list(read_shard(path))


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing; run stage=prepare first"):
        Manifest.load(tmp_path)
    file = tmp_path / "manifest.json"
    for text in ("{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "splits": {"a": [1]}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="is no manifest"):
            Manifest.load(tmp_path)
    file.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema_version=99"):
        Manifest.load(file)


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from data_prep.shards import write_shard
from tests_samples import make_samples
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
write_shard(Path(sys.argv[1]), make_samples(50), first_key=0, source="s", kind="text")
"""


def test_a_file_that_cannot_grow_leaves_nothing_behind(tmp_path: Path) -> None:
    """The kernel refuses bytes past a limit, as it does on a full disk."""
    helper = tmp_path / "tests_samples.py"
    helper.write_text(Path(__file__).read_text("utf-8"), "utf-8")
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(out / "shard-00000.tar")],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "could not write shard-00000.tar" in done.stderr.splitlines()[-1]
    assert not list(out.iterdir())


def test_atomic_writes_replace(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    with pytest.raises(OSError, match="could not write b"):
        write_atomic(tmp_path / "missing" / "b", b"")
