"""Settings of all tests, made before anything else is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported: kernels then run on the CPU, slowly and exactly
    os.environ.setdefault("TRITON_INTERPRET", "1")
