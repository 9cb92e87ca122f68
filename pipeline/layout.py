"""Whether a configuration's sizes split over the ranks that it asks for, before any work."""

from __future__ import annotations

import math

from allmem_megatron.config import BaseModelConfig
from pipeline.batches import split_over_ranks
from pipeline.config import split_entry
from pipeline.distributed import Ranks
from pipeline.lineage import data_entry, stored_length
from pipeline.schema import TRAINING_STAGES, RunConfig, section_of


def check_layout(config: RunConfig, base: BaseModelConfig, ranks: Ranks) -> None:
    """Refuse a layout over which the model, the sequences or the batches do not split.

    Args:
        config: the run's configuration.
        base: sizes of the base model.
        ranks: how many there are, and `tp` and `cp` of them.

    Raises:
        ValueError: naming the value, the rule and the nearest value that does.
    """
    _check_tensor_parallel(config, base)
    parallel = config.parallel
    for entry in _training_stages(config):
        name, settings = section_of(entry), config.train_settings(entry)
        phases = [settings.of_phase(number) for number in range(max(len(settings.phases), 1))]
        split_over_ranks(name, phases, ranks.dp_size)
        parts = parallel.cp * (parallel.tp if parallel.sp else 1)
        for phase in phases:
            length = phase.seq_length or stored_length(config, entry)
            if length % parts:
                shards = "data" if data_entry(entry) == "prepare" else "collect"
                key = f"{shards if phase.seq_length is None else name}.seq_length"
                by = "parallel.cp" + (" x parallel.tp (parallel.sp=true)" if parallel.sp else "")
                raise ValueError(
                    f"{name} would train on {length} tokens a sequence, which do not split over "
                    f"{by} = {parts} ranks; set {key}={-(-length // parts) * parts}"
                )


def _check_tensor_parallel(config: RunConfig, base: BaseModelConfig) -> None:
    tp, cp = config.parallel.tp, config.parallel.cp
    sizes = {
        "the base model's vocab_size": base.vocab_size,
        "the base model's num_kv_heads": base.num_kv_heads,
        "the base model's intermediate_size": base.intermediate_size,
    }
    names = {split_entry(entry)[0] for entry in _training_stages(config)}
    has_memory = bool({"align", "convert", "sft"} & names)
    heads = config.mixer.memory.heads(base) if has_memory else 0
    if has_memory:
        sizes["mixer.memory.num_heads"] = heads
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(
                f"{name}={size} does not split over parallel.tp={tp} ranks; set "
                f"parallel.tp={math.gcd(size, tp)} or another divisor of {size}"
            )
    if has_memory and cp > 1 and config.parallel.cp_mode == "a2a" and heads // tp % cp:
        raise ValueError(
            f"parallel.cp_mode=a2a gives each of parallel.cp={cp} ranks some of the {heads // tp} "
            f"memory heads that a tensor-parallel rank has, which do not split; set "
            f"parallel.cp_mode=wavefront or parallel.cp={math.gcd(heads // tp, cp)}"
        )


def _training_stages(config: RunConfig) -> list[str]:
    """Training entries that this call runs, one of each section."""
    wanted = config.stages if config.stage.name == "all" else (config.stage.name,)
    entries = [entry for entry in wanted if split_entry(entry)[0] in TRAINING_STAGES]
    return list({section_of(entry): entry for entry in reversed(entries)}.values())[::-1]
