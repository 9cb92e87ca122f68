"""Settings of all tests, made before anything else is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported: kernels then run on the CPU, slowly and exactly
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def nobody_asked_to_stop() -> None:
    """A run that a test let be stopped keeps its request, which would stop the next test's."""
    from pipeline.survival import stop

    stop.reset()
