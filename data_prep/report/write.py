"""Writes the report's files."""

from __future__ import annotations

from pathlib import Path

from data_prep.atomic import write_atomic
from data_prep.report.facts import collect
from data_prep.report.figures import figures, png
from data_prep.report.page import build_page
from data_prep.shards import MANIFEST_NAME, Manifest
from data_prep.storage import shards_of
from data_prep.tokenize import TokenizerLike

REPORT_NAME = "report.html"
FIGURES = "plots"


def write_report(
    manifest: Manifest, out_dir: str | Path, *, tokenizer: TokenizerLike | None, owner: str = ""
) -> list[Path]:
    """Writes `report.html`, which needs no other file and no network, and `plots/*.png`.

    Args:
        manifest: of the shards.
        out_dir: folder of the manifest; the report goes there.
        tokenizer: the one that made the shards; None: samples are shown as ids.
        owner: part of temporary names, where several workers write.

    Returns:
        The page, then the figures.

    Raises:
        ValueError: a shard that is shown is missing or broken.
        OSError: the disk is full.
    """
    out_path = Path(out_dir)
    # As it is read back, so that the order of names is always the same.
    manifest = Manifest.from_bytes(manifest.to_bytes(), MANIFEST_NAME)
    facts = collect(manifest, shards_of(manifest, out_path))
    images = {name: png(figure) for name, figure in figures(facts).items()}
    page = build_page(facts, images, tokenizer)
    files = [out_path / REPORT_NAME, *(out_path / FIGURES / f"{name}.png" for name in images)]
    (out_path / FIGURES).mkdir(parents=True, exist_ok=True)
    for file, data in zip(files, [page.encode(), *images.values()], strict=True):
        write_atomic(file, data, owner=owner)
    for old in set((out_path / FIGURES).glob("*.png")) - set(files):
        old.unlink()  # of an earlier report, which showed more
    return files
