"""Configuration of data preparation: frozen dataclasses, the `data` section of a run.

Types are such that OmegaConf's structured configurations take them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.settings import (
    LOSSES,
    ChatConfig,
    DecontaminateConfig,
    DedupConfig,
    FilterConfig,
    check_choice,
    config_hash,
    to_dict,
)
from data_prep.words import RECALL_KEYS

Layout = Literal["far", "mixed", "dense"]
FILE_KINDS = ("text", "markdown", "python_packages")
RECORD_KINDS = ("jsonl", "parquet", "dataset")
CHAT_KINDS = tuple(f"chat_{kind}" for kind in RECORD_KINDS)
GENERATED_KINDS = ("recall", "demo_chat", "repeats")
SOURCE_KINDS = (*FILE_KINDS, *RECORD_KINDS, *CHAT_KINDS, *GENERATED_KINDS)
FILLER_KINDS = (*FILE_KINDS, *RECORD_KINDS)
TEXT_FIELDS = ("text", "id")
CHAT_FIELDS = (
    *("id", "messages", "conversations", "role", "content"),
    *("document", "question", "answer"),
)
ROLES = ("system", "user", "assistant")
FILE_ORDERS = ("hashed", "sorted")
PACKINGS = ("best_fit", "none")
LONG_DOCUMENTS = ("split", "truncate", "drop")
RUNTIME_FIELDS = (
    *("dir", "num_processes", "num_workers", "worker_rank", "wait_s", "keep_work"),
    "max_bad_fraction",
)
"""Fields of `PrepareConfig` that decide place, speed and what stops the job, and no byte of a
shard: with another value finished work is kept."""


def _check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise ValueError(
            f"{name}={tuple(value)} must be (min, max) with {low} <= min <= max <= {high}; "
            f"correct data.recall.{name}"
        )


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """What recall documents look like."""

    num_facts: tuple[int, int] = (4, 8)
    """Facts per document, drawn uniformly from (min, max)."""
    num_queries: tuple[int, int] = (2, 4)
    """Questions per `far` document; never more than its facts."""
    min_distance: int = 256
    """`far`: at least so many tokens from the fact's value to the answer."""
    fact_region: float = 0.5
    """`far`: facts lie in the first share of the document (less if min_distance asks for it)."""
    query_region: float = 0.2
    """`far`: questions lie in the last share of the document."""
    filler_fraction: tuple[float, float] = (0.3, 0.8)
    """`mixed`: share of the tokens that is filler; the rest are facts and questions."""
    dense_facts: tuple[int, int] = (4, 16)
    """`dense`: pairs in the dictionary."""
    repeat_length: tuple[int, int] = (4, 20)
    """`repeats` sources: tokens of the segment that is said again and again."""
    far_weight: float = 1.0
    mixed_weight: float = 0.0
    dense_weight: float = 0.0
    """Shares of the layouts among documents; they need not sum to one."""
    loss_on: str = "answers"
    """`answers`: only answer tokens are loss targets; `all`: every token but the first."""
    separator: str = " ->"
    """Between key and value; empty puts the value right after the key: easiest to learn."""

    def __post_init__(self) -> None:
        _check_range("num_facts", self.num_facts, 1, len(RECALL_KEYS))
        _check_range("num_queries", self.num_queries, 1, len(RECALL_KEYS))
        _check_range("dense_facts", self.dense_facts, 1, len(RECALL_KEYS))
        _check_range("repeat_length", self.repeat_length, 1, 2**20)
        _check_range("filler_fraction", self.filler_fraction, 0.0, 0.95)
        for name in ("fact_region", "query_region"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]")
        if self.min_distance < 1:
            raise ValueError(f"min_distance={self.min_distance} must be at least 1")
        weights = self.layout_weights
        if any(w < 0 for w in weights.values()) or sum(weights.values()) <= 0:
            raise ValueError(f"layout weights {weights} must be >= 0 and not all zero")
        if self.loss_on not in ("answers", "all"):
            raise ValueError(f"loss_on={self.loss_on!r} must be 'answers' or 'all'")

    @property
    def layout_weights(self) -> dict[Layout, float]:
        """Weight of each layout, in a fixed order."""
        return {"far": self.far_weight, "mixed": self.mixed_weight, "dense": self.dense_weight}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents."""

    kind: str = "text"
    """A document a file: `text` (any files), `markdown` (.md, .markdown), `python_packages` (.py
    files of installed packages). Records with a text: `jsonl` (lines, or .json with one array; also
    .gz, .xz, .zst), `parquet`, `dataset` (Hugging Face, by name or local folder). Records with a
    conversation: `chat_jsonl`, `chat_parquet`, `chat_dataset`. Generated: `recall`, `demo_chat`,
    `repeats`."""
    name: str = ""
    """Name in the manifest and for mixture weights; the kind where empty."""
    path: str | None = None
    """File, folder, glob or fsspec URL; for `dataset` a name on the hub or a folder (or for the
    filler, see `filler`)."""
    eval_path: str | None = None
    """Text of the eval split; without it `eval_fraction` of the documents is held out by hash."""
    pattern: str = "*"
    """Names to take when `path` is a folder, searched recursively."""
    packages: tuple[str, ...] = ()
    """Installed import packages for `python_packages` (train split)."""
    eval_packages: tuple[str, ...] = ()
    """Packages of the eval split; without them whole packages are held out by hash."""
    filler: str = "python_packages"
    """`recall`, `demo_chat`: kind of the text (named by the fields above) between the facts."""
    max_filler_tokens: int = 1_000_000
    """`recall`, `demo_chat`: tokenize no more filler than this."""
    file_order: str = "hashed"
    """`text`, `python_packages`: `hashed` (by name) mixes folders and packages, so that the part
    that is read, where not all is needed, is like the whole; or `sorted`."""
    text_field: str = "text"
    """Records: the field that holds the text."""
    id_field: str = "id"
    """Records: the field that holds a name; file and line serve where it is missing."""
    fields: dict[str, str] = field(default_factory=dict)
    """Records: what fields are called, such as {text: body, id: meta.uid}; dots lead into nested
    records. Known: text, id (and win over text_field, id_field); for conversations messages,
    conversations, role, content, document, question, answer."""
    roles: dict[str, str] = field(default_factory=dict)
    """Conversations: further names of roles, such as {narrator: system}."""
    subset: str | None = None
    """`dataset`: its configuration, where it has several."""
    revision: str | None = None
    """`dataset`: commit on the hub; without it a later run may read other text."""
    dataset_split: str = "train"
    """`dataset`: which of its splits to read."""
    eval_dataset_split: str | None = None
    """`dataset`: the same for the eval split; without it (and eval_path) documents are held out."""
    unit_bytes: int = 64 * 2**20
    """Files are read in pieces of about this size, small files together; documents of a file that
    is cut are named by byte offset where they have no id."""
    max_record_bytes: int = 64 * 2**20
    """A record or text file of more bytes is left out and counted, without being held in memory."""
    long_documents: str = "split"
    """Text beyond the length of a sample (or of `lengths`): `split` into windows of that length,
    one after the other, each a document of its own; `truncate`: the first window alone; `drop`.
    Conversations have `chat.too_long` instead."""
    min_tail: int = 1
    """`split`: a last window of fewer tokens is dropped and counted."""
    lengths: dict[str, float] = field(default_factory=dict)
    """Longest document in tokens, by shares of the documents, such as {4096: 1, 24576: 3}: each is
    cut at a length that its id draws, and samples of seq_length hold several, divided by
    `cu_seqlens`. Empty: seq_length for all."""
    weight: float = 1.0
    """Share of the split's samples where their number is given."""
    eval_weight: float | None = None
    """The same for the eval split; None: as `weight`, 0: none of this source."""
    max_documents: int | None = None
    """Read no more documents than this (for each split)."""
    max_characters: int | None = None
    """Read no more text than this (for each split); the document that goes beyond is the last."""
    recall: RecallConfig = field(default_factory=RecallConfig)
    """What `recall` and `demo_chat` documents look like."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """How read documents are cleaned and which are kept."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """How conversations become samples."""
    loss: str = "auto"
    """Loss targets of read documents: `all` tokens, `response` (conversations: the assistant's
    words and what ends them), `beyond` (those of the two that `auto` takes, but only from token
    `min_distance` of the sample's document on); `auto`: `response` for conversations, else
    `all`."""
    min_distance: int = 0
    """`beyond`: so many tokens of each document of a sample carry no loss; set it to the window."""

    def __post_init__(self) -> None:
        for name in ("packages", "eval_packages"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.name:
            object.__setattr__(self, "name", self.kind)
        check_choice("kind", self.kind, SOURCE_KINDS)
        check_choice("filler", self.filler, FILLER_KINDS)
        check_choice("file_order", self.file_order, FILE_ORDERS)
        reads = self.read_kind
        if reads == "python_packages" and not self.packages:
            raise ValueError(f"source {self.name}: packages is empty; name installed packages")
        if reads != "python_packages" and not self.path:
            raise ValueError(f"source {self.name}: path is missing; name a file, folder or glob")
        self._check_reading(reads)
        if shared := set(self.packages) & set(self.eval_packages):
            raise ValueError(
                f"source {self.name}: packages and eval_packages share {sorted(shared)}; "
                "held-out text must not be trained on, remove them from one"
            )
        if self.weight <= 0:
            raise ValueError(f"source {self.name}: weight={self.weight} must be above 0")
        if self.eval_weight is not None and self.eval_weight < 0:
            raise ValueError(
                f"source {self.name}: eval_weight={self.eval_weight} must not be negative"
            )
        self._check_lengths()
        for name in (
            *("max_documents", "max_characters", "max_filler_tokens", "max_record_bytes"),
            "min_tail",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"source {self.name}: {name}={value} must be at least 1")

    def _check_lengths(self) -> None:
        check_choice("long_documents", self.long_documents, LONG_DOCUMENTS)
        object.__setattr__(self, "lengths", {str(n): share for n, share in self.lengths.items()})
        for length, share in self.lengths.items():
            if not length.isdecimal() or int(length) < 8 or not share > 0:
                raise ValueError(
                    f"source {self.name}: lengths {{{length}: {share}}} must be a number of tokens "
                    "(8 or more) and a share above 0; write {4096: 1, 24576: 3}"
                )
        if self.kind in (*CHAT_KINDS, *GENERATED_KINDS) and (
            self.lengths or self.long_documents != "split" or self.min_tail != 1
        ):
            raise ValueError(
                f"source {self.name}: lengths, long_documents and min_tail are for text; "
                f"kind={self.kind} has none to cut, leave them out"
            )

    def _check_reading(self, reads: str) -> None:
        """Rules about how text is read; `reads` is the kind that is, of the filler if generated."""
        if self.unit_bytes < 1024:
            raise ValueError(
                f"source {self.name}: unit_bytes={self.unit_bytes} must be at least 1024"
            )
        known = CHAT_FIELDS if reads in CHAT_KINDS else TEXT_FIELDS
        for name, where in self.fields.items():
            if name not in known or not where:
                raise ValueError(
                    f"source {self.name}: fields {{{name}: {where}}} is not known; "
                    f"{reads} has {', '.join(known)}"
                )
        for name, role in self.roles.items():
            if role not in ROLES:
                raise ValueError(
                    f"source {self.name}: roles {{{name}: {role}}} must name one of "
                    f"{', '.join(ROLES)}"
                )
        check_choice("loss", self.loss, LOSSES)
        if self.loss == "response" and self.kind not in CHAT_KINDS:
            raise ValueError(
                f"source {self.name}: loss=response needs conversations; kind={self.kind} has "
                "none, set loss=all"
            )
        if self.min_distance < 0 or (self.loss == "beyond") != (self.min_distance > 0):
            raise ValueError(
                f"source {self.name}: loss={self.loss} with min_distance={self.min_distance}; "
                "loss=beyond needs min_distance above 0, others 0"
            )
        if self.generated and (self.loss != "auto" or self.filters != FilterConfig()):
            raise ValueError(
                f"source {self.name}: loss and filters are for text that is read; "
                f"{self.kind} is generated, leave them out (see recall.loss_on)"
            )

    @property
    def generated(self) -> bool:
        """Whether documents are made up by number rather than read."""
        return self.kind in GENERATED_KINDS

    @property
    def read_kind(self) -> str:
        """The kind of text that is read: of the filler where documents are generated."""
        return self.filler if self.generated else self.kind

    @property
    def needs_response(self) -> bool:
        """Whether a conversation without a response is no record of this source."""
        return True

    @property
    def sample_kind(self) -> str:
        """`text`, `recall`, `repeat` or `chat`, as samples name it."""
        if self.kind in ("recall", "repeats"):
            return self.kind.removesuffix("s")
        return "chat" if self.kind in (*CHAT_KINDS, "demo_chat") else "text"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """All that decides the bytes of the shards, beside the tokenizer and the sources' text."""

    tokenizer: str = ""
    """Folder with tokenizer.json, or a .gguf file."""
    seq_length: int = 1024
    """Tokens per sample."""
    sources: list[SourceConfig] = field(default_factory=list)
    train_samples: int | None = None
    """Samples of the train split, shared by the sources' weights; no more text is read than they
    need. None: all text once (then no generated sources)."""
    eval_samples: int | None = None
    """Samples of the eval split."""
    eval_fraction: float = 0.02
    """Share of read documents (packages) held out where no eval_path or eval_packages is given."""
    packing: str = "best_fit"
    """`best_fit`: short documents and tails share a sample, with cu_seqlens; `none`: one document a
    sample, pieces shorter than seq_length are dropped and counted."""
    samples_per_shard: int = 512
    seed: int = 0
    max_bad_fraction: float = 0.01
    """More unreadable documents than this share stop the job."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Removal of duplicates over all sources that are read."""
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    """Removal of text that stands in evaluation sets."""
    dir: str | None = None
    """Where the shards go: a folder or an fsspec URL such as s3://bucket/corpus; default: the
    stage's folder, which keeps manifest and work files in any case."""
    num_processes: int = 0
    """Processes on this machine; 0: as many as cores, at most 8, and one for little text."""
    num_workers: int = 1
    """Separate calls of stage=prepare that share the work over one file system, as in a Slurm
    array; above 1 only with stage=prepare. Samples and shards are the same for any number."""
    worker_rank: int = 0
    """Which of them this call is: 0 … num_workers - 1."""
    wait_s: float = 3600.0
    """Seconds that a worker waits for the others' work without seeing any of it grow; then it
    ends and names the workers that are missing. 0: it does its own part and does not wait."""
    keep_work: bool = False
    """Keep the tokenized documents (`work/`) once all shards are written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", list(self.sources))
        if self.seq_length < 8:
            raise ValueError(f"seq_length={self.seq_length} must be >= 8; raise data.seq_length")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={self.samples_per_shard} must be at least 1")
        for name in ("eval_fraction", "max_bad_fraction"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("train_samples", "eval_samples"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        check_choice("packing", self.packing, PACKINGS)
        self._check_workers()
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names {names} must differ; give data.sources[i].name")
        for source in self.sources:
            if any(int(length) > self.seq_length for length in source.lengths):
                raise ValueError(
                    f"source {source.name}: lengths {[*source.lengths]} go beyond "
                    f"seq_length={self.seq_length}; raise data.seq_length or leave them out"
                )
            if source.lengths and self.packing == "none":
                raise ValueError(
                    f"source {source.name}: lengths need samples that hold several documents; set "
                    "data.packing=best_fit"
                )

    def _check_workers(self) -> None:
        if self.num_processes < 0:
            raise ValueError(f"num_processes={self.num_processes} must be at least 0")
        if not 0 <= self.worker_rank < self.num_workers:
            raise ValueError(
                f"worker_rank={self.worker_rank} with num_workers={self.num_workers}: ranks run "
                "from 0 to num_workers - 1; correct data.worker_rank"
            )
        if self.wait_s < 0:
            raise ValueError(f"wait_s={self.wait_s} must be at least 0")

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all but the tokenizer's path (the manifest holds its hash)."""
        return config_hash({**self.contents(), "tokenizer": None})

    def contents(self) -> dict[str, Any]:
        """What decides the shards' bytes, as plain JSON types: all but `RUNTIME_FIELDS`."""
        plain = to_dict(self)
        return {name: value for name, value in plain.items() if name not in RUNTIME_FIELDS}
