"""Text to ids through a cache of words, where that is exact.

Natural text repeats its words, and both byte-level BPE and SentencePiece BPE treat each word by itself.
So a text is cut into words by one regular expression in C, and the ids of all words, kept as bytes, are
joined in C as well; only a word not seen before reaches the encoder. No Python code runs per token.

The trap is where it is exact to cut. Byte-level BPE: before a blank after something that is not white
space, since no pre-token of its pattern reaches across and the pattern looks at nothing on its left.
SentencePiece BPE: at every space, if no piece has a space inside. Unigram: nowhere, its best path runs
over the whole text and ties depend on it.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int32]

ENTRIES = 1 << 18
"""Words a cache holds, some 60 MB; when it is full it starts again."""

_LONGEST = 64
"""Longer words are encoded but not kept."""


_STRETCH, _RESTS = 1 << 20, 15
"""Characters by which a cache is judged, and for how many such stretches one that lost rests."""

_MISS_COST = 20
"""Characters that SentencePiece encodes in the time that one unseen word costs more than a known one."""


def packed(ids: Iterable[int]) -> bytes:
    """Return the ids as int32 bytes."""
    return array("i", ids).tobytes()


class WordCache(dict[str, bytes]):
    """Word -> its ids, packed, by `encode` where it is not known; bounded in size."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        self._encode = encode
        self.misses = 0

    def __missing__(self, word: str) -> bytes:
        self.misses += 1
        ids = self._encode(word)
        if len(word) <= _LONGEST:
            if len(self) >= ENTRIES:
                self.clear()
            self[word] = ids
        return ids


def encode_flat(
    texts: Sequence[str], split: Callable[[str], list[str]], cache: WordCache
) -> tuple[IdArray, npt.NDArray[np.int64]]:
    """Return the ids of all texts end to end, and ids per text."""
    word_ids = cache.__getitem__
    encoded = [b"".join(map(word_ids, split(text))) for text in texts]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) // 4
    return np.frombuffer(b"".join(encoded), np.int32), lengths


class Usefulness:
    """Whether a cache is faster than its encoder on the text at hand; asked before each batch.

    Judged by a stretch of text at a time. After one of mostly unseen words the cache rests for some
    stretches and is tried again.
    """

    def __init__(self, cache: WordCache) -> None:
        self._cache, self._misses, self._characters, self._rest = cache, 0, 0, 0

    def __call__(self, characters: int) -> bool:
        """Whether to take the cache for the next `characters`."""
        if self._rest > 0:
            self._rest -= characters
            return False
        if self._characters >= _STRETCH:
            misses = self._cache.misses - self._misses
            if misses * _MISS_COST > self._characters:
                self._rest = _RESTS * self._characters
            self._misses, self._characters = self._cache.misses, 0
            if self._rest:
                return self(characters)
        self._characters += characters
        return True


# ---- byte-level BPE ------------------------------------------------------------------------------

# White space, then anything else, up to a blank. Python counts U+001C to U+001F as white space and the
# pattern of GPT-2 does not; so a cut is made only before four blanks that everybody agrees on.
split_byte_level = re.compile(r"\s*\S+(?:[^\S \t\n\r]\s*\S*)*|\s+").findall

# GPT-2's pattern, for ASCII: what letters, digits and white space are elsewhere depends on the Unicode
# version, so other words are left to the reference library.
_ascii_pretokens = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
).findall


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is GPT-2's kind of byte-level BPE, to which this cache is exact."""
    model, before = spec["model"], spec["pre_tokenizer"] or {}
    plain = not any(
        model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    return bool(
        model.get("type") == "BPE"
        and plain
        and spec["normalizer"] is None
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before["add_prefix_space"]
        and all(token["special"] for token in spec["added_tokens"])
    )


def byte_level_cache(reference: Any) -> WordCache:
    """Return the cache in front of a `tokenizers.Tokenizer` for which `is_byte_level` holds."""
    model = reference.model
    letters = str.maketrans({chr(byte): letter for byte, letter in byte_letters().items() if byte < 128})
    pretokens = WordCache(
        lambda word: packed([token.id for token in model.tokenize(word.translate(letters))])
    )

    def encode(word: str) -> bytes:
        if word.isascii() and len(word) <= _LONGEST:
            return b"".join(map(pretokens.__getitem__, _ascii_pretokens(word)))
        return packed(reference.encode(word, add_special_tokens=False).ids)

    return WordCache(encode)


def byte_letters() -> dict[int, str]:
    """Return GPT-2's letter for each byte: itself where it prints, else the next one from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {byte: chr(byte) for byte in prints} | {byte: chr(256 + n) for n, byte in enumerate(others)}


# ---- SentencePiece BPE ---------------------------------------------------------------------------

_odd_space = re.compile("[\x1c-\x1f\u2581]").search
"""Where Python's idea of white space is not the vocabulary's."""


def space_splitter(spaces: Sequence[int]) -> Callable[[str], list[str]]:
    """Text -> the words between the given code points and plain spaces."""
    words = re.compile(f"[^ {re.escape(''.join(map(chr, spaces)))}]+").findall
    return lambda text: words(text) if _odd_space(text) else text.split()
