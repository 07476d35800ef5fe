"""Text tokens -> what a reader sees: pieces with their spaces, bytes assembled to UTF-8.

SentencePiece falls back to one token a byte for characters that it does not know, so an
emoji arrives in four frames. Those bytes are held until the character is whole.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sentencepiece

WORD_START = "▁"


class TextAssembler:
    """Pieces of one conversation, in order; it holds at most the start of one character."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def append(self, token: int) -> str:
        """The text that `token` completes: often one piece, "" inside a character."""
        tokenizer = self._tokenizer
        if token < 0 or token >= tokenizer.vocab_size():
            return ""  # a text head may be wider than its tokenizer
        if tokenizer.is_byte(token):
            # A byte piece is written <0xF0>.
            return self._decoder.decode(bytes([int(tokenizer.id_to_piece(token)[3:5], 16)]))
        if tokenizer.is_control(token) or tokenizer.is_unknown(token):
            return ""
        cut_short = self._decoder.decode(b"", final=True)  # U+FFFD, if a character stayed open
        return cut_short + tokenizer.id_to_piece(token).replace(WORD_START, " ")
