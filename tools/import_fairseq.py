"""Make a corpus of a fairseq data-bin, the binarised text of RoBERTa, DinkyTrain or 3ML users.

``python -m tools.import_fairseq DATA-BIN/train --tokenizer DIR --output PREFIX`` reads train.bin, train.idx
and the dict.txt beside them and renames every id to that of the tokenizer folder: by the spelling of the
piece, or, where the dictionary holds numbers, by GPT-2's numbering of pieces.

Fairseq's mmap index has Megatron's magic but no document table and codes of its own; each
item ends in </s>, which our corpora leave out; and an item that is nothing else is the blank line between
two documents.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain import __version__
from pretrain.data.indexed import MAGIC, corpus_file, token_dtype
from pretrain.data.manifest import Manifest, Origin
from pretrain.data.tokenizer import SPECIALS, Tokenizer, load_tokenizer
from pretrain.data.writer import EXTENSIONS, CorpusWriter, refuse_inputs
from pretrain.errors import UserError
from pretrain.files import check_folder
from tools.encode_corpus.parts import tokenizer_record
from tools.shared import console
from tools.shared.corpus import show_corpus
from tools.text.byte_level import fairseq_symbols, gpt2_pieces

_HEADER = struct.Struct("<9sQBQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32}
"""fairseq's codes of integer types."""

_EOS = 2
_CHUNK = 4 << 20


def read_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int32]]:
    """Return the type of the ids and tokens per item of a fairseq .idx; UserError if it is none."""
    data = path.read_bytes() if path.is_file() else None
    if data is None:
        raise UserError(f"{path}: no such file; give the prefix of a data-bin, such as data-bin/train")
    if data.startswith(b"TNTIDX"):
        raise UserError(f"{path}: TNTIDX, fairseq's lazy format; binarise again with --dataset-impl mmap")
    if not data.startswith(MAGIC) or len(data) < _HEADER.size:
        raise UserError(f"{path}: not an index of fairseq's mmap format")
    _, _, code, items = _HEADER.unpack(data[: _HEADER.size])
    if len(data) != _HEADER.size + 12 * items or code not in _DTYPES:
        raise UserError(f"{path}: not fairseq's (Megatron's own files need no import) or truncated")
    return np.dtype(_DTYPES[code]), np.frombuffer(data, "<i4", items, _HEADER.size)


def translation(dictionary: Path, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Return our id of each fairseq id [ids of dict.txt and 4 specials]; -1 where we have no such piece."""
    ours = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    merges = None
    if tokenizer.kind == "json":
        merges = json.loads(tokenizer.content)["model"].get("merges")
    numbered = gpt2_pieces([tuple(pair) for pair in merges]) if merges else []
    pieces = list(SPECIALS[:4])
    for symbol in fairseq_symbols(dictionary):
        known = symbol.isdigit() and int(symbol) < len(numbered)
        pieces.append(numbered[int(symbol)] if known else symbol)
    return np.array([ours.get(piece, -1) for piece in pieces])


def documents(
    tokens: npt.NDArray[Any], sizes: npt.NDArray[np.int32], ids: npt.NDArray[np.int64], name: str
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
    """Yield the tokens, sequence lengths and document ends of some megabytes of whole documents.

    An item is a document where no item is empty, else a sequence of the document between blank lines.
    """
    starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    closed = _ends_in_eos(tokens, sizes)
    lengths = sizes - closed
    blank = lengths == 0
    cuts = np.flatnonzero(blank) + 1 if blank.any() else np.arange(1, len(sizes) + 1)
    cuts = np.union1d(cuts, [len(sizes)]) if len(sizes) else cuts
    tokens_before = starts[cuts]
    first = at = 0
    while at < len(cuts):
        enough = int(np.searchsorted(tokens_before, starts[first] + _CHUNK))
        after = min(enough + 1, len(cuts))
        last = int(cuts[after - 1])
        some = slice(first, last)
        kept = np.ones(starts[last] - starts[first], bool)
        kept[starts[1:][some][closed[some]] - 1 - starts[first]] = False
        ends = np.unique(np.cumsum(~blank[some])[cuts[at:after] - first - 1])
        renamed = _renamed(tokens[starts[first] : starts[last]][kept], ids, name)
        yield renamed, lengths[some][~blank[some]], ends[ends > 0]
        first, at = last, after


def _ends_in_eos(tokens: npt.NDArray[Any], sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Return of each item whether </s> ends it."""
    ends = np.cumsum(sizes, dtype=np.int64)
    closed: npt.NDArray[np.bool_] = sizes > 0
    closed[closed] = tokens[ends[closed] - 1] == _EOS
    return closed


def _renamed(tokens: npt.NDArray[Any], ids: npt.NDArray[np.int64], name: str) -> npt.NDArray[np.int64]:
    if len(tokens) and int(tokens.max()) >= len(ids):
        raise UserError(f"{name}: id {tokens.max()} is outside dict.txt; it is another dictionary")
    renamed = ids[tokens]
    if (renamed < 0).any():
        lost = int(tokens[renamed < 0][0])
        raise UserError(f"{name}: the tokenizer has no piece for id {lost} of dict.txt; give the right one")
    return renamed


def convert(prefix: str, dictionary: Path, folder: str, output: str, overwrite: bool) -> Manifest:
    """Write the corpus."""
    inputs = [Path(f"{prefix}.idx"), Path(f"{prefix}.bin"), dictionary]
    refuse_inputs([corpus_file(output, extension) for extension in EXTENSIONS], inputs)
    dtype, sizes = read_index(Path(f"{prefix}.idx"))
    path = Path(f"{prefix}.bin")
    if not path.is_file() or path.stat().st_size != int(sizes.sum(dtype=np.int64)) * dtype.itemsize:
        raise UserError(f"{path}: missing, truncated or too long for its index; copy it again")
    tokenizer = load_tokenizer(folder)
    ids = translation(dictionary, tokenizer)
    tokens = np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)
    origin = Origin(
        tokenizer=tokenizer_record(folder, tokenizer),
        history={"version": __version__, "fairseq": str(Path(prefix).resolve())},
    )
    with (
        CorpusWriter(output, token_dtype(tokenizer.vocab_size), overwrite) as writer,
        console.progress("import", path.stat().st_size) as advance,
    ):
        for some, sequences, ends in documents(tokens, sizes, ids, str(path)):
            writer.append(some, sequences, ends)
            advance(len(some) * dtype.itemsize)
        left_out = int(np.count_nonzero(_ends_in_eos(tokens, sizes)))
        if writer.tokens + left_out != len(tokens):
            raise UserError(
                f"{path}: {writer.tokens} tokens and {left_out} ends of the {len(tokens)} that it holds; a"
                " defect, please report it"
            )
        return writer.finish(origin)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("import_fairseq", "Make a corpus of a fairseq data-bin", True)
    parser.add_argument("prefix", metavar="PREFIX", help="such as data-bin/train")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="tokenizer folder of the same vocabulary"
    )
    console.add_output_prefix(parser)
    parser.add_argument("--dict", metavar="FILE", help="its dictionary (default: the dict.txt beside it)")
    args = parser.parse_args(arguments)
    check_folder(Path(args.output).parent)
    dictionary = Path(args.dict) if args.dict else Path(args.prefix).with_name("dict.txt")
    manifest = convert(args.prefix, dictionary, args.tokenizer, args.output, args.overwrite)
    show_corpus(args.output, manifest, args.json)
    return 0


if __name__ == "__main__":
    console.run(main)
