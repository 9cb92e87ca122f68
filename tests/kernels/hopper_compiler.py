"""Compiles the memory's kernels for Hopper without a GPU and tells what came out; run by a test.

python hopper_compiler.py OUT.json WIDTHS CHUNKS DTYPES, each separated by commas: a list of
{kernel, width, chunk, dtype, registers, spilled, shared, wgmma}.
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

from kernels.ttt_memory.triton_backend import backward, backward_reads, branch_kernels, forward
from kernels.ttt_memory.triton_backend.blocks import BLOCKS, options, rows, tiles
from kernels.ttt_memory.triton_backend.branch import gradient_tile, tile
from kernels.vocabulary import triton_kernels

LOW = ("q", "k", "v", "out", "base", "grad_steps", "grad_out", "grad_q", "grad_k", "grad_v")
"""Pointers to the tokens' dtype; in the kernels that read, `w` too."""
TYPES = {
    **dict.fromkeys(("chunks", "blocks", "spans", "span_range", "targets"), "*i64"),
    **dict.fromkeys(("V", "stride", "first"), "i32"),
    **dict.fromkeys(("kl_weight", "ce_weight"), "fp32"),
    **dict.fromkeys(("begin", "C", "tokens_per_split", "splits", "T", "B", "N"), "i32"),
    **dict.fromkeys(
        ("x_row", "x_token", "grad_row", "grad_token", "out_row", "gate_row", "gate_token"), "i32"
    ),
    "eps": "fp32",
}
NOT_DIVISIBLE = ("V", "first", "begin", "C", "splits", "T", "B", "N", "gate_row", "gate_token")
MODULES = (forward, backward, backward_reads, branch_kernels, triton_kernels)
AROUND_LOW = ("x", "tail", "weight", "norm", "gate", "v_hat", "alpha", "grad_x", "grad_tail")
AROUND_LOW += ("grad_gate", "logits", "student", "teacher")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compiled(name: str, constants: dict[str, Any], dtype: str, warps: int, stages: int) -> Any:
    """As the launcher would compile it: pointers and sizes that 16 divides are marked as such."""
    kernel = next(getattr(m, name) for m in MODULES if hasattr(m, name))
    low = (*LOW, "w") if name.startswith("read") else LOW
    low = (*low, *AROUND_LOW) if name in {**AROUND, **VOCABULARY} else low
    types = {**TYPES, **dict.fromkeys(low, f"*{dtype}")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32") and name not in NOT_DIVISIBLE
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
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


def report(name: str, width: int, chunk: int, dtype: str) -> dict[str, Any]:
    """What becomes of a kernel whose blocks depend on the chunk length."""
    constants = {
        "H": max(1, 512 // width), "F": 2 * width, "K": width,
        **options(name, width, 2 * width, chunk, DTYPES[dtype]),
    }  # fmt: skip
    if name == "steps_weights_kernel":
        constants["GIVEN"] = False
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    found = usage(compiled(name, constants, dtype, warps, stages))
    return {"kernel": name, "width": width, "chunk": chunk, "dtype": dtype, **found}


ELEMENTWISE: dict[str, dict[str, Any]] = {
    "update_kernel": {"CLIP": True},
    "normalise_gradient_kernel": {},
    "low_weights_kernel": {"NORMALISED": True},
    "momentum_gradient_kernel": {"WRITE": True},
}


AROUND: dict[str, dict[str, Any]] = {
    "conv_kernel": {"HAS_TAIL": True, "NORM": True},
    "conv_gradient_kernel": {"HAS_TAIL": True, "NORM": True},
    "gate_norm_kernel": {},
    "gate_norm_gradient_kernel": {},
    "scale_gradient_kernel": {"D": 2048, "BT": 32, "BD": 128},
}


def around(name: str, width: int, dtype: str) -> dict[str, Any]:
    """What becomes of a kernel that stands before or after the scan."""
    kernel = getattr(branch_kernels, name)
    sizes = tile(width)
    constants = {
        "H": max(1, 512 // width), "K": width, "TAPS": 4, "BK": sizes["BK"],
        "BT": sizes["rows"], "BR": sizes["rows"], **AROUND[name],
    }  # fmt: skip
    if name == "conv_gradient_kernel":
        constants |= gradient_tile(width, 4)
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    found = usage(compiled(name, constants, dtype, sizes["num_warps"], 3))
    return {"kernel": name, "width": width, "chunk": 0, "dtype": dtype, **found}


VOCABULARY: dict[str, dict[str, Any]] = {
    "statistics_kernel": {"BV": 4096},
    "loss_kernel": {"BV": 4096, "TEACHER": True, "TARGETS": True, "GRADIENT": True},
}


def over_the_vocabulary(name: str, dtype: str) -> dict[str, Any]:
    """What becomes of a kernel of the loss."""
    found = usage(compiled(name, dict(VOCABULARY[name]), dtype, 8, 3))
    return {"kernel": name, "width": 0, "chunk": 0, "dtype": dtype, **found}


def elementwise(name: str, width: int, dtype: str) -> dict[str, Any]:
    """What becomes of a kernel that knows no chunks."""
    kernel = next(getattr(m, name) for m in MODULES if hasattr(m, name))
    shape = tiles(width) if "BR" in kernel.arg_names else rows(width)
    warps = shape.pop("num_warps", 4)
    constants = {"H": max(1, 512 // width), "F": 2 * width, "K": width, **shape}
    found = usage(compiled(name, constants | ELEMENTWISE[name], dtype, warps, 1))
    return {"kernel": name, "width": width, "chunk": 0, "dtype": dtype, **found}


def main() -> None:
    widths, chunks = ([int(x) for x in given.split(",")] for given in sys.argv[2:4])
    found = []
    for dtype in sys.argv[4].split(","):
        found += [over_the_vocabulary(name, dtype) for name in VOCABULARY]
        for width in widths:
            found += [report(name, width, chunk, dtype) for name in BLOCKS for chunk in chunks]
            found += [elementwise(name, width, dtype) for name in ELEMENTWISE]
            found += [around(name, width, dtype) for name in AROUND]
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
