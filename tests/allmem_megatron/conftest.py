"""Tiny random Hugging Face models, and how the tests of this package turn them into ours."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allmem_megatron.config import BaseModelConfig, MemoryConfig
from allmem_megatron.convert import load_hf_tensors
from allmem_megatron.model import AllMemGPTModel, build_model

LOGITS_ATOL = 1e-4  # float32, the bound


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _hf_config(family: str, tied: bool, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": family,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16 if family == "qwen3" else 8,
        "intermediate_size": 80,
        "vocab_size": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
    }
    return {**config, **changes}


def _hf_model(family: str, tied: bool = False, **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _hf_config(family, tied, **changes)
    hf = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():  # norms and biases away from 1 and 0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return hf


def _hf_tensors(hf: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in hf.named_parameters()}


def _ours(hf: nn.Module, **build: Any) -> AllMemGPTModel:
    """Our model with the weights of a Hugging Face model."""
    config = BaseModelConfig.from_hf(hf.config.to_dict())
    if build.get("branch", "none") != "none":
        build.setdefault("memory", MemoryConfig(memory_size=16, eta_init=0.1))
    model = build_model(config, **build)
    load_hf_tensors(model, _hf_tensors(hf), part="base")
    return model


@pytest.fixture
def hf_config() -> Callable[..., dict[str, Any]]:
    return _hf_config


@pytest.fixture
def hf_model() -> Callable[..., nn.Module]:
    return _hf_model


@pytest.fixture
def hf_tensors() -> Callable[[nn.Module], dict[str, Tensor]]:
    return _hf_tensors


@pytest.fixture
def ours() -> Callable[..., AllMemGPTModel]:
    return _ours


@pytest.fixture
def logits_atol() -> float:
    return LOGITS_ATOL


@pytest.fixture
def set_alpha() -> Callable[[AllMemGPTModel, float], None]:
    def set_all(model: AllMemGPTModel, scale: float) -> None:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.memory_parameters():
                if name.endswith("alpha"):
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    return set_all


class Ranks:
    """Four context-parallel ranks on gloo that run one case after another.

    The workers start once, with the first case, and again after a case that failed.
    """

    COUNT = 4
    TIMEOUT_S = 300
    """Of one case; the first one waits for the imports of all ranks too."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._meeting: tempfile.TemporaryDirectory[str] | None = None

    def run(self, case: str, **arguments: Any) -> list[Any]:
        """The answer of every rank. Raises: AssertionError with the first rank's error."""
        if not self._processes:
            self._start()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"case": case, **arguments}) + "\n")
            process.stdin.flush()
        answers: dict[int, Any] = {}
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < self.COUNT:
                ready = waiting.select(self.TIMEOUT_S)
                for key, _ in ready:
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    waiting.unregister(key.fileobj)
                    answers[key.data] = json.loads(line) if line else {"error": "the rank ended"}
                errors = [a["error"] for a in answers.values() if "error" in a]
                if errors or not ready:
                    self.stop(kill=True)
                assert not errors, errors[0]
                assert ready, f"no answer in {self.TIMEOUT_S} s but from ranks {sorted(answers)}"
        return [answers[rank]["result"] for rank in range(self.COUNT)]

    def stop(self, *, kill: bool = False) -> None:
        """Ends the workers."""
        for process in self._processes:
            if kill:
                process.kill()
            elif process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=30)
            finally:
                process.kill()
        self._processes = []
        if self._meeting is not None:
            self._meeting.cleanup()

    def _start(self) -> None:
        root = Path(__file__).parents[2]
        environment = {
            **os.environ,
            "WORLD_SIZE": str(self.COUNT),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        }
        worker = Path(__file__).parent / "context_parallel" / "worker.py"
        # a file to meet at: no port that another process may take
        self._meeting = tempfile.TemporaryDirectory(prefix="ranks-")
        store = Path(self._meeting.name) / "store"
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(worker), str(store)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(self.COUNT)
        ]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.stop()
