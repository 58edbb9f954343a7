"""Text to ids for `tools.encode_corpus`: what to do where a text has the letters of a special piece, and at
the end of a document.

Text is only text, so `<unk>` in it is spelled in ordinary pieces. Some corpora mean the piece (WikiText marks
its rare words so); so every such place is counted, and becomes the id where that is asked for.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pretrain.data.tokenizer import IdArray, Lengths, Tokenizer
from pretrain.errors import UserError


def literal_ids(tokenizer: Tokenizer, wanted: Sequence[str]) -> dict[str, int]:
    """Return the id by letters, of arguments TEXT or TEXT=PIECE."""
    known, ids = tokenizer.special_names(), {}
    for argument in wanted:
        text, _, piece = (argument, "", argument) if argument in known else argument.rpartition("=")
        if not text or piece not in known:
            raise UserError(
                f"--map-literal {argument}: no special piece {piece} in {tokenizer.path}; there are "
                f"{' '.join(list(known)[:8])}; write TEXT where the text spells one of them, else TEXT=PIECE"
            )
        if known[piece] in (tokenizer.mask, tokenizer.pad):
            raise UserError(f"--map-literal {argument}: {piece} is no part of a text; training puts it there")
        ids[text] = known[piece]
    return ids


class SpecialText:
    """Texts -> ids, as `Tokenizer.encode_flat` gives them but for what is asked for here.

    ids: letters that become an id. end: put after each document that is not empty.
    counts: how often the letters of each special piece, or of `ids`, were seen.
    """

    def __init__(self, tokenizer: Tokenizer, ids: dict[str, int], end: int | None) -> None:
        self.tokenizer, self.ids, self.end = tokenizer, ids, end
        self.counts: Counter[str] = Counter()
        names = sorted({*tokenizer.special_names(), *ids}, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")  # which nothing matches
        mapped = sorted(ids, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, mapped))})").split

    def encode_flat(self, texts: list[str]) -> tuple[IdArray, Lengths]:
        """Return the token ids of all texts end to end (int32), and ids per text [n]."""
        for text in texts:
            self.counts.update(self._names.findall(text))
        tokens, lengths = self._encode_mapped(texts) if self.ids else self.tokenizer.encode_flat(texts)
        if self.end is not None:
            filled = lengths > 0
            tokens = np.insert(tokens, np.cumsum(lengths)[filled], self.end)
            lengths = lengths + filled
        return tokens, lengths

    def _encode_mapped(self, texts: list[str]) -> tuple[IdArray, Lengths]:
        """What stands between the letters is encoded as a text of its own, as by Hugging Face's tokenizers.

        So with SentencePiece what follows begins a word, also where no space is before it.
        """
        cuts = [self._split(text) for text in texts]  # text, letters, text, letters, ..., text
        tokens, lengths = self.tokenizer.encode_flat([text for parts in cuts for text in parts[::2]])
        counts = np.array([len(parts) // 2 + 1 for parts in cuts])
        last = np.zeros(len(lengths), bool)
        last[np.cumsum(counts) - 1] = True
        found = [self.ids[letters] for parts in cuts for letters in parts[1::2]]
        tokens = np.insert(tokens, np.cumsum(lengths)[~last], np.array(found, np.int32))
        return tokens, np.add.reduceat(lengths + ~last, np.cumsum(counts) - counts)
