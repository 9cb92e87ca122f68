"""How the memory's state grows over a text: norms of its fast weights and of their momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.generation import Generator, Reading

PARTS = ("gate", "up", "down")
_MOST_POINTS = 32


def memory_norms(generator: Generator, tokens: Sequence[int]) -> dict[str, dict[str, float]]:
    """Norms (Frobenius, all heads and matrices) along one text, over the initial weights' norm.

    Args:
        generator: of a model with the branch `allmem`.
        tokens: the text.

    Returns:
        `weights_norm_layer_3_by_position` and `momentum_norm_layer_3_by_position`, each
        `{"511": 1.02}`: after that many tokens. Nothing for a text shorter than one chunk.
    """
    config = generator.model.config
    chunk = config.chunk_size
    num_chunks = len(tokens) // chunk
    if not num_chunks:
        return {}
    step = chunk * -(-num_chunks // _MOST_POINTS)
    found: dict[str, dict[str, float]] = {}
    reading: Reading | None = None
    for end in range(step, num_chunks * chunk + 1, step):
        reading = generator.read(tokens[end - step : end], reading)
        for index, (layer, held) in enumerate(
            zip(generator.model.model.layers, reading.cache.layers, strict=True)
        ):
            initial = _norm([getattr(layer.memory, f"fast_{part}") for part in PARTS])
            for kind in ("weights", "momentum"):
                norm = _norm([held.tensors[f"{kind}_{part}"] for part in PARTS])
                name = f"{kind}_norm_layer_{index}_by_position"
                found.setdefault(name, {})[str(end)] = norm / initial
    return found


def _norm(tensors: Sequence[Tensor]) -> float:
    with torch.inference_mode():
        return float(sum(tensor.double().square().sum() for tensor in tensors) ** 0.5)
