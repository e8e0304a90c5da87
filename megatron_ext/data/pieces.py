"""Long texts cut where the tokenizer cuts them anyway: the ids of the pieces, one after the other, are those of the text.

The ``tokenizers`` library takes about 200 bytes of memory for each byte of a text. Byte-level BPE merges within the words
of GPT-2's pattern alone, which takes them from left to right and looks back at nothing::

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

So a text may be cut where each of its words ends or begins in every text: no word goes on with white space after another
character, and none goes on from letters to digits, from either to signs, or from signs to either. An apostrophe is left
out, since letters may belong to it. The one look ahead, ``(?!\\S)``, is at the end of white space, before which is no cut.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

PIECE: Final = 1 << 17
"""Characters after which a piece ends at the next boundary: 25 MB of the library's memory."""

LONGEST_WORD: Final = 1 << 20
"""Characters without a boundary that are still tokenized: 200 MB."""

# Of each class only characters that are in it in every version of Unicode. Python's \S is without all white space that
# the pattern's \s knows, and some more.
_LETTER = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_SIGN = "!-&(-/:-@\\[-`{-~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
_BOUNDARY: Final = re.compile(
    rf"\S(?=[ \t\r\n])|[{_LETTER}](?=[0-9'{_SIGN}])|[0-9](?=['{_LETTER}{_SIGN}])|[{_SIGN}](?=[0-9{_LETTER}])"
)


class NoBoundaryError(ValueError):
    """A text with a word that is too long to be tokenized in bounded memory."""


def pieces(text: str, backend: Any) -> Iterator[str]:
    """A text in pieces of about ``PIECE`` characters, or as a whole where the tokenizer is not of a kind known to allow it.

    Args:
        text: what is tokenized.
        backend: the ``tokenizers.Tokenizer``.

    Raises:
        NoBoundaryError: there is none for ``LONGEST_WORD`` characters.
    """
    if len(text) <= 2 * PIECE or not _cuts_words(backend):
        yield text
        return
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    start = 0
    while len(text) - start > 2 * PIECE:
        end = _boundary(text, start + PIECE, added)
        if end is None:
            break
        yield text[start:end]
        start = end
    if len(text) - start > 2 * PIECE + LONGEST_WORD:
        raise NoBoundaryError(
            f"more than {LONGEST_WORD:,} characters from character {start + PIECE:,} on without white space or a change "
            "between letters, digits and signs, which is no text; leave the document out or break it up"
        )
    yield text[start:]


def _boundary(text: str, first: int, added: list[str]) -> int | None:
    """The first boundary from ``first`` on, None where there is none near; added tokens stay whole."""
    for found in _BOUNDARY.finditer(text, first, first + LONGEST_WORD):
        end = found.end()
        if not any(text.find(token, max(0, end - len(token) + 1), end + len(token) - 1) >= 0 for token in added):
            return end
    return None


def _cuts_words(backend: Any) -> bool:
    """Whether the tokenizer is byte-level BPE with GPT-2's pattern, and nothing else looks beyond a word."""
    from tokenizers import models, pre_tokenizers

    cutter = backend.pre_tokenizer
    return (
        type(cutter) is pre_tokenizers.ByteLevel
        and bool(cutter.use_regex)
        and not cutter.add_prefix_space
        and backend.normalizer is None
        and isinstance(backend.model, models.BPE)
        and not any(
            token.lstrip or token.rstrip or token.single_word or not token.content
            for token in backend.get_added_tokens_decoder().values()
        )
    )
