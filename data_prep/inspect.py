"""Shows what shards hold: `python -m data_prep.inspect SHARD|DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.counts import summary
from data_prep.sample import Sample
from data_prep.shard_files import FoundShards, ShardFile, find_shards
from data_prep.shards import Manifest
from data_prep.tokenize import TokenizerLike
from data_prep.tokenizer import load_tokenizer, tokenizer_hash
from data_prep.view import DocumentView, check_sample, document_runs, document_views, visible

DESCRIPTION = """\
Shows samples of shards: meta, documents with their borders, the text with its loss targets, and
whether the sample keeps the rules (types, shapes, borders, loss mask). Nothing is unpacked.

  green             loss target: the token is predicted and counts
  dim               read only
  ⟦ … ⟧             the same where the output is no terminal"""
EXAMPLES = """\
examples:
  python -m data_prep.inspect runs/demo/prepare                       what there is, and a sample
  python -m data_prep.inspect runs/demo/prepare --split eval --num 3  three held-out samples
  python -m data_prep.inspect runs/demo/prepare/train/shard-00002.tar --index 17
  python -m data_prep.inspect shard-00000.tar --tokenizer path/to/tokenizer --tokens 0
  python -m data_prep.inspect runs/demo/prepare --check               every sample and checksum

exit status: 0, 1 (something breaks the rules), 2 (this is no shard, or a wrong option)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        found = find_shards(options.path, options.split)
        if options.check:
            return _check(found, console)
        tokenizer = _tokenizer(options.tokenizer, found.manifest, console)
        if found.manifest is not None and found.split:
            _show_manifest(found, console)
        return _show(found, options, tokenizer, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.inspect",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        metavar="SHARD|DIR",
        help="a shard (.tar), or a folder (or URL) with manifest.json or shards",
    )
    parser.add_argument("--split", default=None, help="of a folder: train (default) or eval")
    parser.add_argument(
        "--index", type=int, default=0, help="first sample to show, counted from 0 (default 0)"
    )
    parser.add_argument("--num", type=int, default=1, help="how many samples (default 1)")
    parser.add_argument(
        "--tokenizer",
        help="folder with tokenizer.json, or .gguf file; default: the one the manifest names; "
        "without any, token ids are shown",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=300,
        help="tokens shown of a document: its begin, where loss begins, its end (default 300; "
        "0: all)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=8,
        help="documents shown of a sample (default 8; 0: all)",
    )
    parser.add_argument(
        "--check", action="store_true", help="check every sample and checksum, show only problems"
    )
    return parser


def _tokenizer(
    path: str | None, manifest: Manifest | None, console: Console
) -> TokenizerLike | None:
    """The tokenizer that made the shards; None where nobody says which.

    Raises:
        ValueError: it is another one.
    """
    given = path or (str(manifest.config.get("tokenizer") or "") if manifest is not None else "")
    if not path and not Path(given or "?").exists():
        console.print(
            Text("The shards do not say where their tokenizer is: give --tokenizer DIR for text."),
            style="yellow",
        )
        return None
    tokenizer = load_tokenizer(given)
    if manifest is not None and tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise ValueError(
            f"--tokenizer {given} has hash {tokenizer_hash(tokenizer)[:12]}, the shards were made "
            f"with {manifest.tokenizer_hash[:12]}: its text would be another; name the tokenizer "
            "of the run (data.tokenizer, or the base model)"
        )
    return tokenizer


def _show_manifest(found: FoundShards, console: Console) -> None:
    assert found.manifest is not None
    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    for name in ("split", "source", "kind"):
        table.add_column(name)
    for name in ("shards", "samples", "tokens", "loss"):
        table.add_column(name, justify="right")
    for row in sorted(summary(found.manifest), key=lambda row: row["split"] != "train"):
        share = row["num_loss_tokens"] / max(row["num_tokens"], 1)
        numbers = (f"{row[f'num_{name}']:,}" for name in ("shards", "samples", "tokens"))
        table.add_row(row["split"], row["source"], row["kind"], *numbers, f"{share:.1%}")
    console.print(table)
    console.print()


def _show(
    found: FoundShards,
    options: argparse.Namespace,
    tokenizer: TokenizerLike | None,
    console: Console,
) -> int:
    """Prints the samples that were asked for."""
    if options.index < 0 or options.num < 1:
        raise ValueError(
            f"--index {options.index} --num {options.num}: index counts from 0, num from 1"
        )
    status, seen, left = 0, 0, options.num
    for shard in found.shards:
        if not left:
            break
        if shard.record is not None and seen + shard.record.num_samples <= options.index:
            seen += shard.record.num_samples
            continue
        with shard.samples() as samples:
            first = max(options.index - seen, 0)
            for number in range(first, min(first + left, len(samples))):
                where = f"{shard.name}   sample {number} of {len(samples)}"
                problems = _show_sample(
                    samples[number], where, found.manifest, options, tokenizer, console
                )
                status = 1 if problems else status
                left -= 1
            seen += len(samples)
    if left == options.num:
        raise ValueError(
            f"--index {options.index}: there are {seen} samples; the last is {seen - 1}"
        )
    return status


def _show_sample(
    sample: Sample,
    where: str,
    manifest: Manifest | None,
    options: argparse.Namespace,
    tokenizer: TokenizerLike | None,
    console: Console,
) -> list[str]:
    """Prints a sample and gives what is wrong with it."""
    problems = check_sample(
        sample,
        seq_length=None if manifest is None else manifest.seq_length,
        vocab_size=None if manifest is None else manifest.vocab_size,
    )
    documents = document_views(sample)
    loss, length = int(sample.loss_mask.sum()), len(sample.tokens)
    padding = int(sample.meta.get("num_padding", 0))
    console.rule(Text(where, style="bold")) if console.is_terminal else console.print(where)
    console.print(
        f"source {sample.meta.get('source', '?')}, kind {sample.kind}; {length:,} tokens in "
        f"{len(documents) - bool(padding):,} document(s), {loss:,} loss targets "
        f"({loss / length:.1%}), {padding:,} padding"
    )
    meta = {k: v for k, v in sample.meta.items() if k not in ("ids", "offsets", "kind", "source")}
    console.print(_short(f"meta {meta}"), style="dim")
    console.print(_short(f"cu_seqlens {sample.cu_seqlens.tolist()}"), style="dim")
    if problems:
        for problem in problems:
            console.print(Text(f"broken rule: {problem}", style="bold red"))
    else:
        console.print(
            Text("checks: types, shapes, borders, ids and loss mask are as they must be"),
            style="green",
        )
    shown = documents[: options.documents] if options.documents else documents
    for document in shown:
        console.print()
        _show_document(sample, document, options, tokenizer, console)
    if len(shown) < len(documents):
        console.print(f"\n… {len(documents) - len(shown)} more documents (--documents 0 shows all)")
    console.print()
    return problems


def _show_document(
    sample: Sample,
    document: DocumentView,
    options: argparse.Namespace,
    tokenizer: TokenizerLike | None,
    console: Console,
) -> None:
    span = f"[{document.start:,}, {document.end:,})"
    if document.is_padding:
        console.print(Text(f"── padding {span}: {document.length:,} tokens", style="cyan"))
        return
    begins = f", from its token {document.offset:,} on" if document.offset else ""
    title = (
        f"── document {document.number} {span}: {document.length:,} tokens, "
        f"{document.num_loss:,} with loss  {visible(document.name)}{begins}"
    )
    console.print(Text(title, style="cyan"))
    text = Text()
    for run in document_runs(sample, document, tokenizer, max_tokens=options.tokens or None):
        if run.left_out:
            loss = int(sample.loss_mask[run.start : run.end].sum())
            text.append(f"\n… {run.length:,} tokens, {loss:,} with loss …\n", style="cyan")
        elif not run.loss:
            text.append(run.text, style="dim")
        elif console.is_terminal:
            text.append(run.text, style="green")
        else:
            text.append(f"⟦{run.text}⟧")
    console.print(text)


def _short(text: str, limit: int = 400) -> str:
    shown = visible(text).replace("\n", " ")
    return shown if len(shown) <= limit else f"{shown[:limit]} …"


def _check(found: FoundShards, console: Console) -> int:
    """Checks every sample of every split; prints problems and totals."""
    manifest = found.manifest
    shards = found.shards
    if manifest is not None and found.split:
        storage = shards[0].storage
        shards = [
            ShardFile(storage, record.path, record)
            for records in manifest.splits.values()
            for record in records
        ]
    num_samples = num_problems = 0
    for shard in shards:
        problems = list(_check_shard(shard, manifest))
        for problem in problems:
            console.print(Text(f"{shard.name}: {visible(problem)}", style="red"))
        num_problems += len(problems)
        num_samples += 0 if shard.record is None else shard.record.num_samples
    told = f" with {num_samples:,} samples" if num_samples else ""
    console.print(
        f"{len(shards):,} shards{told}: "
        + (f"{num_problems:,} problems" if num_problems else "all as they must be")
    )
    return 1 if num_problems else 0


def _check_shard(shard: ShardFile, manifest: Manifest | None) -> Iterator[str]:
    """What is wrong with a shard; a broken one does not end the check of the others."""
    record = shard.record
    try:
        if record is not None and shard.storage.sha256(shard.name) != record.sha256:
            yield "SHA-256 is not the manifest's; delete it and run stage=prepare again"
        with shard.samples() as samples:
            loss = 0
            for number in range(len(samples)):
                sample = samples[number]
                loss += int(sample.loss_mask.sum())
                for problem in check_sample(
                    sample,
                    seq_length=None if manifest is None else manifest.seq_length,
                    vocab_size=None if manifest is None else manifest.vocab_size,
                ):
                    yield f"sample {number}: {problem}"
            if record is not None and (len(samples), loss) != (
                record.num_samples,
                record.num_loss_tokens,
            ):
                yield (
                    f"{len(samples)} samples with {loss} loss targets, the manifest says "
                    f"{record.num_samples} and {record.num_loss_tokens}"
                )
    except (ValueError, OSError) as error:
        yield str(error)


if __name__ == "__main__":
    sys.exit(main())
