"""tokenizer.json with exactly the training tokenizer's ids.

A SentencePiece model of ours is rebuilt from the stages of the `tokenizers` package; a tokenizer.json is
taken as it is. The idea that makes ids equal on every text is in the training (`pretrain.data.tokenizer`):
spaces are normalised by a table of code points, unigram scores lie on a grid where sums are exact.

The traps, all silent: `Precompiled` works on grapheme clusters and eats combining marks, so spaces are
replaced by a pattern; control and byte pieces keep SentencePiece's score 0 unless it is lowered, and
then the letters `<mask>` in a text become the special id; without `tokenizer_class` a roberta config
loads a byte-level tokenizer and garbage ids.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as JsonTokenizer

from pretrain.data.tokenizer import (
    JSON_FILE,
    NORMAL,
    SPACES,
    SPECIALS,
    Piece,
    Tokenizer,
    model_pieces,
    read_json_tokenizer,
)
from pretrain.errors import UserError

_SPACE = "\u2581"
_NEVER = -1000.0
"""Score of pieces that text must not reach: below any sum of known pieces over their letters."""

CHECK_TEXTS = (
    "",
    " ",
    "a",
    "  two  spaces, \t tab,\nnew line \r\n and the end  ",
    "1,000,000.00 000000000000 0x1F 3.14159",
    "<s> </s> <pad> <unk> <mask> <0x41> <mask><mask>",
    "caf\u00e9 cafe\u0301 e\u0301\u0323 \u1eb9\u0301 na\u00efve A\u030a\u0327",
    "\u2581leading \u2581\u2581 inside\u2581 \u2581",
    "\u00a0no\u00a0break\u2003em\u3000wide\u200bzero\u2028line\u2029paragraph\u0085next",
    "\ufb01 \u2460 \uff21\uff22 \u00bd \u2122 \u1112\u1161\u11ab \uac00 \uff76\uff9e \u2126 \u212b",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0e44\u0e17\u0e22",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ue000 \U0010ffff",
    "\x00\x01\x07\x1b[0m\x7f \ufeffmark \ufffd \u00ad soft",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    'https://example.org/a?b=c&d=%20#e user@example.org C:\\dir\\file.txt {"k": [1, 2]} a_b-c/d\u2014e',
)
"""Where tokenizers differ: white space, marks, literal specials, bytes, long runs, digits."""


def hugging_face_tokenizer(ours: Tokenizer) -> JsonTokenizer:
    """Return the tokenizer with its specials recognised in text.

    Encoding adds <s> and </s>.
    """
    if ours.kind == "json":
        return _completed(read_json_tokenizer(ours.path, ours.content))
    pieces = model_pieces(ours.content)
    tokenizer = JsonTokenizer(_bpe(pieces) if ours.kind == "bpe" else _unigram(pieces))
    spaces = "".join(map(chr, SPACES))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"[{spaces}]"), " "),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r" \z"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first", split=True)
    if lonely := _letters_without_a_piece(pieces):
        cut = pre_tokenizers.Split(Regex(f"[{re.escape(lonely)}]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, cut])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, lstrip=name == SPECIALS[-1]) for name in SPECIALS]
    )
    return _completed(tokenizer)


def _letters_without_a_piece(pieces: Sequence[Piece]) -> str:
    """Letters of the special and byte pieces' names that no text piece has.

    An unknown letter costs more than the lowest score, so that `<mask>` would be cheaper as the special
    piece than letter by letter. A letter that stands alone in any case may be cut out beforehand.
    """
    known = {letter for p in pieces if p.type == NORMAL for letter in p.text}
    named = {letter for p in pieces if p.type != NORMAL for letter in p.text}
    return "".join(sorted(named - known))


def _unigram(pieces: Sequence[Piece]) -> models.Unigram:
    scores = [(p.text, p.score if p.type == NORMAL else _NEVER) for p in pieces]
    unk = next(i for i, p in enumerate(pieces) if p.text == "<unk>")
    return models.Unigram(scores, unk_id=unk, byte_fallback=True)


def _bpe(pieces: Sequence[Piece]) -> models.BPE:
    """SentencePiece scores pieces, `tokenizers` ranks merges: every way to make a piece of two."""
    ids = {p.text: i for i, p in enumerate(pieces)}
    normal = {p.text: i for i, p in enumerate(pieces) if p.type == NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(normal, key=lambda text: -pieces[normal[text]].score):
        ways = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(left, right) for left, right in ways if left in normal and right in normal]
        merges += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _completed(tokenizer: JsonTokenizer) -> JsonTokenizer:
    """The tokenizer with the sequence specials put around a text, and nothing else."""
    names = ("<s>", "</s>") if tokenizer.token_to_id("<s>") is not None else ("[CLS]", "[SEP]")
    if tokenizer.encode("").tokens != list(names):
        bos, eos = names
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos}:0 $A:0 {eos}:0",
            f"{bos}:0 $A:0 {eos}:0 {eos}:0 $B:0 {eos}:0",
            [(name, tokenizer.token_to_id(name)) for name in names],
        )
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Return the tokenizer_config.json."""
    bos, eos = tokenizer.piece(tokenizer.bos), tokenizer.piece(tokenizer.eos)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "cls_token": bos,
        "sep_token": eos,
        "unk_token": tokenizer.piece(tokenizer.unk),
        "pad_token": tokenizer.piece(tokenizer.pad),
        "mask_token": tokenizer.piece(tokenizer.mask),
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def write_tokenizer(tokenizer: Tokenizer, output: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json to `output`."""
    hugging_face_tokenizer(tokenizer).save(str(output / JSON_FILE))
    settings = json.dumps(tokenizer_config(tokenizer, max_length), indent=2)
    (output / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError unless AutoTokenizer loads `folder` and gives the training ids on CHECK_TEXTS."""
    from transformers import AutoTokenizer

    # The folder is ours; not trusted, a model's code beside the tokenizer makes transformers ask on stdout.
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    for text in CHECK_TEXTS:
        ours = [tokenizer.bos, *tokenizer.encode(text).tolist(), tokenizer.eos]
        found = theirs(text, split_special_tokens=True)["input_ids"]
        if found != ours:
            raise UserError(
                f"{text!r} becomes {found} in Hugging Face but {ours} in training: this vocabulary was"
                " not made by tools.train_tokenizer and has no exact equivalent; train with one that was"
            )
