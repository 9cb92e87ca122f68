"""Text around a generation: document and question as token ids, and answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.tokenize import MAX_CHARACTERS, TokenizerLike, cut_text, encode_text

_MARK = "\u27eaallmem-text\u27eb"  # stands for the user's text while the template is filled in
_BETWEEN = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Prompter:
    """Makes token ids of a document and of a question after it.

    Both are tokenized apart from each other, so that what is read of a document does not depend
    on the question, and a saved state serves any.
    """

    tokenizer: TokenizerLike
    chat: bool
    """Put the chat template around them, as one message of the user."""

    def document(self, text: str) -> list[int]:
        """The beginning of a prompt, up to the document's end."""
        if self.chat:
            return self._control(self._template()[0]) + self._plain(text)
        return self._start() + self._plain(text)

    def question(self, text: str, *, after_document: bool) -> list[int]:
        """What follows the document: the question and the template's end."""
        between = _BETWEEN if after_document and text and self.chat else ""
        ids = self._plain(between + text)
        return ids + self._control(self._template()[1]) if self.chat else ids

    def _template(self) -> tuple[str, str]:
        """The template's text before and after what the user says."""
        if not self.tokenizer.chat_template:
            raise ValueError("chat=true needs a tokenizer with a chat template; set chat=false")
        message = {"role": "user", "content": _MARK}
        whole = self.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        before, mark, after = whole.partition(_MARK)
        if not mark or _MARK in after:
            raise ValueError(
                "the tokenizer's chat template does not hold the user's text once; set chat=false"
            )
        return before, after

    def _start(self) -> list[int]:
        """What the tokenizer puts before every text (Llama's <s>)."""
        ids = self.tokenizer("")["input_ids"]
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and ids[:1] == [bos] else []

    def _control(self, text: str) -> list[int]:
        """Text of the template, in which control tokens count as such."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _plain(self, text: str) -> list[int]:
        """Text of the user, in which control tokens are letters; long ones in pieces."""
        pieces = cut_text(text, MAX_CHARACTERS) if text else []
        return [token for piece in pieces for token in encode_text(self.tokenizer, piece)]


class Streamer:
    """Says the text of tokens as they come, as soon as its characters are complete."""

    def __init__(
        self, tokenizer: TokenizerLike, say: Callable[[str], None], *, before: Sequence[int] = ()
    ) -> None:
        """Args:
        tokenizer: decodes.
        say: gets each new piece of text.
        before: the last token or so of what is continued: tokenizers of Llama's kind decode
            the space before a word only behind another token.
        """
        self._tokenizer, self._say = tokenizer, say
        self._begin(list(before))

    def _begin(self, before: list[int]) -> None:
        """From here on only these tokens stand before what is decoded."""
        self._tokens = before
        text = self._text()
        if text.endswith("\ufffd"):  # half a character: it would change with the next token
            self._tokens, text = [], ""
        self._said = len(text)

    def add(self, token: int) -> None:
        """Take a token; characters of which bytes are missing wait for the next one."""
        self._tokens.append(token)
        text = self._text()
        if text.endswith("\ufffd"):
            return
        self._emit(text)
        if text.endswith("\n"):  # begin anew: what is decoded again and again stays short
            self._begin([token])

    def end(self) -> None:
        """Say what is left."""
        self._emit(self._text())

    def _emit(self, text: str) -> None:
        if len(text) > self._said:
            self._say(text[self._said :])
            self._said = len(text)

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text
