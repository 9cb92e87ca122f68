"""The memory's kernels compile for Hopper, use its tensor cores and stay within its registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="pip install triton (Linux) to test the Triton kernels")

SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on Hopper."""
WIDTHS = (32, 64, 96, 128, 256)
CHUNKS = (16, 32, 64, 2048)
"""One of each kind of block: a chunk is 16 tokens at least, and blocks are 128 at most."""
PRODUCTS = 6
OTHERS = 9
"""Elementwise kernels of the scan, and those around it."""
LOSS = 2
"""Kernels of the loss, which know no head width."""


def compiled(directory: Path, widths: str, chunks: str, dtypes: str) -> list[dict[str, Any]]:
    """In a process of its own, for here Triton may interpret."""
    out = directory / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    worker = Path(__file__).with_name("hopper_compiler.py")
    command = [sys.executable, str(worker), str(out), widths, chunks, dtypes]
    subprocess.run(command, check=True, env=environment)
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("hopper")
    return compiled(out, "32,64,128,256", "2048", "bf16") + compiled(out, "64", "16", "bf16")


def test_no_register_is_spilled_at_any_head_width(found: list[dict[str, Any]]) -> None:
    assert len(found) == 5 * (PRODUCTS + OTHERS) + 2 * LOSS
    assert not [row for row in found if row["spilled"]]


def test_shared_memory_fits_a_hopper_block(found: list[dict[str, Any]]) -> None:
    assert max(row["shared"] for row in found) <= SHARED


def test_two_blocks_of_the_papers_width_fit_a_processor(found: list[dict[str, Any]]) -> None:
    for row in found:
        if row["width"] == 64:
            assert 2 * row["shared"] <= SHARED, row


def test_long_chunks_run_on_the_tensor_cores_of_hopper(found: list[dict[str, Any]]) -> None:
    products = [row for row in found if row["width"] <= 128 and row["chunk"] == 2048]
    assert len(products) == 3 * PRODUCTS
    assert all(row["wgmma"] > 0 for row in products), products


@pytest.mark.slow
def test_nothing_is_spilled_at_any_width_and_chunk_length(tmp_path: Path) -> None:
    widths, chunks = (",".join(map(str, sizes)) for sizes in (WIDTHS, CHUNKS))
    rows = compiled(tmp_path, widths, chunks, "bf16")
    assert len(rows) == len(WIDTHS) * (len(CHUNKS) * PRODUCTS + OTHERS) + LOSS
    assert not [row for row in rows if row["spilled"] or row["shared"] > SHARED]


@pytest.mark.slow
def test_float32_fits_too(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "64,256", "16,2048", "fp32")
    assert max(row["shared"] for row in rows) <= SHARED
