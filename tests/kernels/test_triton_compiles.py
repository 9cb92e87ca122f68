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
SPILLED = {"steps_tokens_kernel": {96: 128, 128: 128, 256: 2560}}
"""Bytes a thread may spill, by kernel and head width; 32 elsewhere at widths above 64, else 0."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("hopper") / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    worker = Path(__file__).with_name("hopper_compiler.py")
    subprocess.run([sys.executable, str(worker), str(out)], check=True, env=environment)
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_papers_width_spills_no_register(found: list[dict[str, Any]]) -> None:
    spilled = {row["kernel"]: row["spilled"] for row in found if row["width"] <= 64}
    assert spilled
    assert not any(spilled.values()), spilled


def test_wider_heads_spill_no_more_than_is_known(found: list[dict[str, Any]]) -> None:
    for row in found:
        if row["width"] > 64:
            bound = SPILLED.get(row["kernel"], {}).get(row["width"], 32)
            assert row["spilled"] <= bound, row


def test_shared_memory_fits_a_hopper_block(found: list[dict[str, Any]]) -> None:
    assert max(row["shared"] for row in found) <= SHARED


def test_products_run_on_the_tensor_cores_of_hopper(found: list[dict[str, Any]]) -> None:
    elementwise = ("update_kernel", "normalise_gradient_kernel")
    products = [row for row in found if row["kernel"] not in elementwise and row["width"] == 64]
    assert len(products) == 6
    assert all(row["wgmma"] > 0 for row in products), products
