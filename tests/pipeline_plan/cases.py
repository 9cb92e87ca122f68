"""Small real trainings whose memory is predicted and measured; `docs/plan.md`'s table, too.

    python tests/pipeline_plan/cases.py FOLDER [NAME …]

prints predicted and measured peaks as a Markdown table. Tensors are hundreds of megabytes, so that
the few that Python and the libraries take meanwhile do not count.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from allmem_megatron.base_files import save_hf_dir
from allmem_megatron.config import BaseModelConfig
from allmem_megatron.convert import model_to_hf
from allmem_megatron.model import build_model
from allmem_megatron.parallel import destroy_model_parallel
from pipeline.config import compose
from pipeline.models import choose_dtype
from pipeline.planning.estimate import Memory, estimate_memory
from pipeline.planning.hardware import GPUS
from pipeline.planning.layouts import check, configured
from pipeline.planning.work import find_work

ROOT = Path(__file__).resolve().parents[2]

BASE = {
    "family": "qwen3",
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": 2048,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
    "qk_norm": True,
}
"""A base model that a CPU trains on thousands of tokens in seconds."""

COMMON = (
    "recipe=tiny",
    "data.tokenizer=models/demo_base",
    "data.train_samples=4",
    "data.eval_samples=1",
    "data.sources=[{kind: python_packages, name: code, packages: [torch], eval_packages: [numpy], "
    "max_characters: 2000000}]",
    "mixer.memory.memory_size=256",
    "mixer.memory.num_heads=4",
    "tracking=none",
    "parallel.num_threads=1",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training; by default the memory is distilled on one rank."""

    name: str
    stage: str = "convert"
    num_ranks: int = 1
    length: int = 4096
    batch_size: int = 1
    window: int = 512
    chunk: int = 128
    words: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    """Changes of `BASE`."""

    @property
    def base(self) -> BaseModelConfig:
        """The base model."""
        return BaseModelConfig(**{**BASE, **dict(self.sizes)})  # type: ignore[arg-type]

    def overrides(self, folder: Path) -> list[str]:
        """The command line without `stage=`; what can be shared between cases lies in `folder`."""
        words = [
            *COMMON,
            f"stages=[prepare, {self.stage}]",
            "model=demo",
            f"model.path='{base_folder(folder, self)}'",
            f"run.dir={folder / self.name}",
            f"data.seq_length={self.length}",
            f"plan.num_gpus={self.num_ranks}",
        ]
        stage = self.stage
        words += [f"{stage}.steps=2", f"{stage}.batch_size={self.batch_size}"]
        if stage != "pretrain":
            words += [f"{stage}.sink_range=[4,4]", f"{stage}.multiple_of=1"]
            words += [f"{stage}.window_range=[{self.window},{self.window}]"]
            words += [f"{stage}.chunk_range=[{self.chunk},{self.chunk}]"]
        return [*words, *self.words]


def base_folder(folder: Path, case: Case) -> Path:
    """A Hugging Face folder with the case's base model, made where it is not there yet."""
    sizes = "-".join(f"{key}{value}" for key, value in case.sizes) or "base"
    path = folder / "models" / sizes
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_hf_dir(path, case.base, model_to_hf(build_model(case.base)))
        destroy_model_parallel()
    return path


def predict(case: Case, folder: Path, gpu: str = "cpu") -> Memory:
    """What `stage=plan` says of the fullest rank."""
    config = compose([*case.overrides(folder), "stage=plan", f"plan.gpu={gpu}"])
    (work,) = find_work(config, case.base)
    layout = configured(config, work)
    splits = check(config, work, layout)
    import torch

    dtype = choose_dtype(config.parallel, torch.device(GPUS[gpu].device))
    name = str(dtype).removeprefix("torch.")
    return estimate_memory(work, layout, splits, plan=config.plan, dtype=name)


def measure(case: Case, folder: Path) -> int:
    """Most bytes of the fullest rank of a real training, beyond those before the model was built.

    glibc keeps memory that is freed, below a size that grows: a fixed small one gives it back.
    What is no tensor counts too: Python's notes of what to recompute, a hundred for each chunk.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "16384",
        "MALLOC_TRIM_THRESHOLD_": "16384",
        "MALLOC_ARENA_MAX": "1",
    }
    words = case.overrides(folder)
    shutil.rmtree(folder / case.name, ignore_errors=True)  # a finished stage would be skipped
    out = folder / f"{case.name}.memory"
    alone = ["parallel.tp=1", "parallel.sp=false", "parallel.cp=1"]
    prepare = [sys.executable, "-m", "pipeline.run", "stage=prepare", *words, *alone]
    launcher = [sys.executable]
    if case.num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={case.num_ranks}"]
        launcher += [f"--master-port={_free_port()}"]
    script = str(Path(__file__).with_name("measured_run.py"))
    train = [*launcher, script, str(out), f"stage={case.stage}", *words]
    for command in (prepare, train):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    found = [json.loads(path.read_text()) for path in out.parent.glob(out.name + ".*.json")]
    assert len(found) == case.num_ranks
    return max(values["peak_bytes"] for values in found)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port


LARGE = (("hidden_size", 512), ("num_layers", 12), ("intermediate_size", 2048))
"""Changes of `BASE` with 45 M parameters: weights and optimizer are what counts."""

CASES: tuple[Case, ...] = (
    Case(name="distil"),
    Case(name="distil_recompute", length=16384, words=("parallel.recompute=true",)),
    Case(name="distil_two_rows", length=2048, batch_size=2),
    Case(name="distil_two_passes", batch_size=2, words=("convert.micro_batch_size=1",)),
    Case(name="mamba2", words=("mixer.branch=mamba2",)),
    Case(
        name="long_logits",
        length=16384,
        chunk=256,
        sizes=(("hidden_size", 128), ("num_layers", 2), ("vocab_size", 32768)),
        words=("parallel.recompute=true", "convert.logits_elements=67108864"),
    ),
    Case(name="align", stage="align"),
    Case(name="pretrain", stage="pretrain", length=512, sizes=LARGE),
    Case(name="sft_all", stage="sft", length=512, sizes=LARGE, words=("sft.train=all",)),
    *(
        Case(
            name=f"zero{zero}",
            stage="pretrain",
            num_ranks=2,
            length=512,
            batch_size=2,
            sizes=LARGE,
            words=(f"parallel.zero_stage={zero}",),
        )
        for zero in (0, 1, 2, 3)
    ),
    Case(name="tp2", num_ranks=2, words=("parallel.tp=2",)),
    Case(name="tp2_sp", num_ranks=2, words=("parallel.tp=2", "parallel.sp=true")),
    Case(name="cp2", num_ranks=2, length=8192, words=("parallel.cp=2",)),
    Case(
        name="cp4",
        num_ranks=4,
        length=16384,
        chunk=256,
        words=("parallel.cp=4", "parallel.recompute=true"),
    ),
    Case(
        name="cp2_a2a",
        num_ranks=2,
        length=16384,
        chunk=512,
        words=("parallel.cp=2", "parallel.cp_mode=a2a", "parallel.recompute=true"),
    ),
)


def main() -> None:
    """Print the table."""
    folder, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    print("| case | predicted (MiB) | measured (MiB) | ratio | highest at |")
    print("|---|---:|---:|---:|---|")
    for case in CASES:
        if names and case.name not in names:
            continue
        memory = predict(case, folder)
        real = measure(case, folder)
        parts = f"{memory.peak / 2**20:,.0f} | {real / 2**20:,.0f} | {memory.peak / real:.2f}"
        print(f"| {case.name} | {parts} | {memory.when} |", flush=True)


if __name__ == "__main__":
    main()
