"""What the report's page says in words."""

from __future__ import annotations

from typing import Any

import yaml

FOOTER = "Made by stage=prepare from manifest.json and the shards; it needs no network."
SOURCES = (
    "Documents were read, cleaned, tokenized and packed into samples of fixed length, which lie in "
    "shards. Training sees the split “train” only; “eval” is held out. “Loss” is the share of the "
    "text whose tokens a model is trained to predict; the rest it only reads. “Fill” is the share "
    "of the samples that is text; the rest is padding."
)
TOKENS_FIGURE = "Tokens of each source: those that training predicts, and those that are only read."
DROPPED = (
    "Each document that is not in the samples is counted here with the reason. A reason that takes "
    "more than you expect is worth a look at its examples; the setting is named beside it."
)
NOTHING_DROPPED = "Nothing: every document that could be read is in the samples."
KEPT_FIGURE = "What became of the documents of each source."
CUTS = "Documents that were kept but lost a passage:"
UNREADABLE = (
    "These could not be read and are in no sample. They belong to no split; where both splits are "
    "cut from the same files they are counted with “train”. More than the share that "
    "data.max_bad_fraction allows would have ended the job."
)
NOTHING_UNREADABLE = "None: every record and file could be read."
LENGTHS = (
    "Documents longer than a sample are cut into windows (data.sources[i].long_documents); shorter "
    "ones share samples, divided by borders that neither attention nor memory crosses."
)
LENGTHS_FIGURE = "Lengths of the training documents that were kept, by powers of two."
PACKING_FIGURE = "How full the samples are; a source of few samples cannot fill its last one."
SAMPLES = (
    "As training sees them, decoded from the shards. The bar above each is the whole sample: its "
    "documents side by side, green where tokens carry loss, hatched where it is padding."
)
FACTS = (
    "The same configuration, text and tokenizer give the same bytes on every machine; the loader "
    "compares each shard with its SHA-256 when it first opens it."
)


def as_yaml(config: dict[str, Any]) -> str:
    """The configuration to read, without what is empty."""
    return yaml.safe_dump(_without_empty(config), sort_keys=False, allow_unicode=True, width=100)


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (None, "", [], {}, ())}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value
