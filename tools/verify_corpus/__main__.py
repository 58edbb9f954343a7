"""Check every byte of corpora against their manifests, write the manifest of a foreign one, or look for
text that two corpora share."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain import __version__
from pretrain.data.indexed import IndexedReader, corpus_file
from pretrain.data.manifest import Origin, load_manifest
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.data.verify import adopt, verify
from pretrain.data.writer import EXTENSIONS
from pretrain.errors import UserError
from tools.encode_corpus.parts import tokenizer_record
from tools.inspect_corpus.__main__ import frequencies, specials_inside
from tools.shared import console
from tools.shared.corpus import summary
from tools.verify_corpus.coverage import check_coverage, describe_coverage
from tools.verify_corpus.overlap import overlap


def _check_overlap(args: Namespace) -> int:
    """Print how much of each corpus stands in the other one."""
    reports = []
    for prefix in args.prefixes:
        mine, other = IndexedReader(prefix), IndexedReader(args.check_overlap)
        record = load_manifest(prefix).tokenizer
        if record is None or record.hash != getattr(
            load_manifest(args.check_overlap).tokenizer, "hash", None
        ):
            raise UserError(f"{prefix}: not of the same tokenizer as {args.check_overlap}")
        tokenizer = load_tokenizer(args.tokenizer or record.path, need_specials=False)
        total = mine.tokens.nbytes + other.tokens.nbytes
        with console.progress("compare", total) as advance:
            reports.append({"prefix": prefix} | overlap(mine, other, tokenizer, advance))
    if args.json:
        console.print_json(reports)
        return 0
    for report in reports:
        print(
            f"{report['prefix']}: {report['share']:.3%} of {report['runs']:,} runs of {report['run_length']}"
            f" words are in {args.check_overlap}; {report['documents_with_overlap']:,} of"
            f" {report['documents']:,} documents share some"
        )
        for worst in report["worst"]:
            print(f"  document {worst['document']}: {worst['share']:.1%}")
    return 0


def specials_of(prefix: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how often each special piece stands in a corpus, and which of them ends how many documents."""
    reader = IndexedReader(prefix)
    names = {i: name for name, i in tokenizer.special_names().items()}
    ends = reader.document_offsets + reader.document_lengths
    last, numbers = np.unique(reader.tokens[ends[reader.document_lengths > 0] - 1], return_counts=True)
    return {
        "specials": specials_inside(frequencies(reader, tokenizer.vocab_size), tokenizer),
        "last": {names[i]: int(n) for i, n in zip(last.tolist(), numbers, strict=True) if i in names},
    }


def describe_specials(report: dict[str, Any]) -> list[str]:
    """Return the lines that say what is in a foreign corpus besides text; none where there is nothing."""
    lines = []
    if found := report.get("specials"):
        told = ", ".join(f"{name} {count:,}" for name, count in found.items())
        lines.append(f"special pieces inside, which training takes for text: {told} times")
    for name, count in report.get("last", {}).items():
        lines.append(
            f"{count:,} documents end in {name}; training puts an end of its own after each: better written "
            "without (Megatron's --append-eod)"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("verify_corpus", "Check every byte against the manifest", True)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="corpora to check")
    parser.add_argument(
        "--write-manifest",
        action="store_true",
        help="make the missing PREFIX.json of Megatron files that another program wrote",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="of those files, with --write-manifest")
    parser.add_argument(
        "--check-overlap",
        metavar="OTHER",
        help="instead: how many runs of 13 words of PREFIX (held-out text) occur in OTHER (training text); "
        "a document of fewer words counts where all of it is a document of OTHER",
    )
    args = parser.parse_args(arguments)
    for prefix in args.prefixes:
        stem, _, extension = prefix.rpartition(".")
        if extension in EXTENSIONS and not corpus_file(prefix, "bin").exists():
            raise UserError(f"{prefix}: give the prefix, {stem}")
    if args.check_overlap:
        return _check_overlap(args)
    if args.write_manifest != bool(args.tokenizer):
        raise UserError("--write-manifest and --tokenizer DIR belong together; give both or none")
    if args.write_manifest:
        for prefix in args.prefixes:
            if corpus_file(prefix, "json").exists():
                raise UserError(f"{prefix}.json: exists already; verify it without --write-manifest")
    files = [corpus_file(prefix, end) for prefix in args.prefixes for end in ("bin", "idx")]
    total = sum(file.stat().st_size for file in files if file.exists())
    origin = Origin(history={"version": __version__, "adopted": True})
    manifests = []
    with console.progress("verify", total) as advance:
        if args.write_manifest:
            tokenizer = load_tokenizer(args.tokenizer, need_specials=False)
            record = tokenizer_record(args.tokenizer, tokenizer)
            origin = origin.model_copy(update={"tokenizer": record})
        for prefix in args.prefixes:
            manifests.append(
                adopt(prefix, origin, advance) if args.write_manifest else verify(prefix, advance)
            )
    reports: list[dict[str, Any]] = [
        {"prefix": prefix, "good": True, "sealed": bool(manifest.seal)} | summary(manifest)
        for prefix, manifest in zip(args.prefixes, manifests, strict=True)
    ]
    if not args.write_manifest:
        for report, manifest in zip(reports, manifests, strict=True):
            report |= {"inputs": check_coverage(report["prefix"], manifest)}
    if args.write_manifest:
        for report in reports:
            report |= specials_of(report["prefix"], tokenizer)
    if args.json:
        console.print_json(reports)
        return 0
    for report in reports:
        print(
            f"{report['prefix']}: good, {report['documents']:,} documents, "
            f"{report['tokens']:,} tokens, fingerprint {report['fingerprint'][:16]}"
        )
        for line in [*describe_specials(report), *describe_coverage(report.get("inputs"))]:
            print(f"  {line}")
        if not report["sealed"]:
            print(
                "  its manifest has no seal, being older: nothing protects bytes of text, names of sources, "
                "inputs and history"
            )
    return 0


if __name__ == "__main__":
    console.run(main)
