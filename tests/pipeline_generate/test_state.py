"""A state on disk goes on exactly where the document ended, or is refused."""

import json
import os
import resource
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from allmem_hf.state_allmem import fingerprint, load_state, save_state
from pipeline.generation import Generator, Reading
from tests.pipeline_generate.conftest import MODES


def kept(generator: Generator, path, document: list[int]) -> Reading:
    """The reading of a document after it has been on disk."""
    reading = generator.read(document)
    save_state(path, generator.model, reading.cache, reading.hidden, {"source": "a.txt"})
    state = load_state(path, generator.model)
    assert state.note == {"source": "a.txt"}
    return Reading(hidden=state.hidden, cache=state.cache)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3, 4, 7, 29])
def test_a_loaded_state_answers_as_the_whole_text_does(mode, length, model_of, draw, tmp_path):
    generator = Generator(model_of(mode), prefill_chunk=8)
    document, questions = draw(length), [draw(5), [], draw(11)]
    reading = kept(generator, tmp_path / "a.state", document)
    assert reading.num_tokens == length
    found = generator.generate(questions, max_new_tokens=9, starts=[reading] * 3)
    expected = generator.generate([document + question for question in questions], max_new_tokens=9)
    assert [row.tokens for row in found] == [row.tokens for row in expected]


def test_a_state_s_size_does_not_depend_on_the_text(model_of, draw, tmp_path):
    generator = Generator(model_of("allmem"))
    sizes = []
    for length in (40, 400):
        kept(generator, tmp_path / "a.state", draw(length))
        sizes.append((tmp_path / "a.state").stat().st_size)
    assert abs(sizes[0] - sizes[1]) <= 16  # digits of the header
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


def test_a_state_of_another_model_or_mixer_is_refused(model_of, draw, tmp_path):
    model, path = model_of("allmem"), tmp_path / "a.state"
    kept(Generator(model), path, draw(9))
    for changes, words in (
        ({"window_size": 8}, "window_size=6, the model has window_size=8"),
        ({"chunk_size": 3}, "chunk_size=4, the model has chunk_size=3"),
        ({"write_off": True}, "write_off=False, the model has write_off=True"),
    ):
        with pytest.raises(ValueError, match=words):
            load_state(path, model_of("allmem", **changes))
    with pytest.raises(ValueError, match="branch=allmem, the model has branch=mamba2"):
        load_state(path, model_of("mamba2"))
    other = model_of("allmem")
    assert fingerprint(other) == fingerprint(model)
    with torch.no_grad():
        other.model.layers[1].memory.alpha.add_(1e-3)
    with pytest.raises(ValueError, match="made by another model"):
        load_state(path, other)
    with pytest.raises(ValueError, match="made by another model or dtype"):
        load_state(path, model_of("allmem").to(torch.bfloat16))


def test_fingerprints_reach_the_last_element_of_large_weights():
    module = torch.nn.Module()
    module.register_buffer("weight", torch.zeros(2**25 + 3, dtype=torch.int8))
    before = fingerprint(module)
    module.weight[-1] = 1
    assert fingerprint(module) != before


def test_what_is_no_state_is_refused(model_of, draw, tmp_path):
    model, path = model_of("swa"), tmp_path / "a.state"
    with pytest.raises(ValueError, match="is not there"):
        load_state(path, model)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no memory state"):
        load_state(path, model)
    kept(Generator(model), path, draw(9))
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["allmem_state"])
    about["schema_version"] = 99
    save_file(load_file(path), path, metadata={"allmem_state": json.dumps(about)})
    with pytest.raises(ValueError, match="schema_version=99"):
        load_state(path, model)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_state(path, model)


def test_a_full_disk_leaves_the_older_state(model_of, draw, tmp_path):
    generator, path = Generator(model_of("allmem")), tmp_path / "a.state"
    kept(generator, path, draw(9))
    before = path.read_bytes()
    child = os.fork()
    if child == 0:  # files above 1 kB fail as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            kept(generator, path, draw(12))
        except OSError as error:
            os._exit(7 if "make room" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.state"]
