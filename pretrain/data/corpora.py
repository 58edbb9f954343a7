"""Opens what a run reads: its corpora and its tokenizer, checked against each other."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.config import Config, CorpusOptions
from pretrain.data import rng
from pretrain.data.document_order import order_bytes, scratch
from pretrain.data.indexed import IndexedReader, corpus_file, index_bytes
from pretrain.data.manifest import load_manifest, refuse_appended_end
from pretrain.data.sampler import Blend, Sampler, Segment, used_samples
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.errors import UserError


def tokenizer_folder(corpus: CorpusOptions) -> str:
    """Return the tokenizer's folder: the one that the options name, else the one that the manifest names."""
    if corpus.tokenizer:
        return corpus.tokenizer
    prefix = corpus.blend[0][1]
    record = load_manifest(prefix).tokenizer
    if record is None:
        raise UserError(f"{prefix}: its manifest names no tokenizer; set corpus.tokenizer")
    return record.path


def copy_of(prefix: str | Path, copies: str | Path) -> Path:
    """Return the prefix of a copy of a corpus in the folder `copies`, there or not: its name and
    fingerprint."""
    return Path(copies) / f"{Path(prefix).name}-{load_manifest(prefix).fingerprint[:16]}"


def open_nearest(prefix: str, copies: str | None) -> "IndexedReader":
    """Return the corpus, from its copy in the folder `copies` if that has a whole one (`slurm.stage`)."""
    copy = copy_of(prefix, copies) if copies else None
    return IndexedReader(prefix, copy if copy and is_copy(prefix, copy) else None)


def is_copy(prefix: str | Path, copy: str | Path) -> bool:
    """Return whether `copy` is the user's own and its manifest and file sizes are those of the corpus.

    Its bytes were compared when it was made; whoever stages it compares them again.
    """
    try:
        files = [(corpus_file(prefix, end), corpus_file(copy, end)) for end in ("bin", "idx")]
        own = all(theirs.stat().st_uid == os.getuid() for _, theirs in files)
        same = all(ours.stat().st_size == theirs.stat().st_size for ours, theirs in files)
        return own and same and load_manifest(copy).fingerprint == load_manifest(prefix).fingerprint
    except (UserError, OSError):
        return False


@dataclass(frozen=True)
class Mapped:
    """Bytes that grow with the documents of a run, which the processes of a node map together."""

    indexes: int
    orders: int
    """Of two epochs, around the end of one; files in `scratch`."""

    @property
    def total(self) -> int:
        return self.indexes + self.orders


def mapped(corpus: CorpusOptions) -> Mapped:
    """Return what the training corpora need by their manifests; UserError where one has none."""
    manifests = [load_manifest(prefix) for _, prefix in corpus.blend]
    return Mapped(
        indexes=sum(index_bytes(manifest.sequences, manifest.documents + 1) for manifest in manifests),
        orders=sum(2 * order_bytes(manifest.documents) for manifest in manifests),
    )


@dataclass(frozen=True)
class Data:
    """The corpora and the tokenizer of a run, checked against each other."""

    tokenizer: Tokenizer
    corpora: list[IndexedReader]
    blend: list[tuple[float, str]]
    """(weight, fingerprint) of each of them."""
    fingerprints: dict[str, str]
    rules: rng.Rules = rng.RULES
    """By which samples and masks are drawn: those that the run began with."""
    orders: Path = field(default_factory=lambda: scratch(None))
    """Folder of the node's orders of documents."""


def open_data(corpus: CorpusOptions) -> Data:
    """Open what `corpus` names; UserError if something is missing or does not fit together."""
    folder, blend = tokenizer_folder(corpus), []
    tokenizer = load_tokenizer(folder)
    for weight, prefix in corpus.blend:
        manifest = load_manifest(prefix)
        if manifest.tokenizer and manifest.tokenizer.hash != tokenizer.hash:
            raise UserError(
                f"corpus.tokenizer = {folder}: not the one that {prefix} was encoded with"
                f" ({manifest.tokenizer.path}); give that one, or encode the corpus again"
            )
        refuse_appended_end(prefix, manifest)
        blend.append((weight, manifest.fingerprint))
    fingerprints = {"tokenizer": tokenizer.hash}
    if len(blend) == 1:
        fingerprints["train"] = blend[0][1]
    corpora = [open_nearest(prefix, corpus.copies) for _, prefix in corpus.blend]
    return Data(tokenizer, corpora, blend, fingerprints, orders=scratch(corpus.copies))


def open_blend(config: Config, data: Data, segments: Sequence[Segment] = ()) -> Blend:
    """Return what reads the samples of a run, in the last of its segments."""
    masking, length, tokenizer = config.masking, config.train.seq_length, data.tokenizer
    seed, bos, eos = config.run.data_seed, tokenizer.bos, tokenizer.eos
    # The corpus that the run began with keeps the plain seed, whether others join it or not.
    began_with = segments[0].blend[0][1] if segments else data.blend[0][1]
    samplers = [
        Sampler(
            corpus,
            masking,
            length,
            seed,
            bos,
            eos,
            "" if name == began_with else name,
            data.rules,
            data.orders,
        )
        for corpus, (_, name) in zip(data.corpora, data.blend, strict=True)
    ]
    by_name = {name: sampler for (_, name), sampler in zip(data.blend, samplers, strict=True)}
    used = used_samples(segments, by_name)
    first = segments[-1].first if segments else 0
    weights = [weight for weight, _ in data.blend]
    return Blend(samplers, weights, first, [used[name] for _, name in data.blend])
