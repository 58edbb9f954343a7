"""Byte-level BPE vocabularies in the files that RoBERTa and GPT-2 came in, as one tokenizer.json.

RoBERTa's: ``vocab.json`` and ``merges.txt``; ids are those of vocab.json. GPT-2's with fairseq's
dictionary: ``encoder.json``, ``vocab.bpe`` and ``dict.txt``; ids are RoBERTa's: four specials, line n of
dict.txt (from 0) is n + 4, <mask> is last.

The file dict.txt names pieces by their number in GPT-2's vocabulary, ordered by frequency, so neither
file alone gives the ids of a RoBERTa checkpoint.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from pretrain.data.tokenizer import JSON_FILE, SPECIALS
from pretrain.data.word_cache import byte_letters
from pretrain.errors import UserError
from pretrain.files import parse_json


def convert(folder: Path) -> str:
    """Return the tokenizer.json of the files in `folder`; a tokenizer.json there is taken as it is."""
    if folder.is_file() and folder.suffix == ".json":
        return _read(folder)
    if (folder / JSON_FILE).is_file():
        return (folder / JSON_FILE).read_text(encoding="utf-8")
    if (folder / "vocab.json").is_file():
        vocabulary, merges = _read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
    elif (folder / "encoder.json").is_file():
        merges = read_merges(folder / "vocab.bpe")
        vocabulary = fairseq_ids(folder / "dict.txt", _read_json(folder / "encoder.json"))
    else:
        raise UserError(
            f"{folder}: neither {JSON_FILE}, nor vocab.json with merges.txt, nor encoder.json with"
            " vocab.bpe and dict.txt"
        )
    return build(vocabulary, merges, folder)


def build(vocabulary: dict[str, int], merges: list[tuple[str, str]], folder: Path) -> str:
    """Return tokenizer.json of pieces and merges, with RoBERTa's specials."""
    missing = [name for name in SPECIALS if name not in vocabulary]
    if missing:
        raise UserError(f"{folder}: no piece {' '.join(missing)}; these are not the files of a masked model")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"{folder}: the ids are not 0 to {len(vocabulary) - 1}, each once")
    for left, right in merges:
        if not {left, right, left + right} <= vocabulary.keys():
            raise UserError(f"{folder}: the merge {left} {right} is not of this vocabulary")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = ((name, vocabulary[name]) for name in ("<s>", "</s>"))
    tokenizer.post_processor = processors.RobertaProcessing(eos, bos, True, False)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, lstrip=name == "<mask>") for name in SPECIALS]
    )
    text: str = tokenizer.to_str(pretty=True)
    return text


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Return the merges of a merges.txt or vocab.bpe, most frequent first."""
    merges = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line and not line.startswith("#version"):
            left, space, right = line.rstrip("\r").partition(" ")
            if not space or " " in right:
                raise UserError(f"{path}:{number}: not a merge of two pieces")
            merges.append((left, right))
    return merges


def fairseq_symbols(path: Path) -> list[str]:
    """Return the symbols of a fairseq dictionary in the order of their ids, which begin at 4."""
    symbols = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line:
            symbol, _, count = line.removesuffix(" #fairseq:overwrite").rpartition(" ")
            if not symbol or not count.isdigit():
                raise UserError(f"{path}:{number}: not a symbol and a count")
            symbols.append(symbol)
    return symbols


def fairseq_ids(dictionary: Path, gpt2_ids: dict[str, int]) -> dict[str, int]:
    """Return RoBERTa's ids by piece: the specials, the symbols of dict.txt, <mask>."""
    pieces = {i: piece for piece, i in gpt2_ids.items()}
    symbols = fairseq_symbols(dictionary)
    for symbol in symbols:
        if symbol.isdigit() and int(symbol) not in pieces:
            raise UserError(f"{dictionary}: {symbol} is no id of encoder.json")
    named = [pieces[int(symbol)] if symbol.isdigit() else symbol for symbol in symbols]
    return {piece: i for i, piece in enumerate([*SPECIALS[:-1], *named, SPECIALS[-1]])}


def gpt2_pieces(merges: list[tuple[str, str]]) -> list[str]:
    """Return the pieces by GPT-2's ids, which follow from the merges: bytes, merges, end of text."""
    return [*byte_letters().values(), *(left + right for left, right in merges), "<|endoftext|>"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; it belongs to the vocabulary beside it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8; copy it again") from error


def _read_json(path: Path) -> dict[str, int]:
    text = _read(path)
    try:
        value: Any = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from error
    if not isinstance(value, dict) or not all(isinstance(i, int) for i in value.values()):
        raise UserError(f"{path}: not a table of pieces and ids")
    return value
