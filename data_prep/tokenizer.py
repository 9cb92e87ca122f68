"""Tokenizers for models made from scratch: sentencepiece BPE as a Hugging Face fast tokenizer.

sentencepiece only trains. Its pieces and their order become a `tokenizers` BPE whose alphabet keeps
plain spaces (no U+2581 stand-in) and falls back on bytes, so that every text, that character
included, comes back exactly. Control tokens and the ChatML template are in the saved folder, which
`transformers.AutoTokenizer.from_pretrained` loads without this project.

Command line: `python -m data_prep.tokenizer train --help`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.tokenize import TokenizerLike

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SP_SPACE = "\u2581"
_NUM_BYTES = 256
_MAX_SENTENCE_BYTES = 1 << 20
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: str | Path,
    *,
    user_symbols: Sequence[str] = (),
    model_max_length: int = 1_000_000,
) -> Path:
    """Trains a BPE tokenizer and writes a folder that `AutoTokenizer.from_pretrained` loads.

    Identity normalisation, no dummy prefix, no whitespace removed, digits split, byte fallback.
    Ids: control tokens, newline, `user_symbols`, bytes, pieces by merge order, characters.

    Args:
        texts: training text, read once; U+2581 is left to the byte fallback.
        vocab_size: number of ids, exactly.
        out_dir: must not exist yet, or be empty; written whole or not at all.
        user_symbols: strings that are one token wherever they stand (`recall.recall_symbols()`).
        model_max_length: what the tokenizer warns beyond; it never truncates.

    Raises:
        ValueError: vocab_size too small for bytes, symbols and some pieces; no text at all.
    """
    out_path = Path(out_dir)
    if out_path.exists() and any(out_path.iterdir()):
        raise ValueError(f"out_dir={out_path} is not empty; name a new folder or empty it")
    symbols = list(dict.fromkeys(["\n", *user_symbols]))
    needed = _NUM_BYTES + len(CONTROL_TOKENS) + len(symbols) + 64
    if vocab_size < needed:
        raise ValueError(
            f"vocab_size={vocab_size} is less than the {needed} that bytes, {len(symbols)} symbols "
            f"and some pieces need; raise vocab_size to {needed} or more"
        )
    pieces = _train_pieces(texts, vocab_size, symbols)
    tokenizer = _to_fast_tokenizer(pieces, symbols, model_max_length)
    if len(tokenizer) != vocab_size:
        raise ValueError(f"training gave {len(tokenizer)} ids, vocab_size={vocab_size}; add text")
    partial = out_path.with_name(out_path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(partial))
    if out_path.exists():
        out_path.rmdir()
    os.replace(partial, out_path)
    return out_path


def _train_pieces(texts: Iterable[str], vocab_size: int, symbols: list[str]) -> list[str]:
    """The learned pieces (plain spaces), best first, without control tokens, symbols and bytes."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            # sentencepiece insists on <unk>; the fast tokenizer has no use for it, so one id more.
            vocab_size=vocab_size + 1,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            user_defined_symbols=[s.replace(" ", _SP_SPACE) for s in (*CONTROL_TOKENS, *symbols)],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # more threads may change the order of ties
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"sentencepiece could not train vocab_size={vocab_size}: {str(error).strip()}; "
            "give more text or a smaller vocab_size"
        ) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    reserved = 1 + len(CONTROL_TOKENS) + len(symbols)
    pieces = (processor.id_to_piece(i) for i in range(reserved, processor.get_piece_size()))
    return [p.replace(_SP_SPACE, " ") for p in pieces if not _BYTE_PIECE.fullmatch(p)]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at line ends into sentences that sentencepiece takes; long lines are cut hard."""
    limit = _MAX_SENTENCE_BYTES // 8
    for text in texts:
        text = text.replace("\0", "").replace(_SP_SPACE, "")
        for start in range(0, len(text), limit):
            if part := text[start : start + limit]:
                yield part


def _to_fast_tokenizer(
    pieces: list[str], symbols: list[str], model_max_length: int
) -> TokenizerLike:
    """A `PreTrainedTokenizerFast` with the same segmentation as the trained model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab: dict[str, int] = {}
    for token in (*CONTROL_TOKENS, *symbols, *(f"<0x{b:02X}>" for b in range(_NUM_BYTES)), *pieces):
        if token not in vocab:
            vocab[token] = len(vocab)
    known = set(pieces)
    # Pieces come in the order of their merges; a piece may have several ways to be put together.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(s, normalized=False, special=False) for s in symbols])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def load_tokenizer(path: str | Path) -> TokenizerLike:
    """A fast tokenizer from a folder, or from a .gguf file.

    Raises:
        ValueError: nothing there, or it has no fast tokenizer.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    elif (path / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    else:
        raise ValueError(
            f"tokenizer={path} is neither a folder with tokenizer.json nor a .gguf file; "
            "set data.tokenizer to one, or train one with `python -m data_prep.tokenizer train`"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer={path} has no fast version; give one with tokenizer.json")
    return tokenizer


def tokenizer_hash(tokenizer: TokenizerLike) -> str:
    """SHA-256 (hex) of what maps text to ids: the serialised tokenizer and the chat template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)  # set by calls, no part of the mapping
    state.pop("padding", None)
    text = json.dumps([state, tokenizer.chat_template], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m data_prep.tokenizer train …`."""
    from data_prep.documents import SourceConfig, read_documents
    from data_prep.recall import recall_symbols

    parser = argparse.ArgumentParser(prog="python -m data_prep.tokenizer", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a sentencepiece BPE tokenizer")
    train.add_argument("--out", required=True, help="folder to write (new or empty)")
    train.add_argument("--vocab-size", type=int, default=2048)
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument("--packages", nargs="+", help="installed packages whose .py files to read")
    source.add_argument("--text", help="file, folder or glob of .txt, .md or .py files")
    source.add_argument("--jsonl", help="file or glob of .jsonl[.gz|.xz|.zst] files, field `text`")
    train.add_argument("--max-characters", type=int, default=20_000_000)
    train.add_argument(
        "--no-recall-symbols", action="store_true", help="leave out the words of recall documents"
    )
    options = parser.parse_args(arguments)
    if options.packages:
        config = SourceConfig(kind="python_packages", packages=tuple(options.packages))
    elif options.text:
        config = SourceConfig(kind="text", path=options.text)
    else:
        config = SourceConfig(kind="jsonl", path=options.jsonl)

    def limited() -> Iterator[str]:
        left = options.max_characters
        for document in read_documents(config):
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                return

    symbols = () if options.no_recall_symbols else recall_symbols()
    try:
        out = train_sentencepiece(limited(), options.vocab_size, options.out, user_symbols=symbols)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{out}: {options.vocab_size} ids, hash {tokenizer_hash(load_tokenizer(out))[:16]}")


if __name__ == "__main__":
    main()
