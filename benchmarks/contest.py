"""Several versions of one operation: each is checked, and timed only where it is right.

A version is checked on the call that is timed: its output's first tokens against a reference in
float64 on these tokens alone (the operations are causal), and the gradients of a loss of these
tokens. Buffers and inputs are the ones of the timed call, at its full length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Ceilings, Stopwatch, Work, relative_error
from benchmarks.rows import Results, Row, failed, measured, missing, refused

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Largest error of a single operation, by the dtype of its inputs."""
NEEDS_CUDA = "needs a CUDA device; interpreted on a CPU its speed says nothing"
Leaves = dict[str, Tensor]
Function = Callable[[Leaves], Tensor]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One version of an operation."""

    name: str
    run: Function
    """Leaves to the output `[B, T, ...]`."""
    reference: Function
    """The same in any dtype; called with float64."""
    work: Work
    bound: float
    """Largest error that is accepted, of the output and of every gradient."""
    check_tokens: int
    """First tokens that are checked."""
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    unavailable: str = ""
    """Why it cannot run here; empty where it can."""


@dataclass(kw_only=True)
class Contest:
    """Inputs, and the versions that get them."""

    case: Row
    leaves: Leaves
    along: frozenset[str]
    """Leaves with tokens in their second dimension."""
    wanted: tuple[str, ...] = ()
    """Leaves whose gradients are formed; none: forward only."""
    contenders: list[Contender] = field(default_factory=list)
    spoil: str = ""
    """Name of a version whose output is made wrong, to see that it is refused."""

    def run(self, watch: Stopwatch, ceilings: Ceilings, results: Results, budget_s: float) -> None:
        """Checks and times the versions that `results` has not yet, and adds their rows."""
        calls: dict[str, Callable[[], object]] = {}
        more: dict[str, Row] = {}
        for one in self.contenders:
            if results.has(self.case["group"], one.name):
                continue
            if one.unavailable:
                results.add(missing(self.case, one.name, one.unavailable))
                continue
            try:
                error = self.error_of(one)
                if not error <= one.bound:
                    results.add(refused(self.case, one.name, error, one.bound))
                    continue
                call, found = self.call_of(one), {"error": error, "error_bound": one.bound}
                if "triton" in one.name:
                    found["bit_equal"] = bit_equal(call)
                else:
                    call()  # what cannot be timed fails here, alone
            except Exception as wrong:  # noqa: BLE001  # printed, and in the exit status
                results.add(failed(self.case, one.name, wrong))
                continue
            calls[one.name], more[one.name] = call, found
        if not calls:
            return
        try:
            timings = watch.interleaved(calls, budget_s=budget_s, warmup=1)
        except Exception as wrong:  # noqa: BLE001  # so that the groups behind it are measured
            for name in calls:
                results.add(failed(self.case, name, wrong))
            return
        for one in self.contenders:
            if one.name in calls:
                timing = timings[one.name]
                row = measured(self.case, one.name, timing, one.work, ceilings, **more[one.name])
                results.add(row)

    def output(self, one: Contender, leaves: Leaves) -> Tensor:
        """What the version gives; made wrong where this was asked for."""
        out = one.run(leaves)
        return out * 1.1 if one.name == self.spoil else out

    def call_of(self, one: Contender) -> Callable[[], object]:
        """The call that is timed."""
        if not self.wanted:

            def forward() -> object:
                with torch.no_grad(), one.context():
                    return self.output(one, self.leaves)

            return forward
        leaves = {
            name: x.detach().requires_grad_(name in self.wanted) for name, x in self.leaves.items()
        }
        with one.context():
            like = self.output(one, leaves)
        cotangent = torch.randn_like(like)
        del like

        def both() -> object:
            with one.context():
                out = self.output(one, leaves)
                inputs = [leaves[name] for name in self.wanted]
                return torch.autograd.grad(out, inputs, cotangent, allow_unused=True)

        return both

    def error_of(self, one: Contender) -> float:
        """The largest relative error of the output and the gradients."""
        tokens = next(self.leaves[name].shape[1] for name in self.along)
        first = min(one.check_tokens, tokens)
        exact = {
            name: (x[:, :first] if name in self.along else x).detach().double()
            for name, x in self.leaves.items()
        }
        if not self.wanted:
            with torch.no_grad(), one.context():
                found = self.output(one, self.leaves)[:, :first].clone()
            with torch.no_grad():
                return relative_error(found, one.reference(exact))
        leaves = {
            name: x.detach().requires_grad_(name in self.wanted) for name, x in self.leaves.items()
        }
        exact = {name: x.requires_grad_(name in self.wanted) for name, x in exact.items()}
        with one.context():
            out = self.output(one, leaves)
            cotangent = torch.zeros_like(out)
            cotangent[:, :first] = torch.randn_like(out[:, :first])
            inputs = [leaves[name] for name in self.wanted]
            grads = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
        wanted = one.reference(exact)
        factors = cotangent[:, :first].double()
        inputs = [exact[name] for name in self.wanted]
        exact_grads = torch.autograd.grad(wanted, inputs, factors, allow_unused=True)
        errors = [relative_error(out[:, :first], wanted)]
        for name, grad, exact_grad in zip(self.wanted, grads, exact_grads, strict=True):
            if grad is None or exact_grad is None:  # a formula without this input
                errors.append(0.0 if grad is exact_grad else float("inf"))
                continue
            grad = grad[:, :first] if name in self.along else grad
            errors.append(relative_error(grad, exact_grad))
        return max(errors)


def bit_equal(call: Callable[[], object]) -> bool:
    """Whether two runs give the same bits: what differs between runs may be a race."""
    first, second = (
        [x.clone() for x in tree_leaves(call()) if isinstance(x, Tensor)] for _ in range(2)
    )
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
