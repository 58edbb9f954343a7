"""Text to token ids behind one face, whatever made the vocabulary.

A tokenizer is a folder. ``tokenizer.model`` in it is a SentencePiece model (the kind trained here),
otherwise any ``tokenizer.json`` is read through the ``tokenizers`` package. Whatever
masking, sampling and export need to know about a vocabulary is a table computed once at load (which
ids are special, which may replace a token at random, which start a word), so nobody else ever looks
at a piece's spelling.

Text is only text. A document that contains the characters ``<mask>`` or ``</s>`` must not
produce the special id, so ``<mask>`` is a CONTROL piece here and a tokenizer that maps its characters
to the id is refused.

SentencePiece models are finished after training by rewriting a few fields of the file (see
`_finish_model`), so that the Hugging Face ``tokenizer.json`` derived from them gives identical ids
on every text.
"""

import hashlib
import io
import json
import re
import struct
import tempfile
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pretrain.data import word_cache
from pretrain.errors import UserError
from pretrain.files import seen_from, write_whole

IdArray: TypeAlias = npt.NDArray[np.int32]
Lengths: TypeAlias = npt.NDArray[np.int64]

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
PROVENANCE_FILE = "provenance.json"

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""bos, pad, eos, unk, mask. In a model trained here: ids 0, 1, 2, 3 and the last."""

SMALLEST = len(SPECIALS) + 256 + 2
"""Ids of the smallest vocabulary that can be trained: with every byte, a letter and the mark of a space."""

_BERT_SPECIALS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")

_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<eod>", "[SEP]")
"""What ends a document, as vocabularies spell it."""

SPACES = (
    *(0x9, 0xA, 0xB, 0xC, 0xD, 0x85, 0xA0, 0x1680),
    *range(0x2000, 0x200B),
    *(0x2028, 0x2029, 0x202F, 0x205F, 0x3000),
    0x2581,
)
"""The 25 code points that become a plain space before encoding: Unicode white space, and U+2581
itself, which SentencePiece uses for a space and which could not be told apart from one."""

_SCORE_GRID = 128
"""Unigram scores are multiples of 1/128. SentencePiece adds them in float32, Hugging Face in
float64; on this grid both sums are exact below 2**17, so ties break alike. 1/1024 is too fine for
documents of megabytes."""

_PROBE = (
    "The quick brown fox's 1,234.56 don't we'll I'VE it'd a_b-c/d@e.org -- ... (x) [y] {z} \"q\"",
    "  two  spaces   three\n\n new\tlines \r\n and\x0b\x0c the end  ",
    "<s> </s> <pad> <unk> <mask> a<mask>b <|endoftext|>",
    "caf\u00e9 cafe\u0301 na\u00efve \u2019s \u201cquoted\u201d\u2014dash \u00bd \u2167 \u0661\u0662 \ufb01",
    "no\u00a0break em\u2003wide\u3000line\u2028par\u2029next\u0085zero\u200bwidth\ufeff\u00ad",
    "\u65e5\u672c\u8a9e \u0440\u0443\u0441 \u0627\u0644 \u0e44\u0e17\u0e22 \U0001f468\u200d \U0010ffff",
    "\x00\x1b\x1c.\x1f\x7f",
    "a" * 70 + " " * 9 + "=" * 70 + "\n" * 5 + "0" * 70,
)
"""Where byte-level encoders differ: contractions, white space, literal specials, scripts, long runs."""

_LONGEST_LINE = 1 << 20
"""Characters. The trainer drops longer lines than its byte limit with a mere warning, so we cut
them."""

_RESERVED = re.compile("\u2585|<(?:s|pad|/s|unk|mask|0x[0-9A-F]{2})(?=>)")
"""What the trainer keeps for itself: it drops a line that holds U+2585, its mark of an unknown letter, and
takes out the characters of pieces that are no text (or, of <mask>, might make a second piece of that name).
A line is cut there instead: at the one, and before the last letter of the others."""

_TRAINER_THREADS = 4
"""Fixed, not the core count: the trainer's float sums depend on it, and the same text must give the
same model."""


class Tokenizer(ABC):
    """A vocabulary with its encoder. Made by `load_tokenizer`; immutable.

    Attributes:
        kind: "unigram", "bpe" (both SentencePiece) or "json".
        vocab_size: number of ids W; every id is in [0, W).
        path: the file that defines the vocabulary.
        content: what was in it; whoever wants more of it reads that, for another file may be there now.
        hash: sha256 (hex) of the content.
        bos, pad, eos, unk, mask: the special ids; -1 for one that the vocabulary does not have.
        missing: the names of those.
        random_ids: int32 [R], ascending: every id that is not special, the pool for random
            replacement.
        word_starts: bool [W]: this piece begins a word. Specials do, so no word reaches across one.
    """

    def __init__(
        self,
        path: Path,
        content: bytes,
        kind: str,
        pieces: Sequence[str],
        specials: Sequence[str],
        hidden: set[int],
    ) -> None:
        ids = {piece: i for i, piece in enumerate(pieces)}
        self.missing = [name for name in specials if name not in ids]
        self.kind, self.path, self.content = kind, path, content
        self.hash = hashlib.sha256(content).hexdigest()
        self.vocab_size = len(pieces)
        self.bos, self.pad, self.eos, self.unk, self.mask = (ids.get(name, -1) for name in specials)
        self._pieces = tuple(pieces)
        special = np.zeros(self.vocab_size, dtype=bool)
        special[list(hidden | {ids[name] for name in specials if name in ids})] = True
        self.random_ids: IdArray = np.flatnonzero(~special).astype(np.int32)
        self.word_starts = _word_starts(pieces) | special
        self._refuse_live_specials(path, specials)

    @cached_property
    def unspaced(self) -> npt.NDArray[np.bool_]:
        """Return which pieces begin with a letter of a script without spaces between words [W]: to the masks
        each is a word."""
        return _unspaced(self._pieces)

    @abstractmethod
    def encode_flat(self, texts: list[str]) -> tuple[IdArray, Lengths]:
        """Return the token ids of all texts end to end (int32), without specials, and ids per text [n]. Texts
        must be valid Unicode."""

    def encode_batch(self, texts: list[str]) -> list[IdArray]:
        """Return the token ids of each text (int32 [n], a view), without specials."""
        tokens, lengths = self.encode_flat(texts)
        return np.split(tokens, np.cumsum(lengths)[:-1]) if texts else []

    @abstractmethod
    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        """Text of the ids; specials vanish, white space comes back as single spaces
        (SentencePiece)."""

    def encode(self, text: str) -> IdArray:
        """Return the token ids of one text (int32 [n]), without specials."""
        return self.encode_flat([text])[0]

    def piece(self, id: int) -> str:
        """Return the spelling of one id in the vocabulary's own alphabet, such as "\u2581the"."""
        return self._pieces[id]

    def readable(self, id: int) -> str:
        """Return one id as people read it: its text where that can be told, with "\u2581" for a space."""
        return self._pieces[id]

    def special_names(self) -> dict[str, int]:
        """Return the spelling and id of every piece that text never becomes."""
        plain = set(self.random_ids.tolist())
        return {piece: i for i, piece in enumerate(self._pieces) if piece and i not in plain}

    def end_of_document(self, name: str = "") -> tuple[str, int]:
        """Return the piece and id that ends a document in files of other programs: `name`, else the usual
        one."""
        known = self.special_names()
        for piece in (name,) if name else _ENDS:
            if piece in known:
                return piece, known[piece]
        tried = f"no {name}" if name else "none of " + " ".join(_ENDS)
        raise UserError(f"{self.path}: {tried} is a special piece there; name its end of a document")

    def _refuse_live_specials(self, path: Path, specials: Sequence[str]) -> None:
        ids = {self.bos, self.pad, self.eos, self.mask} - {-1}
        for name in set(specials) - set(self.missing):
            if not ids.isdisjoint(self.encode(f"a {name} b").tolist()):
                raise UserError(
                    f"{path}: the letters {name} in a text become the special id; "
                    "declare it as a control symbol, not as a user-defined one"
                )


class _SentencePieceTokenizer(Tokenizer):
    """``tokenizer.model``; numpy arrays, several times the speed of Python lists, and for BPE a cache."""

    def __init__(self, path: Path, content: bytes) -> None:
        import sentencepiece

        if not content:  # which the library takes for none given
            raise UserError(f"{path}: not a SentencePiece model (empty)")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model ({error})") from error
        everything = list(range(self._processor.vocab_size()))
        flags = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        hidden = {i for i in everything if any(flag(i) for flag in flags)}
        kind = "bpe" if _trainer_field(content, _MODEL_TYPE) == 2 else "unigram"
        pieces = self._processor.id_to_piece(everything)
        self._cache = None
        if kind == "bpe" and self._encodes_by_word(pieces):
            encode = self._processor.encode
            self._cache = word_cache.WordCache(lambda word: word_cache.packed(encode(word)))
            self._cache_pays = word_cache.Usefulness(self._cache)
            self._split = word_cache.space_splitter(SPACES)
        super().__init__(path, content, kind, pieces, SPECIALS, hidden)

    def _encodes_by_word(self, pieces: Sequence[str]) -> bool:
        """Whether words can be encoded one by one: normalised by our rule, and no piece has a space
        inside."""
        points = [chr(point) for point in range(0x10000) if not 0xD800 <= point < 0xE000]
        spaced = "".join(f"a{point}" for point in points)
        ours = "".join("a " if ord(point) in SPACES or point == " " else f"a{point}" for point in points)
        normal = "\u2581" + ours.replace(" ", "\u2581")
        return not any("\u2581" in piece[1:] for piece in pieces) and (
            self._processor.normalize(spaced) == normal and not self._processor.encode("  ")
        )

    def encode_flat(self, texts: list[str]) -> tuple[IdArray, Lengths]:
        if self._cache is not None and self._cache_pays(sum(map(len, texts))):
            return word_cache.encode_flat(texts, self._split, self._cache)
        arrays: list[IdArray] = self._processor.encode_as_numpy(texts, num_threads=1)
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        return np.concatenate([np.empty(0, np.int32), *arrays]), lengths

    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text


class _JsonTokenizer(Tokenizer):
    """Any ``tokenizer.json`` whose vocabulary names the five specials, RoBERTa's or BERT's spelling.

    GPT-2's kind of byte-level BPE is encoded by fastokens where that is installed and gives the same
    ids on a probe, else through a cache of words; all others by the package itself.
    """

    def __init__(self, path: Path, content: bytes, use_fastokens: bool) -> None:
        self.path = path  # of which it speaks before all else is known
        self._tokenizer = read_json_tokenizer(path, content)
        self._tokenizer.encode_special_tokens = True  # their characters in a text stay text
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        pieces = [""] * (max(ids.values()) + 1)
        for piece, i in ids.items():
            pieces[i] = piece
        hidden = {i for i, piece in enumerate(pieces) if not piece}  # ids that nothing has
        added = self._tokenizer.get_added_tokens_decoder()
        self._named = set(added)
        hidden |= {i for i, token in added.items() if token.special}
        specials = max(SPECIALS, _BERT_SPECIALS, key=lambda names: len(ids.keys() & set(names)))
        spec = json.loads(self._tokenizer.to_str())
        self._bytes = {letter: byte for byte, letter in word_cache.byte_letters().items()}
        if "ByteLevel" not in json.dumps([spec["pre_tokenizer"], spec["decoder"]]):
            self._bytes = {}
        self._cache = self._fast = None
        if word_cache.is_byte_level(spec):
            self._fast = self._fastokens(spec) if use_fastokens else None
            self._cache = None if self._fast else word_cache.byte_level_cache(self._tokenizer)
        super().__init__(path, content, "json", pieces, specials, hidden)

    def encode_flat(self, texts: list[str]) -> tuple[IdArray, Lengths]:
        if self._fast is not None:
            ids, offsets = self._fast.encode_batch_flat(texts)
            bounds = np.frombuffer(offsets, np.int64)
            return np.frombuffer(ids, np.int32), bounds[1:] - bounds[:-1]
        if self._cache is not None:
            return word_cache.encode_flat(texts, word_cache.split_byte_level, self._cache)
        arrays = [np.array(ids, np.int32) for ids in self._reference_ids(texts)]
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        return np.concatenate([np.empty(0, np.int32), *arrays]), lengths

    def _reference_ids(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
                raise
            raise UserError(f"{self.path}: cannot encode a text ({error}); mend its patterns") from None
        return [encoding.ids for encoding in encodings]

    def _fastokens(self, spec: dict[str, Any]) -> Any:
        """The encoder of the fastokens package, None where it is missing or differs."""
        try:
            from fastokens import Tokenizer as FastTokenizer

            # Without added tokens their characters are ordinary text.
            encoder = FastTokenizer.from_json_str(
                json.dumps(spec | {"added_tokens": [], "post_processor": None})
            )
        except (ImportError, ValueError):
            return None
        probe = [*_PROBE, " ".join(_PROBE)]
        ids = np.frombuffer(encoder.encode_batch_flat(probe)[0], np.uint32).tolist()
        return encoder if ids == [i for text in self._reference_ids(probe) for i in text] else None

    def readable(self, id: int) -> str:
        """Return a byte-level piece as the text of its bytes; those of a part of a letter as \\xe2."""
        piece = self._pieces[id]
        if not piece or not set(piece) <= self._bytes.keys() or id in self._named:
            return piece
        text = bytes(self._bytes[letter] for letter in piece).decode("utf-8", "backslashreplace")
        return text.replace(" ", "\u2581")

    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text


def read_json_tokenizer(path: Path, content: bytes) -> Any:
    """Return the `tokenizers.Tokenizer` of a tokenizer.json's content, without what it may switch on that
    makes ids depend on chance or on a length: dropout of merges, truncation, padding."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises bare Exception for every kind of damage
        raise UserError(f"{path}: not a tokenizer.json ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def load_tokenizer(
    directory: str | Path, use_fastokens: bool = True, need_specials: bool = True
) -> Tokenizer:
    """Return the tokenizer of a folder: its ``tokenizer.model``, else its ``tokenizer.json``; or of such a
    file.

    need_specials: UserError where one of the five is missing, without which nothing can be masked. Text
        can be encoded all the same.
    """
    path = _vocabulary_file(Path(directory))
    content = path.read_bytes()
    tokenizer = (
        _JsonTokenizer(path, content, use_fastokens)
        if path.suffix == ".json"
        else _SentencePieceTokenizer(path, content)
    )
    if need_specials and tokenizer.missing:
        raise UserError(
            f"{path}: no piece {' '.join(tokenizer.missing)} in the vocabulary, without which no model can be"
            " pre-trained; train one with python -m tools.train_tokenizer or add the special tokens"
        )
    return tokenizer


def _vocabulary_file(folder: Path) -> Path:
    """The file that defines the vocabulary of a folder, or is given itself."""
    for path in (folder / MODEL_FILE, folder / JSON_FILE):
        if path.is_file():
            return path
    if folder.is_file() and folder.suffix in (".model", ".json"):
        return folder
    hint = "make one with python -m tools.train_tokenizer"
    if any((folder / name).is_file() for name in ("vocab.json", "encoder.json")):
        hint = f"convert its files with python -m tools.train_tokenizer --import {folder} --output DIR"
    raise UserError(f"{folder}: no {MODEL_FILE} or {JSON_FILE} there{seen_from(folder)}; {hint}")


def train_sentencepiece(
    texts: Iterable[str],
    directory: str | Path,
    kind: Literal["unigram", "bpe"] = "unigram",
    vocab_size: int = 32_000,
    provenance: Mapping[str, Any] | None = None,
    reserved: Counter[str] | None = None,
) -> Tokenizer:
    """Train a SentencePiece vocabulary of exactly `vocab_size` ids on `texts` and write its folder.

    `reserved` is told how often `texts` hold something that the trainer keeps for itself (`_RESERVED`); all
    around it is trained on.

    The same texts give the same bytes on any machine. `provenance` is written beside the model for
    people to read; nothing depends on it. All texts are held in memory by the trainer (some ten
    times their size).
    """
    reserved = Counter() if reserved is None else reserved
    raw = _train(_lines(texts, reserved), kind, vocab_size)
    model = _finish_model(raw, vocab_size, round_scores=kind == "unigram")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MODEL_FILE, model)
    tokenizer = load_tokenizer(folder)
    about = {
        "kind": kind,
        "vocab_size": vocab_size,
        "specials": {name: tokenizer._pieces.index(name) for name in SPECIALS},
        "sha256": tokenizer.hash,
        "reserved": dict(reserved),
        **(provenance or {}),
    }
    write_whole(folder / PROVENANCE_FILE, (json.dumps(about, indent=1) + "\n").encode())
    return tokenizer


def _train(lines: Iterator[str], kind: str, vocab_size: int) -> bytes:
    """The raw model of `vocab_size` - 1 pieces: all but <mask>, which the trainer cannot put
    last."""
    import sentencepiece

    model = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": vocab_size - 1,
        "byte_fallback": True,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
        "allow_whitespace_only_pieces": False,
        "max_sentence_length": 4 * _LONGEST_LINE,
        "num_threads": _TRAINER_THREADS,
        "minloglevel": 2,
    }
    for i, name in enumerate(("bos", "pad", "eos", "unk")):
        options |= {f"{name}_id": i, f"{name}_piece": SPECIALS[i]}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tsv") as rules:
        rules.writelines(f"{point:X}\t20\n" for point in SPACES)
        rules.flush()
        options["normalization_rule_tsv"] = rules.name
        try:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
        except RuntimeError as error:
            raise UserError(f"--vocab-size {vocab_size}: {_size_advice(str(error))}") from error
    return model.getvalue()


def _size_advice(reason: str) -> str:
    """The trainer's complaint in our sizes, which are one larger than its own: <mask> comes after."""
    if most := re.search(r"value <= (\d+)", reason):
        return f"this text gives at most {int(most[1]) + 1}; lower it or give more text"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return f"the characters of this text, bytes and specials take {int(least[1]) + 1} already; raise it"
    return f"cannot train on this text: {reason.strip().rpartition('] ')[2]}"


def _lines(texts: Iterable[str], reserved: Counter[str]) -> Iterator[str]:
    """Non-empty lines, cut to the trainer's limit and at what it keeps for itself, which is counted in
    `reserved`. Encoding by line equals encoding the whole document."""

    def cut(found: re.Match[str]) -> str:
        reserved[f"{found[0]}>" if found[0] != "\u2585" else "U+2585"] += 1
        return f"{found[0]}\n".removeprefix("\u2585")

    for text in texts:
        for line in _RESERVED.sub(cut, text).split("\n"):
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


def _word_starts(pieces: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which pieces begin a word, by the convention that marks most pieces of this vocabulary.

    U+2581 marks a space before a piece (SentencePiece); so does U+0120 in byte-level BPE, where the
    other white space bytes have letters of their own; "##" marks a continuation (WordPiece).
    Without any: each its own word.
    """
    rules = {
        "\u2581": ("\u2581",),
        "\u0120": (
            "\u0120",
            "\u010a",
            "\u010d",
            "\u0109",
        ),  # space, line feed, carriage return, tab
        "##": (),
    }
    mark = _mark(pieces)
    if not mark:
        return np.ones(len(pieces), dtype=bool)
    if mark == "##":
        return np.array([not piece.startswith("##") for piece in pieces])
    return np.array([piece.startswith(rules[mark]) for piece in pieces])


def _mark(pieces: Sequence[str]) -> str:
    """The one of three marks that most pieces of a vocabulary have, empty if none has any."""
    counts = {mark: sum(piece.startswith(mark) for piece in pieces) for mark in ("\u2581", "\u0120", "##")}
    mark = max(counts, key=lambda key: counts[key])
    return mark if counts[mark] else ""


_NO_SPACES = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Han and kana."""
_NO_SPACES_IN_BYTES = re.compile("[\u00e3-\u00e9]|\u00e0[\u00b8-\u00bb]")
"""The first bytes of Han and kana, and of Thai and Lao, in the letters of byte-level BPE."""


def _unspaced(pieces: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which pieces begin with a letter, not with a mark above or below one, of these scripts."""
    if _mark(pieces) == "\u0120":
        return np.array([bool(_NO_SPACES_IN_BYTES.match(piece)) for piece in pieces])
    texts = [piece.removeprefix("##") for piece in pieces]
    return np.array(
        [bool(_NO_SPACES.match(text)) and unicodedata.category(text[0])[0] == "L" for text in texts]
    )


# The SentencePiece model file is a protobuf message. Reading and rewriting a few of its fields is done here,
# for sentencepiece's generated module cannot be loaded beside the copy that transformers has of it: protobuf
# refuses the second message of a name, whichever comes first.

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Piece types of sentencepiece_model.proto."""

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # fields of SentencePiece
_MODEL_TYPE, _VOCAB_SIZE = 3, 4  # fields of TrainerSpec
_RULE_FILE = 6  # field of NormalizerSpec
_VARINT, _BYTES, _FLOAT = 0, 2, 5  # wire types
_WIDTHS = {1: 8, _FLOAT: 4}


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary."""

    text: str
    score: float
    type: int


class _Field(NamedTuple):
    number: int
    wire: int
    value: bytes


def model_pieces(model: bytes) -> list[Piece]:
    """Return the pieces of a ``tokenizer.model``'s content in id order, with the scores and types that an
    exporter needs."""
    return [_piece(field.value) for field in _parse(model) if field.number == _PIECE]


def _piece(message: bytes) -> Piece:
    values = {field.number: field.value for field in _parse(message)}
    score = struct.unpack("<f", values[_SCORE])[0] if _SCORE in values else 0.0
    kind = _read_varint(values[_TYPE], 0)[0] if _TYPE in values else NORMAL
    return Piece(values[_TEXT].decode(), score, kind)


def _trainer_field(model: bytes, number: int) -> int | None:
    for spec in (field.value for field in _parse(model) if field.number == _TRAINER):
        for field in _parse(spec):
            if field.number == number:
                return _read_varint(field.value, 0)[0]
    return None


def _finish_model(model: bytes, vocab_size: int, round_scores: bool) -> bytes:
    """The model with <mask> appended as a CONTROL piece, scores on the grid and no path of this
    machine in it."""
    fields = [field for field in _parse(model) if field.number != _PIECE]
    pieces = [_piece(field.value) for field in _parse(model) if field.number == _PIECE]
    if round_scores:
        pieces = [
            p._replace(score=round(p.score * _SCORE_GRID) / _SCORE_GRID) if p.type == NORMAL else p
            for p in pieces
        ]
    pieces.append(Piece(SPECIALS[-1], 0.0, CONTROL))
    assert len(pieces) == vocab_size
    specs = {
        _TRAINER: lambda spec: _replace(spec, _Field(_VOCAB_SIZE, _VARINT, _varint(vocab_size))),
        _NORMALIZER: lambda spec: _replace(spec, _Field(_RULE_FILE, _BYTES, b"")),
    }
    return _serialize(
        [_Field(_PIECE, _BYTES, _piece_message(piece)) for piece in pieces]
        + [f._replace(value=specs[f.number](f.value)) if f.number in specs else f for f in fields]
    )


def _piece_message(piece: Piece) -> bytes:
    return _serialize(
        [
            _Field(_TEXT, _BYTES, piece.text.encode()),
            _Field(_SCORE, _FLOAT, struct.pack("<f", piece.score)),
            _Field(_TYPE, _VARINT, _varint(piece.type)),
        ]
    )


def _replace(message: bytes, new: _Field) -> bytes:
    return _serialize([f for f in _parse(message) if f.number != new.number] + [new])


def _parse(message: bytes) -> list[_Field]:
    """Fields of one protobuf message in file order; nested messages stay bytes."""
    fields, at = [], 0
    while at < len(message):
        key, start = _read_varint(message, at)
        wire = key & 7
        if wire == _BYTES:
            length, start = _read_varint(message, start)
            at = start + length
        elif wire == _VARINT:
            at = _read_varint(message, start)[1]
        else:
            at = start + _WIDTHS[wire]
        fields.append(_Field(key >> 3, wire, message[start:at]))
    return fields


def _serialize(fields: Sequence[_Field]) -> bytes:
    out = bytearray()
    for number, wire, value in fields:
        out += _varint(number << 3 | wire)
        if wire == _BYTES:
            out += _varint(len(value))
        out += value
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Value of the varint at `at`, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
