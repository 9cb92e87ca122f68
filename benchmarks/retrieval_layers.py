"""Which layers of a base model fetch facts from outside the window, and so need a memory.

    python -m pipeline.run stage=prepare recipe=smollm2_135m run.dir=runs/smollm2
    python -m benchmarks.retrieval_layers --model models/smollm2_135m/model.gguf \\
        --data runs/smollm2/prepare --out benchmarks/results/retrieval_layers.json

Nothing is trained. Two measurements on held-out recall documents, facts outside the window:
the weight that each attention head puts on the fact at the token that must name it, and loss and
recall of the answers where the layers from `l` on (or below `l`) keep full attention and all others
have the window and sinks of equation (1). Llama-style bases only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from allmem_megatron.base_files import load_base
from benchmarks.measure import commit
from evals.config import EvalConfig
from evals.documents import EvalDocument
from pipeline.held_out import read_documents


class Probe:
    """A base model whose layers see everything or the window only, as told.

    Args:
        path: Llama-style base model, as `load_base` takes it.
        window_size: W.
        num_sinks: s.

    Raises:
        ValueError: another family of models.
    """

    def __init__(self, path: Path, *, window_size: int, num_sinks: int) -> None:
        base = load_base(path)
        if base.config.family != "llama":
            raise ValueError(f"{path} is of family {base.config.family}; give a Llama-style base")
        config = LlamaConfig.from_dict(dict(base.hf_config))
        config._attn_implementation = "probe"
        AttentionInterface.register("probe", self._attend)
        self.model = LlamaForCausalLM(config)
        self.model.load_state_dict(
            {name: base.tensors[name] for name in base.tensors}, strict=False
        )
        self.model.tie_weights()
        self.model.eval()
        self.num_layers, self.num_heads = config.num_hidden_layers, config.num_attention_heads
        self.window_size, self.num_sinks = window_size, num_sinks
        self.full_layers: frozenset[int] = frozenset()
        self.fact_weights: list[Tensor] | None = None
        self.asked: list[tuple[int, int, int]] = []

    def _attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        t = torch.arange(q.shape[2])
        behind = t[:, None] - t[None, :]
        seen = behind >= 0
        if module.layer_idx not in self.full_layers:
            seen &= (behind < self.window_size) | (t[None, :] < self.num_sinks)
        scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1)  # [1, H, T, T]
        if self.fact_weights is not None:
            for query, start, end in self.asked:
                self.fact_weights[module.layer_idx] += weights[0, :, query, start:end].sum(-1)
        return (weights @ v).transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def answers(
        self, documents: Sequence[EvalDocument], full_layers: Sequence[int]
    ) -> dict[str, float]:
        """Loss (nats a token) and recall (share of answers wholly right) with these layers full."""
        self.full_layers = frozenset(full_layers)
        loss, tokens, right, queries = 0.0, 0, 0, 0
        for document in documents:
            ids = torch.from_numpy(document.tokens.astype("int64"))
            self.asked = [
                (q.answer_start - 1, q.evidence_start, q.evidence_end) for q in document.queries
            ]
            hidden = self.model.model(ids[None]).last_hidden_state[0]  # [T, D]
            for query in document.queries:
                places = torch.arange(query.answer_start, query.answer_end)
                logits = self.model.lm_head(hidden[places - 1])
                loss += float(F.cross_entropy(logits, ids[places], reduction="sum"))
                right += bool((logits.argmax(-1) == ids[places]).all())
                tokens, queries = tokens + len(places), queries + 1
        return {"loss": loss / tokens, "recall": right / queries}

    def weights_on_facts(
        self, documents: Sequence[EvalDocument]
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean weight of each head on the fact asked for, [layers, heads], all layers full."""
        self.fact_weights = [torch.zeros(self.num_heads) for _ in range(self.num_layers)]
        found = self.answers(documents, range(self.num_layers))
        weights = torch.stack(self.fact_weights) / sum(len(d.queries) for d in documents)
        self.fact_weights = None
        return weights, found


def measure(probe: Probe, documents: Sequence[EvalDocument], step: int) -> dict[str, Any]:
    """Both measurements; the borders of the layers kept full go up by `step`."""
    weights, full = probe.weights_on_facts(documents)
    every = range(probe.num_layers)
    borders = [*range(0, probe.num_layers, step), probe.num_layers]
    rows = []
    for border in track(borders, "layers", transient=True):
        rows.append(
            {
                "border": border,
                "from": full if border == 0 else probe.answers(documents, every[border:]),
                "below": full
                if border == probe.num_layers
                else probe.answers(documents, every[:border]),
            }
        )
    return {"weight_on_fact": weights.tolist(), "rows": rows}


def plot(found: dict[str, Any], path: Path) -> None:
    """The heads' weights as a map, recall over the border as two curves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    weights = torch.tensor(found["weight_on_fact"])
    image = left.imshow(weights.T, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1)
    left.set(xlabel="layer", ylabel="head", title="attention on the fact asked for")
    figure.colorbar(image, ax=left, label="weight")
    borders = [row["border"] for row in found["rows"]]
    for key, label in (("from", "layers >= l full"), ("below", "layers < l full")):
        right.plot(borders, [row[key]["recall"] for row in found["rows"]], marker="o", label=label)
    right.set(xlabel="l", ylabel="recall", ylim=(-0.02, 1), title="the other layers: window")
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder or GGUF")
    parser.add_argument("--data", type=Path, required=True, help="folder of stage=prepare")
    parser.add_argument("--out", type=Path, required=True, help="JSON; a PNG is put beside it")
    parser.add_argument("--window", type=int, default=128, help="W (default 128)")
    parser.add_argument("--sinks", type=int, default=4, help="s (default 4)")
    parser.add_argument("--documents", type=int, default=24, help="how many (default 24)")
    parser.add_argument("--step", type=int, default=3, help="layers between borders (default 3)")
    options = parser.parse_args()
    settings = EvalConfig(
        kinds=("recall",),
        max_samples=options.documents,
        window_size=options.window,
        num_sinks=options.sinks,
        chunk_size=options.window,
    )
    documents = [d for d in read_documents(options.data, settings) if d.queries]
    probe = Probe(options.model, window_size=options.window, num_sinks=options.sinks)
    found = {
        "model": str(options.model),
        "window_size": options.window,
        "num_sinks": options.sinks,
        "documents": len(documents),
        "queries": sum(len(d.queries) for d in documents),
        "commit": commit(),
        **measure(probe, documents, options.step),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, options.out.with_suffix(".png"))
    for row in found["rows"]:
        print(
            f"l = {row['border']:2d}: layers from l full: loss {row['from']['loss']:.2f}, recall "
            f"{row['from']['recall']:.2f}; layers below l full: loss {row['below']['loss']:.2f}, "
            f"recall {row['below']['recall']:.2f}"
        )


if __name__ == "__main__":
    main()
