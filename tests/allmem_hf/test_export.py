"""An export is whole or absent, and runs where this project is not importable."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from allmem_hf import AllMemForCausalLM
from allmem_hf.export import build_config, export_model
from allmem_hf.shipping import shipped_modules

ROOT = Path(__file__).parents[2]
BASE = Qwen3Config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    eos_token_id=96,
    pad_token_id=0,
).to_dict()
MEMORY = {"memory_size": 16, "num_heads": None, "expansion": 2, "eta_init": 0.5}
MIXER = {"mode": "allmem", "window_size": 6, "num_sinks": 2, "chunk_size": 4}

# Runs with the packages of this environment, but without any .pth file: an editable install of this
# project is not importable there.
STRANGER = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("allmem_hf") is None
assert importlib.util.find_spec("kernels") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = torch.tensor(json.loads(sys.argv[2]))
mask = (ids != 0).long()
def check(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        cache, steps = None, []
        for end in range(1, ids.shape[1] + 1):
            out = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache,
                        use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    asked = dict(attention_mask=mask, max_new_tokens=9, do_sample=False)
    return model, {
        "difference": (torch.cat(steps, 1) - whole).abs().max().item(),
        "logits": whole[:, -1].tolist(),
        "greedy": model.generate(ids, **asked).tolist(),
        "beams": model.generate(ids, num_beams=2, **asked).tolist(),
    }
answers = {}
for folder in sys.argv[3:]:
    model, answers[folder] = check(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answers[folder]["tokens"] = tokenizer("b a c")["input_ids"]
    model.save_pretrained(folder + "_saved")
    answers[folder + "_saved"] = check(folder + "_saved")[1]
print("ANSWER" + json.dumps(answers))
"""

# Exports in forked children, each with its own fate; prints how each one ended.
FATES = """
import json, os, resource, signal, sys
from collections.abc import Mapping
import test_export as own

class Deadly(Mapping):  # kills the process at its sixth tensor
    def __init__(self, tensors): self.tensors, self.left = tensors, 6
    def __iter__(self): return iter(self.tensors)
    def __len__(self): return len(self.tensors)
    def __getitem__(self, name):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.tensors[name]

def meet(fate, out):
    if fate == "killed":
        own.export(out, Deadly(own.weights()), shard_bytes=4096)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # files above 30 kB fail as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
    try:
        own.export(out, own.weights())
    except OSError as error:
        print("FULL" + str(error), flush=True)
        os._exit(3)

for fate, out in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        meet(fate, out)
        os._exit(0)
    print("ENDED", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def weights(mixer: Mapping[str, object] = MIXER) -> dict[str, torch.Tensor]:
    """Random weights of the tiny model, large enough for the memory to show."""
    torch.manual_seed(0)
    model = AllMemForCausalLM(build_config(BASE, MEMORY, mixer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name or name.endswith("alpha") else 0.2
            parameter.add_(scale * torch.randn_like(parameter))
    return dict(model.state_dict())


def export(out, tensors, mixer=MIXER, files=(), **more) -> Path:
    return export_model(out, BASE, tensors, MEMORY, mixer, files, **more)


def tokenizer_files(folder: Path) -> list[Path]:
    words = models.WordLevel({"<pad>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def fates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, bytes]]:
    """A folder where exports met their fate, what they said, and the older export they met."""
    folder = tmp_path_factory.mktemp("fates")
    for name in ("new", "old", "full"):
        (folder / name).mkdir()
    older = export(folder / "old" / "export", weights())
    held = {file.name: file.read_bytes() for file in older.iterdir()}
    scenes = [("killed", "new"), ("killed", "old"), ("full disk", "full")]
    done = subprocess.run(
        [
            sys.executable, "-c", FATES,
            json.dumps([(fate, str(folder / name / "export")) for fate, name in scenes]),
        ],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, held


def test_an_export_runs_where_this_project_is_not_importable(tmp_path):
    ids = torch.randint(1, 96, (2, 23), generator=torch.Generator().manual_seed(2))
    ids[1, :9] = 0
    mask = (ids != 0).long()
    models = {}
    for mode in ("allmem", "mamba2", "swa"):
        mixer = {**MIXER, "mode": mode}
        tensors = weights(mixer)
        export(tmp_path / mode, tensors, mixer, tokenizer_files(tmp_path / "tokenizer"))
        models[mode] = AllMemForCausalLM(build_config(BASE, MEMORY, mixer)).eval()
        models[mode].load_state_dict(tensors)
    kept = {key: v for key, v in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [
            sys.executable, "-I", "-S", "-c", STRANGER, sysconfig.get_path("purelib"),
            json.dumps(ids.tolist()), *models,
        ],
        cwd=tmp_path,
        env={**kept, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.split("ANSWER")[1])
    for mode, model in models.items():
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits[:, -1]
        greedy = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
        for result in (answers[mode], answers[f"{mode}_saved"]):
            assert result["difference"] < 1e-4
            torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=1e-5, rtol=1e-5)
            assert result["greedy"] == greedy.tolist()
            assert len(result["beams"][0]) >= 23
        assert answers[mode]["tokens"] == [2, 1, 3]


def test_the_folder_holds_every_weight_bit_for_bit(tmp_path):
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in weights().items()}
    folder = export(tmp_path / "a" / "export", tensors)
    written = load_file(folder / "model.safetensors")
    assert set(written) == set(tensors) - {"lm_head.weight"}  # tied
    for name, tensor in written.items():
        assert torch.equal(tensor, tensors[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["AllMemForCausalLM"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 96, "pad_token_id": 0}
    assert {f"{name}.py" for name in shipped_modules().values()} < {
        file.name for file in folder.iterdir()
    }
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1
    loaded = AllMemForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_large_weights_are_split_and_load_the_same(tmp_path):
    tensors = weights()
    folder = export(tmp_path / "export", tensors, shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = AllMemForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_an_export_killed_in_the_middle_leaves_nothing_under_its_name(fates):
    folder, said, _ = fates
    assert said.count(f"ENDED {-signal.SIGKILL}") == 2
    new = folder / "new"
    assert [path.name for path in new.iterdir()] == [".export.partial"]
    assert any((new / ".export.partial").glob("*.safetensors"))
    export(new / "export", weights())  # the next one clears away what was left
    assert [path.name for path in new.iterdir()] == ["export"]


def test_a_killed_second_export_leaves_the_first_one_whole(fates):
    folder, _, held = fates
    out = folder / "old" / "export"
    (out / "metrics.jsonl").write_text('{"step": 0}\n')
    (out / "DONE.json").write_text("{}")
    held = {**held, "metrics.jsonl": b'{"step": 0}\n', "DONE.json": b"{}"}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == held
    export(out, {name: tensor + 1 for name, tensor in weights().items()})
    assert (out / "model.safetensors").read_bytes() != held["model.safetensors"]
    assert (out / "metrics.jsonl").read_bytes() == held["metrics.jsonl"]
    assert not (out / "DONE.json").exists()  # it marked the weights that are gone
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_an_export_killed_between_its_renames_is_put_back(tmp_path):
    out = export(tmp_path / "export", weights())
    out.rename(tmp_path / ".export.old")
    with pytest.raises(ValueError, match="has shape"):
        export(out, {**weights(), "model.norm.weight": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_full_disk_is_one_line_and_leaves_nothing(fates):
    folder, said, _ = fates
    line = next(line for line in said.splitlines() if line.startswith("FULL"))
    assert "make room" in line
    assert "ENDED 3" in said
    assert not list((folder / "full").iterdir())


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    tensors, out = weights(), tmp_path / "export"
    first = "model.layers.0.memory.alpha"
    with pytest.raises(ValueError, match=rf"1 tensors are missing.*{first}"):
        export(out, {name: t for name, t in tensors.items() if name != first})
    with pytest.raises(ValueError, match=r"unknown.*'extra'"):
        export(out, {**tensors, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown.*memory"):
        export(out, tensors, {**MIXER, "mode": "swa"})
    with pytest.raises(ValueError, match=r"alpha' has shape \(31,\)"):
        export(out, {**tensors, first: torch.zeros(31)})
    assert not list(tmp_path.iterdir())


def test_files_and_folders_that_do_not_fit_are_refused(tmp_path):
    tensors, out = weights(), tmp_path / "export"
    with pytest.raises(ValueError, match="is not there"):
        export(out, tensors, files=[tmp_path / "absent.json"])
    other = tmp_path / "config.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match="written by the export itself"):
        export(out, tensors, files=[other])
    export(out, tensors).rename(tmp_path / "elsewhere")
    out.mkdir()
    (out / "metrics.jsonl").write_text("")
    export(out, tensors)
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ValueError, match="holds something other"):
        export(out, tensors)
    assert (out / "thesis.tex").read_text() == "ten years of work"
