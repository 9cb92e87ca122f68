"""Compiles the kernels of a decode step for Hopper without a GPU; run by a test.

python hopper_decode.py OUT.json DTYPES MIXERS, each separated by commas: a list of {kernel, shape,
dtype, registers, spilled, shared}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.swa import decode as swa
from kernels.swa import decode_kernels as swa_kernels
from kernels.ttt_memory.triton_backend import decode, decode_kernels
from tests.kernels.hopper_compiler import usage

WIDE = ("w_gate", "w_up", "w_down", "pending_eta", "pending_mu", "parts", "extremes")
"""Pointers to float32; `past` is int64, all other pointers have the tokens' dtype."""
NUMBERS = {
    **dict.fromkeys(("x_row", "q_at", "rates_at", "out_row", "N", "S"), "i32"),
    **dict.fromkeys(("window", "sinks", "slots", "share"), "i32"),
    **dict.fromkeys(("qk_eps", "out_eps", "eps", "scale", "q_eps", "k_eps"), "fp32"),
}
ALIGNED = ("x_row",)
"""Numbers that 16 divides, as the launches have it."""
MIXERS = {
    "Qwen3-1.7B": (8, 64, 8, 2, 128), "wide": (4, 128, 8, 4, 64), "widest": (2, 256, 8, 8, 256),
    "small": (16, 32, 4, 1, 96),
}  # fmt: skip
"""Memory heads and their width; key-value heads, query heads of each and their width."""
SIZES = (1024, 2048, 4096, 8192)
ITEM = {"bf16": 2, "fp32": 4}


def cases(item: int, shapes: list[str]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Shape, kernel, and keyword arguments of the launch."""
    found: list[tuple[str, Any, dict[str, Any]]] = []
    for shape in shapes:
        heads, width, kv_heads, group, wide = MIXERS[shape]
        memory = {"H": heads, "K": width, "F": 2 * width, "P": 2048, "TAPS": 4}
        memory |= decode.memory_blocks(width, 2 * width, 4)
        found.append((shape, decode_kernels.memory_step_kernel, memory))
        window = {"N": kv_heads, "G": group, "K": wide, "NORM": True}
        window |= {"PRECISION": "ieee" if item == 4 else "tf32"}
        window |= swa.step_blocks(wide, group, item)
        found.append((shape, swa_kernels.window_step_kernel, window))
        join = {"K": wide, "BS": 64, "BK": window["BK"], "num_warps": swa.JOIN_WARPS}
        found.append((shape, swa_kernels.join_splits_kernel, join))
    for size in SIZES:
        norm = {"D": size, "ADDS": True, "SCALED": True, **decode.norm_blocks(size)}
        found.append((str(size), decode_kernels.sum_norm_kernel, norm))
    found.append(("", decode_kernels.swiglu_kernel, {"BN": 1024}))
    return found


def compiled(kernel: Any, constants: dict[str, Any], dtype: str) -> Any:
    """As the launcher would compile it."""
    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants
    }
    signature = {}
    for name in kernel.arg_names:
        pointer = "*i64" if name == "past" else "*fp32" if name in WIDE else f"*{dtype}"
        signature[name] = "constexpr" if name in constants else NUMBERS.get(name, pointer)
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name in ALIGNED)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main() -> None:
    found = []
    for dtype in sys.argv[2].split(","):
        for shape, kernel, constants in cases(ITEM[dtype], sys.argv[3].split(",")):
            row = {"kernel": kernel.__name__, "shape": shape, "dtype": dtype}
            found.append({**row, **usage(compiled(kernel, constants, dtype))})
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
