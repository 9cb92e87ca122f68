"""Compiles the memory's kernels for Hopper without a GPU and tells what came out; run by a test.

python hopper_compiler.py OUT.json: a list of {kernel, width, registers, spilled, shared, wgmma}.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.ttt_memory.triton_backend import backward, forward
from kernels.ttt_memory.triton_backend.blocks import BLOCKS, options, tiles

TYPES = {
    **dict.fromkeys(("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"), "*bf16"),
    **dict.fromkeys(("chunks", "blocks", "block_range"), "*i64"),
    **dict.fromkeys(("C", "tokens_per_split", "splits"), "i32"),
}
NOT_DIVISIBLE = ("splits", "C")


def compiled(kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int) -> Any:
    """As the launcher would compile it: pointers and sizes that 16 divides are marked as such."""
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "*fp32")
        for name in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in constants and name not in NOT_DIVISIBLE
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


def usage(binary: Any) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, shared memory, tensor-core instructions."""
    (tool,) = Path(nvidia.__file__).parent.rglob("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)
    assert found is not None, report
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "shared": binary.metadata.shared,
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
    }


def main() -> None:
    rows = []
    for width in (32, 64, 96, 128, 256):
        sizes = {"H": max(1, 512 // width), "F": 2 * width, "K": width}
        for name in BLOCKS:
            kernel = getattr(forward, name, None) or getattr(backward, name)
            constants = {**sizes, **options(name, width, 2 * width, torch.bfloat16)}
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            rows.append(
                {"kernel": name, "width": width} | usage(compiled(kernel, constants, warps, stages))
            )
        for name in ("update_kernel", "normalise_gradient_kernel"):
            kernel = getattr(forward, name, None) or getattr(backward, name)
            constants = {**sizes, **tiles(width)}
            if name == "update_kernel":
                constants["CLIP"] = True
            found = usage(compiled(kernel, constants, 4, 1))
            rows.append({"kernel": name, "width": width, **found})
    Path(sys.argv[1]).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
