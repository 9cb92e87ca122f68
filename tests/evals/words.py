"""A tokenizer of words for tests: a word with the white space before it is a token."""

import re
from collections.abc import Sequence


class Words:
    """Decoding gives back what was encoded, but white space at the end."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.pieces: list[str] = []

    def encode(self, text: str) -> list[int]:
        found = []
        for piece in re.findall(r"\s*\S+", text):
            if piece not in self.numbers:
                self.numbers[piece] = len(self.pieces)
                self.pieces.append(piece)
            found.append(self.numbers[piece])
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.pieces[token] for token in tokens)
