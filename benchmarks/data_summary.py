"""What the data benchmark found, as a person reads it, and on which machine."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import commit

Result = dict[str, Any]


def machine() -> Result:
    """What was measured on."""
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": commit(),
        "load_before": os.getloadavg()[0],
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def summary(result: Result) -> str:
    """The numbers as a person reads them."""
    text, lines = result["text"], []
    lines.append(
        f"{text['name']}: {text['documents']:,} documents, {text['tokens']:,} tokens "
        f"({result['tokenizer']['name']}); {result['machine']['processor']}, "
        f"{result['machine']['cores']} cores, load {result['machine']['load_before']:.0f} to "
        f"{result['machine']['load_after']:.0f}"
    )
    for name, kinds in result.get("ratios", {}).items():
        tool, count = name.split("/")
        cpu, wall = kinds["cpu_s"]["of_the_tokenizer"], kinds["wall_s"]["of_the_tokenizer"]
        speed = statistics.median(
            turn[name]["tokens"] / turn[name]["cpu_s"] for turn in result["rounds"]
        )
        times = kinds["wall_s"]["of_one_process"]["median"]
        lines.append(
            f"{tool:24} {count:>2} processes: {speed / 1e6:5.2f} M tokens per CPU second, "
            f"{cpu['median']:4.0%} of the tokenizer ({cpu['least']:.0%} to {cpu['most']:.0%}); "
            f"by wall {wall['median']:4.0%}, {times:.2f} × one process"
        )
    for row in result.get("memory", []):
        lines.append(
            f"memory, text ×{row['times']}, {row['processes']} processes: "
            f"{row['peak_bytes'] / 2**20:,.0f} MiB, largest child "
            f"{row['largest_child_bytes'] / 2**20:,.0f} MiB"
        )
    if "loader" in result:
        found = result["loader"]
        lines.append(
            f"loader: {found['tokens_per_cpu_s'] / 1e6:.1f} M tokens per CPU second, "
            f"{found['times_the_need']:.0f} × the need ({found['arithmetic']})"
        )
    for name, row in result.get("parts", {}).get("packing", {}).items():
        lines.append(
            f"packing, {name}: fill {row['fill']:.2%}, "
            f"{row['seconds_per_million_pieces']:.1f} s a million pieces"
        )
    for group, rows in result.get("parts", {}).items():
        for name, row in rows.items() if group != "packing" else ():
            rate = row.get("mcharacters_per_s")
            speed = f", {rate:.0f} M characters/s" if rate else ""
            lines.append(f"{group}: {name}: {row['documents_per_s']:,.0f} documents/s{speed}")
    return "\n".join(lines)
