"""Training through the Hugging Face model: loss, gradients, packed documents, checkpointing."""

import pytest
import torch
from torch.nn import functional as F

from allmem_hf.configuration_allmem import AllMemConfig
from allmem_hf.modeling_allmem import AllMemForCausalLM


@pytest.mark.parametrize("branch", ["allmem", "mamba2", "none"])
def test_loss_is_the_mean_next_token_cross_entropy(tiny, tokens, branch):
    model, ids = tiny(branch), tokens(2, 17)
    labels = ids.clone()
    labels[:, :5] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, 4:-1].flatten(0, 1), labels[:, 5:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_trainer_s_count_of_targets_divides_the_loss(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    mean = model(ids, labels=ids).loss
    count = torch.tensor(32)
    torch.testing.assert_close(
        model(ids, labels=ids, num_items_in_batch=count).loss, mean * 16 / 32
    )


def test_padded_rows_train_as_they_do_alone(tiny, tokens):
    model = tiny()
    rows = [tokens(1, 15), tokens(1, 6, seed=2)]
    total = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows)
    ids = torch.cat([rows[0], torch.cat([torch.zeros(1, 9, dtype=torch.long), rows[1]], 1)])
    loss = model(ids, attention_mask=(ids != 0).long(), labels=ids).loss
    torch.testing.assert_close(loss, total / (14 + 5))


@pytest.mark.parametrize("branch", ["allmem", "mamba2", "none"])
def test_packed_documents_equal_documents_alone(tiny, tokens, branch):
    model = tiny(branch)
    documents = [tokens(1, length, seed=length) for length in (7, 1, 16)]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    output = model(packed, position_ids=positions, labels=packed, use_cache=False)
    alone = torch.cat([model(d, use_cache=False).logits for d in documents], 1)
    torch.testing.assert_close(output.logits, alone, atol=1e-4, rtol=1e-5)
    targets = [F.pad(d[0, 1:], (0, 1), value=-100) for d in documents]
    expected = F.cross_entropy(alone[0], torch.cat(targets))
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(packed, position_ids=positions, use_cache=True)


def test_gradient_checkpointing_gives_the_same_gradients(tiny, tokens):
    ids = tokens(2, 17)
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(ids, labels=ids)
        assert output.past_key_values is None
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_labels_and_partial_logits_do_not_mix(tiny, tokens):
    ids = tokens(1, 9)
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        tiny()(ids, labels=ids, logits_to_keep=1)


def test_bfloat16_runs_and_stays_near_float32(tiny, tokens):
    model, ids = tiny(), tokens(2, 41)
    with torch.no_grad():
        wide = model(ids).logits
        narrow = model.to(torch.bfloat16)(ids)
        new = model(tokens(2, 3), past_key_values=narrow.past_key_values).logits
    assert new.isfinite().all()
    layer = narrow.past_key_values.layers[0]
    assert layer.tensors["weights_gate"].dtype == torch.float32
    assert layer.tensors["keys"].dtype == torch.bfloat16
    assert (narrow.logits.float() - wide).norm() < 0.2 * wide.norm()


def test_new_models_start_as_the_training_program_s_do():
    config = {"hidden_size": 256, "memory_size": 256, "intermediate_size": 64, "vocab_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8}
    for branch in ("allmem", "mamba2"):
        memory = AllMemForCausalLM(AllMemConfig(branch=branch, **config)).model.layers[0].memory
        for proj in (memory.q_proj, memory.k_proj, memory.v_proj):
            assert proj.weight.std().item() == pytest.approx(1 / 16, rel=0.05)
        assert memory.o_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    rate, dt = memory.a_log.exp(), F.softplus(memory.dt_proj.bias)
    assert ((rate >= 1) & (rate <= 16)).all()
    assert rate.std() > 0
    assert ((dt > 0.99e-3) & (dt < 0.101)).all()
    assert dt.std() > 0
    assert memory.dt_proj.weight.std().item() == pytest.approx(0.1 / 16, rel=0.1)
