"""One run of the model benchmark: which figures are due, and how each is measured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, model_training
from benchmarks.measure import Ceilings, Stopwatch, Timing, Work, summary
from benchmarks.model_cases import (
    ConstantReader,
    FullReader,
    Reader,
    build,
    check_error,
    fastest_backend,
    make_reader,
)
from benchmarks.rows import Results, Row, failed, measured, missing, refused
from benchmarks.shapes import SHAPES, Shape
from pipeline.costs import cache_bytes

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
STEPS = 16
"""Tokens that are decoded in one timed call."""
LONG_PREFILL = 32768
"""Above it only one row is read, and then repeated for the batch."""


@dataclass(kw_only=True)
class Bench:
    """One run of the benchmark."""

    given: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    results: Results
    begin: float

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.device)
        self._errors: dict[tuple[str, str, bool, bool], float] = {}
        self._backends: dict[str, Any] = {}
        self._model: tuple[tuple[str, str], Any] | None = None

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.given.budget_s - (time.monotonic() - self.begin)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def case(self, op: str, shape: Shape, mixer: str, tokens: int, batch: int) -> Row:
        """What all rows have."""
        return {
            "group": f"{op}/{shape.name}/T={tokens}/B={batch}",
            "op": op,
            "shape": shape.name,
            "mixer": mixer,
            "tokens": tokens,
            "batch": batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "window_size": shape.window_size,
            "num_sinks": shape.num_sinks,
            "chunk_size": shape.chunk_size,
        }

    def run(self, shape: Shape, mixer: str, tokens: int) -> None:
        """Everything of one group that `results` has not yet."""
        if mixer == "training":
            model_training.run(self, shape, tokens)
            return
        batches = [b for b in self.given.batches if b == 1 or tokens <= LONG_PREFILL]
        cases = [self.case("prefill", shape, mixer, tokens, batch) for batch in batches]
        batches = self.decode_batches(shape, tokens)
        cases += [self.case("decode", shape, mixer, tokens, batch) for batch in batches]
        cases = [case for case in cases if not self.is_done(case)]
        if not cases:
            return
        if self.left_s < 0:
            for case in cases:
                why = f"--budget-s={self.given.budget_s:g} was over"
                self.results.add(missing(case, mixer, why))
            return
        try:
            error, bound = self.error(shape, mixer), BOUNDS[self.dtype]
        except Exception as found:  # noqa: BLE001  # printed, and in the exit status
            for case in cases:
                self.results.add(failed(case, mixer, found))
            return
        for case in cases:
            if not error <= bound:
                self.results.add(refused(case, mixer, error, bound))
        if not error <= bound:
            return
        more = {"error": error, "error_bound": bound}
        reader = make_reader(
            self.model(shape, mixer), mixer, self.given.piece, self.backend(shape, mixer)
        )
        reading = [case for case in cases if case["op"] == "prefill"]
        writing = [case for case in cases if case["op"] == "decode"]
        one_row_read = False
        # batch 1 last: decoding goes on from its state
        for case in sorted(reading, key=lambda case: -case["batch"]):
            work = floors.prefill(shape, mixer, case["batch"], tokens, self.dtype.itemsize)
            done = self.guarded(case, work, lambda c=case: self.prefill(c, reader, more))
            one_row_read = done and case["batch"] == 1
        for case in sorted(writing, key=lambda case: case["batch"]):
            work = floors.decode(shape, mixer, case["batch"], tokens, self.dtype.itemsize)
            self.guarded(
                case, work, lambda c=case, seen=one_row_read: self.decode(c, reader, seen, more)
            )
            one_row_read = False

    def is_done(self, case: Row) -> bool:
        """Whether an earlier run has measured or refused it, the CUDA graphs of a step too."""
        names = [case["mixer"], *self.graph_names(case)]
        return all(self.results.has(case["group"], name) for name in names)

    def decode_batches(self, shape: Shape, tokens: int) -> list[int]:
        """Those asked for; 4 too where eight rows of full attention do not fit the device."""
        batches = list(self.given.batches)
        if self.cuda and 8 in batches and 4 not in batches:
            most = torch.cuda.get_device_properties(self.device).total_memory
            held = 8 * cache_bytes("full", shape.mixer, tokens, element_bytes=self.dtype.itemsize)
            if held > 0.9 * most:
                batches.append(4)
        return batches

    def guarded(self, case: Row, work: Work, measure: Callable[[], None]) -> bool:
        """Measures unless there is no time; a lack of memory is a row too. Whether it was."""
        floor, _ = work.floor(self.ceilings)
        calls = STEPS if case["op"] == "decode" else 1
        if floor * calls * 1.5 > self.left_s:
            why = f"needs {floor * calls:.0f} s by its floor and {max(self.left_s, 0):.0f} s of "
            name = case.get("name", case["mixer"])
            self.results.add(missing(case, name, why + "--budget-s were left"))
            return False
        try:
            measure()
        except Exception as error:  # noqa: BLE001  # printed, and in the exit status
            self.results.add(failed(case, case.get("name", case["mixer"]), error))
            if self.cuda:
                torch.cuda.empty_cache()
            return False
        return True

    def error(
        self, shape: Shape, mixer: str, *, graph: bool = False, compiled: bool = False
    ) -> float:
        """Of two layers of the shape; of a wrong output where the mixer is to be spoiled."""
        key = shape.name, mixer, graph, compiled
        if key not in self._errors:
            how = {"times": 1.1 if mixer == self.given.spoil else 1.0, "compiled": compiled}
            self._errors[key] = check_error(
                shape, mixer, self.device, self.dtype, graph=graph, **how
            )
        return self._errors[key]

    def model(self, shape: Shape, mixer: str) -> Any:
        """The model; the last one is kept. `full` and `swa` share one."""
        key = shape.name, "none" if mixer in ("full", "swa") else mixer
        if self._model is None or self._model[0] != key:
            self.drop_model()
            self._model = (key, build(shape, mixer, self.device, self.dtype))
        return self._model[1]

    def drop_model(self) -> None:
        """Gives its memory back."""
        self._model = None
        torch._dynamo.reset()  # PyTorch stops compiling a function at its eighth shape
        if self.cuda:
            torch.cuda.empty_cache()

    def backend(self, shape: Shape, mixer: str) -> Any:
        """The fastest attention kernel for `full`."""
        if mixer != "full":
            return None
        if shape.name not in self._backends:
            self._backends[shape.name] = fastest_backend(shape, self.watch, self.dtype)
        return self._backends[shape.name]

    def tokens(self, shape: Shape, batch: int, num: int) -> Tensor:
        """Random ids."""
        return torch.randint(0, shape.vocab_size, (batch, num), device=self.device)

    def peak(self) -> int | None:
        """Most bytes that were allocated since the last call; None on a CPU."""
        if not self.cuda:
            return None
        found = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return found

    def prefill(self, case: Row, reader: Reader, more: Row) -> None:
        """Reads the whole text: the first time counts where it takes long."""
        shape, tokens, batch = SHAPES[case["shape"]], case["tokens"], case["batch"]
        ids = self.tokens(shape, batch, tokens)
        reader.start(batch, tokens + STEPS * 64)
        reader.feed(ids[:, : min(tokens, 2 * self.given.piece)])  # kernels are compiled here
        self.peak()
        lasted: list[tuple[float, float | None]] = []
        while len(lasted) < 3 or (sum(s for s, _ in lasted) < 1 and len(lasted) < 15):
            reader.start(batch, tokens + STEPS * 64)
            lasted.append(self.watch.once(lambda: reader.feed(ids)))
            if sum(s for s, _ in lasted) > self.given.repeat_s:
                break
        work = floors.prefill(shape, case["mixer"], batch, tokens, self.dtype.itemsize)
        self.add(case, summary(lasted), work, {**more, "piece": self.given.piece}, reader)

    def decode(self, case: Row, reader: Reader, one_row_read: bool, more: Row) -> None:
        """Writes `STEPS` tokens some times over, greedily, each from the one before."""
        shape, tokens, batch = SHAPES[case["shape"]], case["tokens"], case["batch"]
        case = {**case, "new_tokens": 1, "graph": False}
        if isinstance(reader, FullReader):
            if not (one_row_read and batch == 1):
                self.room_for(reader, batch, tokens + STEPS * 64)
                reader.start(batch, tokens + STEPS * 64)
                reader.fill(tokens)
                more = {**more, "filled": "random keys and values, not a text that was read"}
        elif batch == 1 and not one_row_read:
            reader.start(1, 0)
            reader.feed(self.tokens(shape, 1, tokens))
        elif batch > 1:
            if reader.cache.batch_size != 1:
                reader.start(1, 0)
                reader.feed(self.tokens(shape, 1, tokens))
            reader.repeat(batch)
        self.write(case, reader, more)
        for name in self.graph_names(case):
            graphed = {**case, "graph": True, "name": name}
            work = floors.decode(shape, case["mixer"], batch, tokens, self.dtype.itemsize)
            self.guarded(graphed, work, lambda c=graphed: self.write_graphed(c, reader, more))

    def graph_names(self, case: Row) -> list[str]:
        """Rows of a decode case beside the plain step: as a CUDA graph, and compiled before.

        Only where the window is full, and compiled for the largest batch alone: it takes a minute.
        """
        full = case["mixer"] == "full" or case["op"] != "decode" or not self.cuda
        if full or case["tokens"] < case["window_size"] + case["num_sinks"]:
            return []
        names = [f"{case['mixer']}, CUDA graph"]
        if case["batch"] == max(self.given.batches):
            names.append(f"{case['mixer']}, CUDA graph, compiled")
        return names

    def write_graphed(self, case: Row, reader: Reader, more: Row) -> None:
        """The same with the step as a CUDA graph, which is checked on its own."""
        assert isinstance(reader, ConstantReader)
        shape, mixer, name = SHAPES[case["shape"]], case["mixer"], case["name"]
        bound, compiled = BOUNDS[self.dtype], name.endswith("compiled")
        error = self.error(shape, mixer, graph=True, compiled=compiled)
        if not error <= bound:
            self.results.add(refused(case, name, error, bound))
            return
        reader.record(compiled=compiled)
        self.write(case, reader, {**more, "error": error}, name)

    def write(self, case: Row, reader: Reader, more: Row, name: str = "") -> None:
        """Times the steps and adds the row."""
        shape, tokens, batch = SHAPES[case["shape"]], case["tokens"], case["batch"]
        current = self.tokens(shape, batch, 1)

        def steps() -> None:
            nonlocal current
            for _ in range(STEPS):
                current = reader.feed(current).argmax(-1, keepdim=True)

        steps()  # kernels are compiled here
        self.peak()
        lasted: list[tuple[float, float | None]] = []
        while len(lasted) < 5 or (sum(s for s, _ in lasted) < 1 and len(lasted) < 20):
            lasted.append(self.watch.once(steps))
            if len(lasted) >= 2 and sum(s for s, _ in lasted) > self.given.repeat_s:
                break
        each = [(s / STEPS, None if cpu is None else cpu / STEPS) for s, cpu in lasted]
        work = floors.decode(shape, case["mixer"], batch, tokens, self.dtype.itemsize)
        self.add(case, summary(each), work, more, reader, name)

    def room_for(self, reader: FullReader, batch: int, capacity: int) -> None:
        """Refuses keys and values that the device has no room for. Raises: OutOfMemoryError."""
        if not self.cuda:
            return
        reader.start(0, 0)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        wanted = reader.bytes_for(batch, capacity)
        if wanted > 0.95 * free:
            raise torch.OutOfMemoryError(
                f"keys and values of {wanted / 1e9:.0f} GB do not fit {free / 1e9:.0f} GB"
            )

    def add(
        self, case: Row, timing: Timing, work: Work, more: Row, reader: Reader, name: str = ""
    ) -> None:
        """The row of a figure; its name is the mixer's if none is given."""
        more = {**more, "cache_bytes": reader.cache_bytes, "peak_bytes": self.peak()}
        if isinstance(reader, FullReader):
            more["attention"] = str(reader.backend or "PyTorch's choice")
        name = name or case["mixer"]
        self.results.add(measured(case, name, timing, work, self.ceilings, **more))
