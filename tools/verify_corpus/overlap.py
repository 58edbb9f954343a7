"""How much of one corpus's text stands in another: shared runs of 13 words.

The usual test for held-out text that leaked into training. Words are what lies between white space, in
lower case without punctuation, so that tokenizers and typography do not matter; a run is known by a
64-bit hash. A document of fewer words is one run: it is found where it is a whole document too. The runs
of the corpus that is asked about are held in memory (8 bytes a token), the other may be of any size.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.indexed import IndexedReader, Progress
from pretrain.data.tokenizer import Tokenizer

RUN = 13
_WORDS = re.compile(r"\w+").findall
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORST = 10


class WordHashes(dict[str, int]):
    """Word -> 64 random-looking bits; bounded in size."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1 << 20:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


def runs(text: str, hashes: WordHashes) -> npt.NDArray[np.uint64]:
    """Hash of each run of RUN words of a text [n]; of the whole one where it is shorter."""
    words = np.array([hashes[word] for word in _WORDS(text.casefold())], dtype=np.uint64)
    size = min(RUN, len(words))
    if size == 0:
        return np.empty(0, np.uint64)
    count = len(words) - size + 1
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(size):
            total = total * _MULTIPLIER + words[i : i + count]
    return total


def _documents(reader: IndexedReader, tokenizer: Tokenizer, progress: Progress) -> Iterator[str]:
    for i in range(reader.num_documents):
        ids = reader.document(i)
        progress(ids.nbytes)
        yield tokenizer.decode(ids)


def overlap(
    corpus: IndexedReader, other: IndexedReader, tokenizer: Tokenizer, progress: Progress = lambda done: None
) -> dict[str, Any]:
    """Return which share of the runs of `asked` occurs in `other`, and the documents with the most."""
    hashes = WordHashes()
    mine = [np.unique(runs(text, hashes)) for text in _documents(corpus, tokenizer, progress)]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *mine]))
    found = np.zeros(len(known), bool)
    for text in _documents(other, tokenizer, progress):
        if len(known):
            theirs = runs(text, hashes)
            at = np.searchsorted(known, theirs) % len(known)
            found[at[known[at] == theirs]] = True
    shared = [int(found[np.searchsorted(known, part)].sum()) if len(part) else 0 for part in mine]
    shares = np.array([count / max(1, len(part)) for count, part in zip(shared, mine, strict=True)])
    worst = np.argsort(-shares, kind="stable")[:_WORST]
    return {
        "run_length": RUN,
        "documents": len(mine),
        "documents_with_overlap": int(np.count_nonzero(shares)),
        "runs": len(known),
        "shared_runs": int(found.sum()),
        "share": float(found.mean()) if len(known) else 0.0,
        "worst": [{"document": int(i), "share": float(shares[i])} for i in worst if shares[i]],
    }
