"""Settings of `stage=evaluate`. Torch-free, so that the pipeline's schema can embed them."""

from __future__ import annotations

from dataclasses import dataclass

MIXERS: tuple[str, ...] = ("full", "swa", "mamba2", "allmem")
CONTROLS: tuple[str, ...] = ("memory_off", "write_off", "state_shuffled")
KINDS: tuple[str, ...] = ("text", "recall", "chat")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What `stage=evaluate` measures, and on what."""

    mixers: tuple[str, ...] = MIXERS
    """Token mixers put side by side on the same documents, in the table's order."""

    controls: tuple[str, ...] = CONTROLS
    """Controls of the `allmem` mixer: no memory output, no writes, another document's state."""

    kinds: tuple[str, ...] = ("text", "recall")
    """Kinds of held-out document that are read from `prepare/eval`."""

    window_size: int = 2048
    """W: keys that sliding-window attention sees, the query's own position included."""

    num_sinks: int = 128
    """s: first positions of a document that every query sees."""

    chunk_size: int = 1024
    """c: tokens the memory takes in by one write; at most W."""

    batch_size: int = 4
    """Equal-length documents a forward pass; at least 2 while `state_shuffled` is asked for."""

    max_samples: int = 64
    """Held-out documents of each kind, the longest and first ones of the shards; 0 takes all."""

    min_length: int = 0
    """Tokens that a document must have; 0 takes those longer than the window."""

    logits_rows: int = 1024
    """Positions whose logits are held at once; bounds memory to `logits_rows * vocabulary`."""

    num_bins: int = 16
    """About how many bins of position and of distance; their edges fall on multiples of W/k."""

    timing_repeats: int = 5
    """Timed prefills of each mixer; the median counts. 0 measures no speed."""

    timing_warmup: int = 1
    """Prefills of each mixer before the clock counts."""

    timing_batch_size: int = 1
    """Sequences in a timed prefill."""

    timing_length: int = 0
    """Tokens of a timed prefill; 0 takes the longest evaluated document's length."""

    cache_element_bytes: int = 2
    """Bytes of a cached key, value or pending-chunk element (2: bfloat16). W, M are float32."""

    long_context: int = 131072
    """The second document length, in tokens, at which cache bytes are given."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is out of range; the message names value, rule and mend.
        """
        _check_names("mixers", self.mixers, MIXERS)
        _check_names("controls", self.controls, CONTROLS)
        _check_names("kinds", self.kinds, KINDS)
        if not self.mixers:
            raise ValueError("eval.mixers is empty; name at least one of " + ", ".join(MIXERS))
        if not self.kinds:
            raise ValueError("eval.kinds is empty; name at least one of " + ", ".join(KINDS))
        for name in (
            *("window_size", "chunk_size", "batch_size", "logits_rows", "num_bins"),
            *("timing_batch_size", "cache_element_bytes", "long_context"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"eval.{name}={getattr(self, name)} must be at least 1; set eval.{name}=1"
                )
        for name in (
            *("num_sinks", "max_samples", "min_length"),
            *("timing_repeats", "timing_warmup", "timing_length"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"eval.{name}={getattr(self, name)} must not be negative; set eval.{name}=0"
                )
        if self.chunk_size > self.window_size:
            raise ValueError(
                f"eval.chunk_size={self.chunk_size} exceeds eval.window_size={self.window_size}: "
                "tokens would fall between window and memory; "
                f"set eval.chunk_size={self.window_size} or less"
            )
        if "state_shuffled" in self.controls and self.batch_size < 2:
            raise ValueError(
                f"eval.batch_size={self.batch_size} leaves no second document to take a state "
                "from; set eval.batch_size=2 or drop state_shuffled from eval.controls"
            )


def _check_names(field: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"eval.{field} has {name!r}; it knows only {', '.join(known)}")
    if len(set(names)) != len(names):
        raise ValueError(f"eval.{field}={list(names)} names one twice; name each once")
