"""The layouts that the job scripts and recipes name fit the GPUs that they ask for."""

from __future__ import annotations

import re

import pytest

from allmem_megatron.parallel import destroy_model_parallel
from pipeline.config import compose
from pipeline.planning.plan import make_plan
from tests.slurm.cluster import ROOT

NODES_64 = ["parallel=cp8_a2a", "plan.num_gpus=64"]


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=qwen3_8b", "plan.num_gpus=8"],
        ["recipe=qwen3_8b", *NODES_64],
        pytest.param(["recipe=qwen3_1_7b", "plan.num_gpus=8"], marks=pytest.mark.slow),
        pytest.param(["recipe=qwen3_0_6b", "plan.num_gpus=8"], marks=pytest.mark.slow),
    ],
    ids=["8b-8", "8b-64", "1.7b-8", "0.6b-8"],
)
def test_the_layouts_of_the_scripts_fit_80_gb(words: list[str]) -> None:
    destroy_model_parallel()  # another test of this process may have made a world of one rank
    plan = make_plan(compose([*words, "plan.gpu=h100", "plan.search=false"]), lambda *_: None)
    assert not plan.refusals
    convert = next(stage for stage in plan.stages if stage.work.entry == "convert")
    assert convert.memory is not None
    assert convert.memory.total < 0.75 * convert.memory.capacity


def test_the_8b_script_asks_for_the_gpus_of_its_layouts() -> None:
    text = (ROOT / "slurm" / "convert_qwen3_8b.sh").read_text()
    assert re.search(r"^#SBATCH --gpus-per-node=8$", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --nodes=1$", text, re.MULTILINE)
    assert "sbatch --nodes=8 slurm/convert_qwen3_8b.sh " + NODES_64[0] in text
