"""The report's page: one HTML file with its figures inside, for a browser without a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.reasons import explain
from data_prep.report import texts
from data_prep.report.facts import Facts, Shown, SourceFacts
from data_prep.report.figures import human, percent
from data_prep.report.style import CSS
from data_prep.sample import Sample
from data_prep.tokenize import TokenizerLike
from data_prep.view import DocumentView, check_sample, document_runs, document_views, visible

MAX_DOCUMENTS = 3
"""Shown of a sample."""
MAX_TOKENS = 180
"""Shown of a document."""
MAX_EXAMPLES = 20
MAX_SHARDS = 500
STRIP_CELLS = 240
"""Parts of the bar that shows a sample."""


def build_page(facts: Facts, images: Mapping[str, bytes], tokenizer: TokenizerLike | None) -> str:
    """The page as text.

    Args:
        facts: what it says.
        images: PNG files of the figures by name.
        tokenizer: to decode samples; None: ids are shown.
    """
    sections = [
        ("sources", "Sources", _sources(facts, images)),
        ("dropped", "What was left out", _dropped(facts, images)),
        ("unreadable", "Unreadable records", _unreadable(facts)),
        ("lengths", "Lengths and packing", _lengths(facts, images)),
        ("samples", "Samples", _samples(facts, tokenizer)),
        ("facts", "Checksums and settings", _facts(facts)),
    ]
    parts = [
        f"<section id={name}><h2>{esc(title)}</h2>{body}</section>"
        for name, title, body in sections
    ]
    links = " ".join(f"<a href='#{name}'>{esc(title)}</a>" for name, title, _ in sections)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Data report: {esc(_headline(facts))}</title>\n<style>{CSS}</style></head>\n"
        f"<body><header><h1>Data report</h1><p class=lead>{esc(_headline(facts))}</p>"
        f"{_cards(facts)}<nav>{links}</nav></header>\n<main>" + "\n".join(parts) + "</main>\n"
        f"<footer>{esc(texts.FOOTER)}</footer></body></html>\n"
    )


def esc(text: object) -> str:
    """Any text for HTML: nothing in it is markup, control characters are visible."""
    return html.escape(visible(str(text)))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int = 1) -> str:
    """A table; columns behind the first `text_columns` are numbers."""
    mark = [" class=n" if number >= text_columns else "" for number in range(len(head))]
    cells = "".join(f"<th{m}>{esc(name)}</th>" for m, name in zip(mark, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{esc(v)}</td>" for m, v in zip(mark, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(images: Mapping[str, bytes], name: str, caption: str) -> str:
    """A figure inside the page; empty where there is none."""
    if name not in images:
        return ""
    data = base64.b64encode(images[name]).decode()
    alt = esc(caption)
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>{alt}</figcaption></figure>"
    )


def _headline(facts: Facts) -> str:
    manifest = facts.manifest
    samples, tokens = manifest.num_samples("train"), manifest.num_tokens("train")
    names = [source.name for source in facts.of("train")]
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        f"{samples:,} training samples of {manifest.seq_length:,} tokens from {listed or 'nothing'}"
        f": {human(tokens)} tokens of text"
    )


def _cards(facts: Facts) -> str:
    train, held = facts.of("train"), facts.of("eval")
    tokens = sum(source.num_tokens for source in train)
    loss = sum(source.num_loss_tokens for source in train)
    room = sum(source.room for source in train)
    read = [source for source in facts.sources if not source.generated]
    num_read = sum(source.num_read for source in read)
    dropped = sum(source.num_dropped for source in read)
    bad = sum(source.num_bad for source in facts.sources)
    cards = [
        (
            "training text",
            human(tokens),
            f"tokens in {sum(s.num_samples for s in train):,} samples",
        ),
        ("held out", human(sum(s.num_tokens for s in held)), "tokens, never trained on"),
        ("loss targets", percent(loss / tokens) if tokens else "–", "of the training text"),
        ("packing fill", percent(tokens / room) if room else "–", "of the samples is text"),
        ("documents left out", f"{dropped:,}", f"of {num_read:,} that were read"),
        ("unreadable", f"{bad:,}", "records" if bad != 1 else "record"),
    ]
    return (
        "<div class=cards>"
        + "".join(
            f"<div class=card><div class=what>{esc(what)}</div><div class=value>{esc(value)}</div>"
            f"<div class=of>{esc(of)}</div></div>"
            for what, value, of in cards
        )
        + "</div>"
    )


def _sources(facts: Facts, images: Mapping[str, bytes]) -> str:
    head = ("split", "source", "kind", "documents", "kept", "samples", "tokens", "loss", "fill")
    rows = [
        (
            source.split,
            source.name,
            source.kind,
            "made up" if source.generated else f"{source.num_read:,}",
            "–" if source.generated else f"{source.num_kept:,}",
            f"{source.num_samples:,}",
            f"{source.num_tokens:,}",
            percent(source.loss_share) if source.num_samples else "–",
            percent(source.fill) if source.num_samples else "–",
        )
        for source in facts.sources
    ]
    return (
        f"<p>{esc(texts.SOURCES)}</p>"
        + table(head, rows, text_columns=3)
        + figure(images, "tokens", texts.TOKENS_FIGURE)
    )


def _dropped(facts: Facts, images: Mapping[str, bytes]) -> str:
    rows = [
        (
            drop.reason,
            _place(source),
            explain(drop.reason),
            f"{drop.documents:,}",
            f"{human(drop.amount)} {drop.unit}",
        )
        for source in facts.sources
        for drop in source.dropped
    ]
    if not rows:
        return f"<p>{esc(texts.NOTHING_DROPPED)}</p>"
    rows.sort(key=lambda row: -int(row[3].replace(",", "")))
    head = ("reason", "where", "what it means", "number", "text")
    return (
        f"<p>{esc(texts.DROPPED)}</p>"
        + figure(images, "kept", texts.KEPT_FIGURE)
        + table(head, rows, text_columns=3)
        + _examples(facts, "dropped_examples", "dropped_excerpts", "Examples of dropped documents")
        + _examples(facts, "duplicate_examples", "", "Examples of duplicates")
        + _cuts(facts)
    )


def _cuts(facts: Facts) -> str:
    rows = [
        (reason, _place(source), f"{number:,}")
        for source in facts.sources
        for reason, number in source.report.get("cuts", {}).items()
    ]
    if not rows:
        return ""
    note = f"<p>{esc(texts.CUTS)}</p>"
    return note + table(("reason", "where", "documents"), rows, text_columns=2)


def _unreadable(facts: Facts) -> str:
    rows = [
        (reason, _place(source), f"{number:,}")
        for source in facts.sources
        if source.num_bad
        for reason, number in source.report.get("bad_reasons", {}).items()
    ]
    if not rows:
        return f"<p>{esc(texts.NOTHING_UNREADABLE)}</p>"
    return (
        f"<p>{esc(texts.UNREADABLE)}</p>"
        + table(("reason", "where", "records"), rows, text_columns=2)
        + _examples(facts, "bad", "bad_excerpts", "The first of them")
    )


def _place(source: SourceFacts) -> str:
    """Split and name; a short one is not broken over lines."""
    place = f"{source.split} / {source.name}"
    return place.replace(" ", "\N{NO-BREAK SPACE}") if len(place) < 30 else place


def _examples(facts: Facts, key: str, excerpts: str, title: str) -> str:
    """Examples of all sources, each once, folded in where they are many."""
    found: dict[str, str] = {}
    for source in facts.sources:
        shown = source.report.get(excerpts, [])
        for number, line in enumerate(source.report.get(key, [])[:MAX_EXAMPLES]):
            found.setdefault(line, shown[number] if number < len(shown) else "")
    if not found:
        return ""
    items = "".join(
        f"<li><code>{esc(line)}</code>" + (f"<q>{esc(text)}</q>" if text else "") + "</li>"
        for line, text in found.items()
    )
    is_open = " open" if len(found) <= 6 else ""
    return (
        f"<details{is_open}><summary>{esc(title)} ({len(found)})</summary>"
        f"<ul class=examples>{items}</ul></details>"
    )


def _lengths(facts: Facts, images: Mapping[str, bytes]) -> str:
    return (
        f"<p>{esc(texts.LENGTHS)}</p>"
        + figure(images, "lengths", texts.LENGTHS_FIGURE)
        + figure(images, "packing", texts.PACKING_FIGURE)
    )


# --- samples ----------------------------------------------------------------------------


def _samples(facts: Facts, tokenizer: TokenizerLike | None) -> str:
    legend = (
        "<p class=legend><span class=loss>loss target</span> <span class=read>only read</span> "
        f"<span class=gap>left out here</span></p><p>{esc(texts.SAMPLES)}</p>"
    )
    return legend + "".join(
        _shown(facts, source, shown, tokenizer)
        for source in facts.sources
        for shown in facts.shown.get((source.split, source.name), [])
    )


def _shown(facts: Facts, source: SourceFacts, shown: Shown, tokenizer: TokenizerLike | None) -> str:
    sample, manifest = shown.sample, facts.manifest
    documents = document_views(sample)
    real = [document for document in documents if not document.is_padding]
    loss = int(sample.loss_mask.sum())
    title = (
        f"{source.split} / {source.name}: sample {shown.number} of {shown.shard}, "
        f"{len(real):,} document{'' if len(real) == 1 else 's'}, {loss:,} of "
        f"{len(sample.tokens):,} tokens with loss, "
        f"{len(sample.tokens) - sum(d.length for d in real):,} padding"
    )
    problems = check_sample(sample, seq_length=manifest.seq_length, vocab_size=manifest.vocab_size)
    warnings = "".join(f"<p class=bad>{esc(problem)}</p>" for problem in problems)
    body = "".join(_document(sample, document, tokenizer) for document in real[:MAX_DOCUMENTS])
    more = len(real) - MAX_DOCUMENTS
    rest = f"<p class=gap>{more:,} more documents in this sample</p>" if more > 0 else ""
    return (
        f"<article><h3>{esc(title)}</h3>{_strip(sample, documents)}{warnings}{body}{rest}</article>"
    )


def _strip(sample: Sample, documents: Sequence[DocumentView]) -> str:
    """The whole sample as a bar: documents beside each other, green where tokens carry loss."""
    if len(documents) > STRIP_CELLS:
        return ""
    cells = []
    for document in documents:
        name = "padding" if document.is_padding else document.name or f"document {document.number}"
        share = document.num_loss / document.length
        title = esc(f"{name}: {document.length:,} tokens, {share:.0%} with loss")
        mask = sample.loss_mask[document.start : document.end]
        number = max(round(STRIP_CELLS * document.length / len(sample.tokens)), 1)
        inner = "".join(
            f"<b style='flex:{len(part)};opacity:{_opacity(part):.2f}'></b>"
            for part in np.array_split(mask, min(number, document.length))
        )
        kind = "pad" if document.is_padding else "doc"
        cells.append(
            f"<i class={kind} style='flex:{document.length} 0 0' title=\"{title}\">"
            f"{'' if document.is_padding else inner}</i>"
        )
    return f"<div class=strip>{''.join(cells)}</div>"


def _opacity(mask: NDArray[np.uint8]) -> float:
    """Of the green in a part of the bar; a single loss target can be seen."""
    share = float(np.mean(mask != 0))
    return 0.35 + 0.65 * share if share else 0.0


def _document(sample: Sample, document: DocumentView, tokenizer: TokenizerLike | None) -> str:
    begins = f", from its token {document.offset:,} on" if document.offset else ""
    name = document.name or f"document {document.number}"
    head = (
        f"<h4><code>{esc(name)}</code> {document.length:,} tokens{begins}, "
        f"{document.num_loss:,} with loss</h4>"
    )
    spans = []
    for run in document_runs(sample, document, tokenizer, max_tokens=MAX_TOKENS):
        if run.left_out:
            loss = int(sample.loss_mask[run.start : run.end].sum())
            spans.append(f"<span class=gap>{run.length:,} tokens, {loss:,} with loss</span>")
        else:
            spans.append(f"<span class={'loss' if run.loss else 'read'}>{esc(run.text)}</span>")
    return f"{head}<pre>{''.join(spans)}</pre>"


# --- facts ------------------------------------------------------------------------------


def _facts(facts: Facts) -> str:
    manifest = facts.manifest
    rows = [
        ("configuration", manifest.config_hash),
        ("tokenizer", f"{manifest.tokenizer_hash} ({manifest.vocab_size:,} ids)"),
        ("tokens of a sample", f"{manifest.seq_length:,}"),
        ("manifest's version", str(manifest.schema_version)),
        ("shards are in", manifest.root or "the folder of this report"),
    ]
    shards = [
        (record.path, record.source, f"{record.num_samples:,}", human(record.num_bytes) + "B",
         record.sha256)
        for records in manifest.splits.values()
        for record in records
    ]  # fmt: skip
    more = f" (the first {MAX_SHARDS:,})" if len(shards) > MAX_SHARDS else ""
    texts_read = [
        (_place(source), source.report.get("fingerprint", "")) for source in facts.sources
    ]
    head = ("shard", "source", "samples", "size", "SHA-256")
    return (
        f"<p>{esc(texts.FACTS)}</p>"
        + table(("", ""), rows, text_columns=2)
        + f"<details><summary>Shards ({len(shards):,}){more}</summary>"
        + table(head, shards[:MAX_SHARDS], text_columns=2)
        + "</details><details><summary>Fingerprints of the text</summary>"
        + table(("source", "SHA-256 of its documents"), texts_read, text_columns=2)
        + "</details><details><summary>Configuration</summary><pre class=plain>"
        + esc(texts.as_yaml(manifest.config))
        + "</pre></details>"
    )
