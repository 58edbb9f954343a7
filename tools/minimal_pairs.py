"""How often a masked LM finds the grammatical sentence of two the more likely one.

Data are BLiMP's JSON lines (Warstadt et al. 2020, arXiv 1912.00582): sentence_good, sentence_bad, UID (the
paradigm) and field. A sentence scores its pseudo-log-likelihood, the sum of log p(token | the others) over
its tokens, each being [MASK] in a copy of its own (Salazar et al. 2020, arXiv 1910.14659: `original`). Where
a word has several pieces, those that are left give the missing one away, which flatters rare words; so
`within_word_l2r` also hides what follows a token in its word (Kauf and Ivanova 2023, arXiv 2305.10588, who
find it closer to the scores of left-to-right models, and the choice to matter on BLiMP). It is the default;
older tables have `original`.

A late-mask run answers with its decoder, as in pre-training. Equal scores are a tie and count half: a model
that cannot tell two sentences apart is at chance. Intervals are Wilson's (95 %), of pairs as if independent;
those of one paradigm come from one template, so between templates there is more spread than they say.
"""

import argparse
import json
import lzma
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.errors import UserError
from pretrain.files import named, parse_json
from tools.shared import console, downstream, outputs
from tools.shared.downstream import DownstreamScore
from tools.shared.tables import aligned, table_files, write_table
from tools.shared.unfinished import Unfinished, key_of
from tools.text.compression import decompressed
from tools.text.readers import to_utf8

if TYPE_CHECKING:
    from tools.shared.encoders import Encoder, Tokens

METRICS = ("within_word_l2r", "original")
_LONGEST = 1 << 20
"""Bytes of a line."""
KEYS = ("sentence_good", "sentence_bad", "UID", "field")
ALL = "all"
NAME, LINES = "minimal_pairs", "pairs.jsonl"
"""Of the table, and of the file with a line a pair."""
FIELDS = dict.fromkeys(("model", "paradigm", "accuracy", "ties", "metric"), "")
LINE_FIELDS = dict.fromkeys(("model", "place", "UID", "score_good", "score_bad"), "")
"""By which they are known."""
_Z = 1.959964
"""Quantile of the normal distribution: 95 % within."""


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in what a grammar is asked about."""

    good: str
    bad: str
    paradigm: str
    field: str
    data: str
    """Name of the file, without what it ends with."""
    place: str
    """FILE:LINE."""


@dataclass(frozen=True)
class Scored:
    """A pair with the pseudo-log-likelihoods of its sentences in nats."""

    pair: Pair
    good: float
    bad: float

    @property
    def point(self) -> float:
        """1 where the good sentence is the more likely one, half where none is."""
        return 0.5 if self.good == self.bad else float(self.good > self.bad)


@dataclass(frozen=True)
class Share:
    """A row of the table: the pairs of a paradigm, of a field or of a file."""

    model: str
    step: int | None
    data: str
    field: str
    paradigm: str
    pairs: int
    accuracy: float
    low: float
    high: float
    """Wilson's interval, 95 %."""
    ties: int
    """Counted as half in the accuracy."""
    metric: str


# ---- reading -------------------------------------------------------------------------------------


def read_pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a JSON-lines file, compressed or not; UserError names the first bad line."""
    data = path.name.partition(".json")[0]
    with named(path), path.open("rb") as raw:
        file = decompressed(path, raw)
        try:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
                if len(line) == _LONGEST:
                    raise UserError(f"{path}:{number}: longer than {_LONGEST:,} bytes, which is no pair")
                yield _pair(line, data, f"{path}:{number}")
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # of the disk, not of the content
                raise
            raise UserError(f"{path}: its compressed data end early or are damaged ({error})") from error


def _pair(line: bytes, data: str, place: str) -> Pair:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UserError(f"{place}: not a JSON object ({error})") from error
    good, bad, paradigm, field = (_text(record, key, place) for key in KEYS)
    if ALL in (paradigm, field):
        raise UserError(f"{place}: {ALL!r} is what the whole is called; name the UID and the field otherwise")
    if good == bad:
        raise UserError(f"{place}: both sentences are the same, which is no pair")
    return Pair(good, bad, paradigm, field, data, place)


def _text(record: Any, key: str, place: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: no text in {key!r}; a line has {', '.join(KEYS)}")
    if to_utf8(value) is None:
        raise UserError(f"{place}: half a surrogate pair in {key!r}, which is no character")
    return value


def read_all(paths: Sequence[str]) -> list[Pair]:
    """Return the pairs of all files; UserError where two files would have one name, or one has no pairs."""
    console.refuse_twice(paths, "file")
    pairs, seen = list[Pair](), dict[str, str]()
    for path in paths:
        found = list(read_pairs(Path(path)))
        if not found:
            raise UserError(f"{path}: no pairs")
        if found[0].data in seen:
            raise UserError(f"{path}: its scores would be named as those of {seen[found[0].data]}; rename it")
        seen[found[0].data] = path
        pairs += found
    return pairs


# ---- scoring -------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """A sentence in which a token is to be found."""

    sentence: int
    masked: list[int]
    """Places that are [MASK]; the first is the token's."""


def copies(tokens: "Tokens", sentence: int, metric: str) -> Iterator[Copy]:
    """Yield a copy for each token of a sentence that is no special one."""
    places = [place for place, word in enumerate(tokens.words) if word is not None]
    for at, place in enumerate(places):
        later = places[at + 1 :] if metric == "within_word_l2r" else []
        word = tokens.words[place]
        yield Copy(sentence, [place, *(other for other in later if tokens.words[other] == word)])


def pseudo_log_likelihoods(
    encoder: "Encoder",
    sentences: Sequence["Tokens"],
    metric: str,
    done: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Return the score of each sentence in nats. done: is told how many tokens were predicted."""
    import torch  # start-up time

    from tools.shared.encoders import by_shape

    todo = [copy for number, tokens in enumerate(sentences) for copy in copies(tokens, number, metric)]
    scores = [0.0] * len(sentences)
    for batch in by_shape([(len(sentences[copy.sentence].ids), len(copy.masked)) for copy in todo]):
        chosen = [todo[number] for number in batch]
        ids_BL = torch.tensor([sentences[copy.sentence].ids for copy in chosen])
        masked_BM = torch.tensor([copy.masked for copy in chosen])
        targets_B1 = ids_BL.gather(1, masked_BM[:, :1])
        logits_BW = encoder.mask_logits(ids_BL.scatter(1, masked_BM, encoder.mask_id)).float()
        found_B1 = logits_BW.log_softmax(-1).gather(1, targets_B1.to(logits_BW.device))
        for copy, score in zip(chosen, found_B1.flatten().tolist(), strict=True):
            scores[copy.sentence] += score
        done(len(chosen))
    return scores


def score_pairs(
    encoder: "Encoder", pairs: Sequence[Pair], metric: str, known: Unfinished | None = None
) -> list[Scored]:
    """Return the pairs with their scores, paradigm by paradigm; sentences that read alike are scored once.

    known: the scores of paradigms that are had already, to which the others are added.
    """
    known = Unfinished(None, NAME) if known is None else known
    ids, first = dict[str, _Ids](), dict[_Ids, tuple[tuple[str, str], "Tokens"]]()
    for pair in pairs:
        for text in (pair.good, pair.bad):
            tokens = _tokens(encoder, text, pair.place)
            ids[text] = tuple(tokens.ids)
            first.setdefault(ids[text], ((pair.data, pair.paradigm), tokens))
    paradigms = defaultdict[tuple[str, str], dict[_Ids, "Tokens"]](dict)
    for each, (paradigm, tokens) in first.items():
        paradigms[paradigm][each] = tokens
    scores = dict[_Ids, float]()
    todo = {key_of(encoder.fingerprint, metric, list(each)): each for each in paradigms.values()}
    left = [tokens for name, each in todo.items() if name not in known for tokens in each.values()]
    count = sum(word is not None for tokens in left for word in tokens.words)
    with console.counter(f"score {Path(encoder.name).name}", count, "tokens") as done:
        for name, sentences in todo.items():
            if name not in known:
                known[name] = _finite(encoder, list(sentences.values()), metric, done)
            scores |= zip(sentences, known[name], strict=True)
    return [Scored(pair, scores[ids[pair.good]], scores[ids[pair.bad]]) for pair in pairs]


_Ids = tuple[int, ...]


def _finite(
    encoder: "Encoder", sentences: Sequence["Tokens"], metric: str, done: Callable[[int], None]
) -> list[float]:
    found = pseudo_log_likelihoods(encoder, sentences, metric, done)
    if not all(map(math.isfinite, found)):
        raise UserError(f"{encoder.name}: some of its scores are no numbers; its weights are broken")
    return found


def _tokens(encoder: "Encoder", text: str, place: str) -> "Tokens":
    """Return the tokens of a sentence; UserError if there are more than the model takes."""
    tokens = encoder.tokens(text)
    if len(tokens.ids) > encoder.max_length:
        raise UserError(
            f"{place}: a sentence of {len(tokens.ids)} tokens, where {encoder.name} takes"
            f" {encoder.max_length}; leave it out"
        )
    return tokens


# ---- shares --------------------------------------------------------------------------------------


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, `right` of `count` (1927); it stays within [0, 1]."""
    share, z2 = right / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def shares(model: str, step: int | None, scored: Iterable[Scored], metric: str) -> list[Share]:
    """Return the rows of a model: each file, then its fields, each followed by its paradigms."""
    groups = dict[tuple[str, str, str], list[Scored]]()
    for each in scored:
        pair = each.pair
        for key in ((ALL, ALL), (pair.field, ALL), (pair.field, pair.paradigm)):
            groups.setdefault((pair.data, *key), []).append(each)
    files = list(dict.fromkeys(data for data, _, _ in groups))

    def order(key: tuple[str, str, str]) -> tuple[Any, ...]:
        data, field, paradigm = key
        return files.index(data), field != ALL, field, paradigm != ALL, paradigm

    rows = []
    for data, field, paradigm in sorted(groups, key=order):
        group = groups[data, field, paradigm]
        right = sum(each.point for each in group)
        ties = sum(each.good == each.bad for each in group)
        about = (model, step, data, field, paradigm, len(group))
        rows.append(Share(*about, right / len(group), *wilson(right, len(group)), ties, metric))
    return rows


# ---- the program ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    pairs = read_all(args.data)
    console.refuse_twice(args.models)
    if args.output:
        outputs.check(table_files(Path(args.output), NAME), args.data, FIELDS)
        outputs.check([Path(args.output) / LINES], args.data, LINE_FIELDS)
    # Start-up time; and late-mask exports are loaded by our code, whatever lies in them.
    from tools.export.huggingface import register_late_models
    from tools.shared.encoders import is_run, open_encoder

    register_late_models()
    for model in args.models:
        if folder := model if is_run(model, args.checkpoint) else args.output:
            downstream.check(folder)
    rows, scored, known = list[Share](), list[dict[str, Any]](), Unfinished(args.output, NAME)
    for model, label in console.labels(args.models).items():
        encoder = open_encoder(model, args.checkpoint, head=True)
        folder = args.output if encoder.step is None else model
        found = score_pairs(encoder, pairs, args.metric, known)
        rows += (of_model := shares(label, encoder.step, found, args.metric))
        scored += [{"model": label, **_line(each)} for each in found]
        if folder:
            downstream.record(folder, _downstream(of_model, model, encoder.averaged))
    if args.output:
        write_table(Path(args.output), NAME, [asdict(row) for row in rows], FIELDS)
        lines = "".join(json.dumps(line) + "\n" for line in scored)
        outputs.write(Path(args.output) / LINES, lines, LINE_FIELDS)
    known.finish()
    if args.json:
        console.print_json(rows)
    else:
        print(text(rows))
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = console.parser(
        "minimal_pairs", "Share of minimal pairs whose good sentence is the more likely", reports=True
    )
    parser.add_argument("models", nargs="+", metavar="RUN|DIR", help="runs, or Hugging Face masked LMs")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="F", help="BLiMP's JSON lines [.gz .zst .bz2 .xz]"
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default=METRICS[0],
        help="what is hidden beside a token: what follows it in its word, or nothing (%(default)s)",
    )
    console.add_checkpoint(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the table (CSV, JSON), each pair's scores, and downstream.jsonl of folders that are"
        " no runs (runs keep their own); with it a command that was interrupted goes on",
    )
    return parser.parse_args(arguments)


def _line(scored: Scored) -> dict[str, Any]:
    """Return a line of pairs.jsonl."""
    pair = scored.pair
    about = {"place": pair.place, "field": pair.field, "UID": pair.paradigm}
    return about | {"score_good": scored.good, "score_bad": scored.bad}


def _downstream(rows: Iterable[Share], path: str, averaged: str) -> list[DownstreamScore]:
    """Return the scores of whole files."""
    return [
        DownstreamScore(
            step=row.step,
            task=row.data,
            metric="accuracy",
            score=row.accuracy,
            n=row.pairs,
            protocol=downstream.of_mean(f"minimal_pairs {row.metric}", averaged),
            model=path if row.step is None else "",
        )
        for row in rows
        if row.field == ALL
    ]


def text(rows: Sequence[Share]) -> str:
    """Return for people a row for each file, field and paradigm, a column for each model."""
    models = list(dict.fromkeys(row.model for row in rows))
    by_model = [[row for row in rows if row.model == model] for model in models]
    lines = [["", "pairs", *models]]
    for across in zip(*by_model, strict=True):
        first = across[0]
        name = first.data if first.field == ALL else f"  {first.field}"
        name = name if first.paradigm == ALL else f"    {first.paradigm}"
        found = [f"{row.accuracy:.1%} ({row.low:.1%} to {row.high:.1%})" for row in across]
        lines.append([name, f"{first.pairs:,}", *found])
    ties = [
        f"{model}: {ties:,} ties, counted as half"
        for model, of_model in zip(models, by_model, strict=True)
        if (ties := sum(row.ties for row in of_model if row.field == ALL))
    ]
    told = f"good sentence more likely ({rows[0].metric}), 95 % interval (Wilson)"
    return "\n".join([told, "", aligned(lines, names=2), *([""] if ties else []), *ties])


if __name__ == "__main__":
    console.run(main)
