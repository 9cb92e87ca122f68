"""An export of the demo's model generates, and remembers, where this project is not importable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allmem_hf.state_allmem import save_state
from data_prep.tokenizer import load_tokenizer
from kernels.ttt_memory.reference import FastWeights, memory_scan
from pipeline.generation import Generator
from pipeline.generation_open import MixerChoice, open_model

TEXT = "# note: amber falcon\n" + "def add(a, b):\n    return a + b\n" * 20

# Runs with this environment's packages but without any .pth file: an editable install of this
# project is not importable there.
ALONE = """
import importlib.util, json, sys
sys.path += json.loads(sys.argv[1])
assert importlib.util.find_spec("allmem_hf") is None
assert importlib.util.find_spec("kernels") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, state, text, question = sys.argv[2:6]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
asked = dict(max_new_tokens=12, do_sample=False)
inputs = tokenizer(text, return_tensors="pt")
written = model.generate(**inputs, prefill_chunk_size=100, **asked)
held = model.load_memory(state)
new = tokenizer(question, return_tensors="pt")["input_ids"]
before = torch.zeros(1, held.cache.get_seq_length(), dtype=torch.long)  # only their number counts
ids = torch.cat([before, new], 1)
mask = torch.ones_like(ids)
again = model.generate(ids, attention_mask=mask, past_key_values=held.cache, **asked)
print("ANSWER" + json.dumps({
    "backends": model.kernel_backends(),
    "written": written[0, inputs["input_ids"].shape[1]:].tolist(),
    "remembered": again[0, ids.shape[1]:].tolist(),
    "note": held.note,
}))
"""

TRITON = """
import importlib.util, json, sys
sys.path += json.loads(sys.argv[1])
assert importlib.util.find_spec("kernels") is None
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

model = get_class_from_dynamic_module("modeling_allmem.AllMemForCausalLM", sys.argv[2])
here = model.__module__.rsplit(".", 1)[0]
scan = importlib.import_module(here + ".ttt_memory").memory_scan
weights = importlib.import_module(here + ".ttt_memory_reference").FastWeights
held = torch.load(sys.argv[3], weights_only=True)
out, state = scan(*held["inputs"], weights(*held["weights"]), chunk_size=16, backend="triton")
torch.save({"out": out, "gate": state.weights.gate}, sys.argv[4])
"""

STEP = """
import importlib, importlib.util, json, sys
sys.path += json.loads(sys.argv[1])
assert importlib.util.find_spec("kernels") is None
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
here = type(model).__module__.rsplit(".", 1)[0]
chosen = importlib.import_module(here + ".decode_allmem").set_decode_backend
logits = []
for backend in ("reference", "triton"):
    chosen(model, backend)
    with torch.no_grad():
        cache = model(torch.arange(1, 90)[None], use_cache=True).past_key_values
        step = model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    logits.append(step.logits[0, 0])
told = model.kernel_backends()["decode"]
error = (logits[1] - logits[0]).norm() / logits[0].norm()
print("ANSWER" + json.dumps({"told": told, "error": error.item()}))
"""


def alone(program: str, *arguments: str, cwd: Path, **environment: str) -> str:
    kept = {key: v for key, v in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    packages = [path for path in sys.path if path.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, json.dumps(packages), *arguments],
        cwd=cwd,
        env={**kept, "HF_HOME": str(cwd / "hub"), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_s_export_generates_and_remembers_without_this_project(exported, tmp_path):
    opened = open_model(exported, MixerChoice(), device=torch.device("cpu"), dtype=torch.float32)
    tokenizer, generator = load_tokenizer(exported), Generator(opened.model)
    ids, question = tokenizer(TEXT)["input_ids"], tokenizer("# recall: amber")["input_ids"]
    reading = generator.read(ids)
    state = tmp_path / "text.state"
    save_state(state, opened.model, reading.cache, reading.hidden, {"source": "text"})
    said = alone(ALONE, str(exported), str(state), TEXT, "# recall: amber", cwd=tmp_path)
    answer = json.loads(said.split("ANSWER")[1])
    ends = opened.stop_ids
    rows = generator.generate([ids, ids + question], max_new_tokens=12, stop_ids=ends)
    assert answer["written"] == list(rows[0].tokens)
    assert answer["remembered"] == list(rows[1].tokens)
    assert answer["note"] == {"source": "text"}
    assert answer["backends"] == {"window": "reference", "memory": "reference"}


def test_the_export_s_triton_kernels_compute_the_memory_without_this_project(exported, tmp_path):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    inputs = [torch.randn(1, 41, 2, 32) for _ in range(3)]
    inputs += [torch.rand(1, 41, 2, 3) * 0.1, torch.rand(1, 41, 2)]
    weights = [torch.randn(2, 64, 32), torch.randn(2, 64, 32), torch.randn(2, 32, 64)]
    weights = [w * w.shape[-1] ** -0.5 for w in weights]
    torch.save({"inputs": inputs, "weights": weights}, tmp_path / "in.pt")
    alone(
        TRITON, str(exported), str(tmp_path / "in.pt"), str(tmp_path / "out.pt"),
        cwd=tmp_path, TRITON_INTERPRET="1",
    )  # fmt: skip
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    out, state = memory_scan(*inputs, FastWeights(*weights), chunk_size=16)
    assert state is not None
    torch.testing.assert_close(found["out"], out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["gate"], state.weights.gate, atol=1e-4, rtol=1e-4)


def test_the_export_s_fused_decode_step_runs_without_this_project(exported, tmp_path):
    pytest.importorskip("triton")
    said = alone(STEP, str(exported), cwd=tmp_path, TRITON_INTERPRET="1")
    answer = json.loads(said.split("ANSWER")[1])
    assert answer["told"] == "triton"
    assert 0 < answer["error"] < 1e-4  # other arithmetic, the same function
