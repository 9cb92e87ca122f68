"""What a training step computes, in FLOPs; a multiply-add is two.

Forward, a token: the token mixer (`pipeline.costs`, spec section 6) and the MLP's three matrices
(6 D F) in each layer, and 2 D V at a loss token. The backward pass costs as much again for the
gradients of activations, and as much again for those of weights that are trained. Embeddings,
norms and recomputation are left out.
"""

from __future__ import annotations

from allmem_megatron.config import BaseModelConfig, MemoryConfig, MixerSettings
from pipeline.costs import MixerShape, flops_per_token


def layer_flops(
    base: BaseModelConfig, memory: MemoryConfig | None, settings: MixerSettings, length: int
) -> tuple[float, float]:
    """Forward FLOPs a token of one layer: all of it, and the recurrent branch's part.

    Args:
        base: sizes of the base model.
        memory: sizes of the branch; None without one.
        settings: W, s, c and the mode.
        length: tokens of a sequence.
    """
    memory = memory or MemoryConfig()
    shape = MixerShape.of(
        base,
        memory_size=memory.memory_size,
        memory_heads=memory.num_heads,
        expansion=memory.expansion,
        conv_kernel=memory.conv_kernel,
        state_size=memory.state_size,
        window_size=settings.window_size,
        num_sinks=settings.num_sinks,
        chunk_size=settings.chunk_size,
    )
    mode = "allmem" if settings.mode == "align" else settings.mode
    mlp = 6.0 * base.hidden_size * base.intermediate_size
    branch = 0.0
    if mode in ("allmem", "mamba2"):
        branch = flops_per_token(mode, shape, length) - flops_per_token("swa", shape, length)
    if settings.mode == "align":
        return flops_per_token("full", shape, length) + mlp, branch
    return flops_per_token(mode, shape, length) + mlp, branch


def step_flops(
    stage: str,
    base: BaseModelConfig,
    memory: MemoryConfig | None,
    settings: MixerSettings,
    *,
    length: int,
    num_tokens: int,
    loss_tokens: int,
    trains_base: bool,
) -> float:
    """FLOPs of one optimizer step of a training stage, over all ranks.

    Args:
        stage: `pretrain`, `align`, `convert` or `sft`.
        base: sizes of the base model.
        memory: sizes of the branch; None without one.
        settings: the student's mixer of the step.
        length: tokens of a sequence.
        num_tokens: tokens of the step.
        loss_tokens: those whose logits are needed.
        trains_base: whether gradients of the base's weights are formed.
    """
    student, branch = layer_flops(base, memory, settings, length)
    teacher, _ = layer_flops(base, None, MixerSettings(mode="full"), length)
    head = 2.0 * base.hidden_size * base.vocab_size
    if stage == "align":
        return base.num_layers * num_tokens * (student + 3 * branch)
    token = 2 * student + (student if trains_base else branch)
    logits = head * (3 if trains_base else 2)
    if stage == "convert":
        token += teacher
        logits += head
    return base.num_layers * num_tokens * token + loss_tokens * logits
