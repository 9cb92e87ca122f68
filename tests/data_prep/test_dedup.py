"""Signatures are datasketch's, and the search keeps the first of what is alike."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasketch import MinHash

from data_prep.dedup import EXACT, NEAR, Signer, bands, find_duplicates, fold32
from data_prep.ngrams import find_words, ngram_hashes
from data_prep.readers import Document
from data_prep.settings import DedupConfig

VOCABULARY = [f"word{i}" for i in range(3000)]


def text_of(seed: int, length: int = 300) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=length))


def changed(text: str, share: float, seed: int = 0) -> str:
    """The text with a share of its words at the end replaced."""
    words = text.split()
    count = round(share * len(words))
    return " ".join([*words[: len(words) - count], *text_of(seed + 10_000, count).split()])


def search(texts: list[str], mode: str = "near", **fields: Any) -> Any:
    config = DedupConfig(mode=mode, **fields)
    signer = Signer(config)
    rows = [signer.signature(Document(text, str(i), "s")) for i, text in enumerate(texts)]
    return find_duplicates(np.concatenate([np.zeros(0, signer.dtype), *rows]), config)


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(one: str, two: str) -> float:
    a, b = shingles(one), shingles(two)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("length", [0, 3, 5, 300, 40_000])
def test_signatures_are_those_of_datasketch(length: int) -> None:
    text = text_of(1, length)
    grams = fold32(ngram_hashes(find_words(text).hashes, min(5, max(length, 1))))
    theirs = MinHash(num_perm=64, seed=7, scheme="affine32", hashfunc=lambda gram: gram)
    for start in range(0, len(grams), 512):
        theirs.update_batch(grams[start : start + 512].tolist())
    signer = Signer(DedupConfig(mode="near", num_perm=64, seed=7))
    assert np.array_equal(signer.minhash(text), theirs.hashvalues)
    row = signer.signature(Document(text, "a", "s"))
    assert np.array_equal(row["minhash"][0], theirs.hashvalues)


def test_signatures_estimate_the_similarity_of_ngram_sets() -> None:
    signer = Signer(DedupConfig(mode="near", num_perm=256))
    for share in (0.05, 0.2, 0.5):
        errors = []
        for seed in range(20):
            one = text_of(seed)
            two = changed(one, share, seed)
            equal = (signer.minhash(one) == signer.minhash(two)).mean()
            errors.append(equal - jaccard(one, two))
        assert abs(np.mean(errors)) < 0.02
        assert max(map(abs, errors)) < 4 * 0.5 / 16


def test_the_first_of_exact_duplicates_is_kept_whatever_case_and_spaces() -> None:
    texts = ["One two.", "other", "one  TWO.\n", "one two!", "other", "", " "]
    for mode in ("exact", "near"):
        found = search(texts, mode)
        assert found.keeper.tolist()[:5] == [-1, -1, 0, -1 if mode == "exact" else 0, 1]
        assert found.keeper.tolist()[5:] == [-1, 5]
        assert found.reason(2) == EXACT
        assert found.reason(0) is None
    assert search(texts, "near").reason(3) == NEAR  # the same words with another sign
    assert (search(texts, "none").keeper == -1).all()
    assert search([], "near").keeper.tolist() == []


def test_near_duplicates_are_found_and_others_are_not() -> None:
    texts = [text_of(i) for i in range(200)]
    copies = [changed(text, 0.05, i) for i, text in enumerate(texts[:100])]
    halves = [changed(text, 0.5, i) for i, text in enumerate(texts[100:])]
    found = search([*texts, *copies, *halves])
    assert (found.keeper[:200] == -1).all()
    assert np.count_nonzero(found.keeper[200:300] == np.arange(100)) >= 97
    assert (found.keeper[300:] == -1).all()
    assert found.reason(200) == NEAR


def test_copies_of_a_dropped_document_name_the_one_that_is_kept() -> None:
    first = text_of(0)
    near = changed(first, 0.03)
    found = search([first, text_of(1), near, near.upper(), text_of(1)])
    assert found.keeper.tolist() == [-1, -1, 0, 0, 1]
    assert [found.reason(i) for i in range(5)] == [None, None, NEAR, EXACT, EXACT]


def test_the_result_depends_on_the_order_only_in_who_is_kept() -> None:
    groups = [[changed(text_of(i), 0.02 * k, k) for k in range(4)] for i in range(30)]
    texts = [text for group in groups for text in group]
    order = random.Random(5).sample(range(len(texts)), len(texts))
    found = search([texts[i] for i in order])
    for group in range(30):
        places = [place for place, i in enumerate(order) if i // 4 == group]
        assert found.keeper[places[0]] == -1
        assert (found.keeper[places[1:]] == places[0]).all()


def test_rows_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    config = DedupConfig(mode="near")
    signer = Signer(config)
    texts = [text_of(i % 7) for i in range(20)]
    rows = np.concatenate([signer.signature(Document(t, "same", "s")) for t in texts])
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    found = find_duplicates(mapped, config)
    assert found.keeper.tolist() == [-1] * 7 + [i % 7 for i in range(7, 20)]
    assert found.num_duplicate_ids == 19
    assert rows.dtype.itemsize == 8 + 16 + 4 * 128


def test_bands_find_nearly_all_pairs_above_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9):
        num_bands, width = bands(threshold, 128)
        assert num_bands * width <= 128
        similar = threshold + 0.05
        assert 1 - (1 - similar**width) ** num_bands > 0.9


def test_words_are_found_in_every_script() -> None:
    text = "Don't STOP_me, naïve Straße 3.14! 中文ok かな ไทย 𠀀x हिन्दी"
    words = find_words(text)
    found = [text[a:b] for a, b in zip(words.starts, words.ends, strict=True)]
    assert found == [
        *("Don", "t", "STOP", "me", "naïve", "Straße", "3", "14"),
        *("中", "文", "ok", "か", "な", "ไ", "ท", "ย", "𠀀", "x", "हिन्दी"),
    ]
    assert find_words("ÀB c").hashes.tolist() == find_words("...àb\n(C)").hashes.tolist()
    assert len(find_words("")) == len(find_words(" -- ")) == 0


def test_words_of_long_texts_are_those_of_their_parts() -> None:
    text = " ".join(text_of(i, 20_000) for i in range(3)) + "中" * 200_000
    words = find_words(text)
    expected = [match.span() for match in re.finditer(r"\w+?(?=中|\b)|中", text)]
    spans = list(zip(words.starts.tolist(), words.ends.tolist(), strict=True))
    assert spans == expected
    known: dict[str, int] = {}
    for (start, end), value in zip(spans[::97], words.hashes[::97].tolist(), strict=True):
        assert known.setdefault(text[start:end], value) == value
    assert len(set(known.values())) == len(known) > 400
