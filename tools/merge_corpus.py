"""Join corpora of one tokenizer into one, in the order given, in constant memory."""

from collections.abc import Sequence

from pretrain.corpus import corpus_file, merge
from tools import console
from tools.encode_corpus import summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("merge_corpus", "Join corpora of one tokenizer, in order", True)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="corpora to join")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the result")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of this name")
    args = parser.parse_args(arguments)
    files = [corpus_file(prefix, "bin") for prefix in args.prefixes]
    total = sum(file.stat().st_size for file in files if file.exists())
    with console.progress("merge", total) as advance:
        manifest = merge(args.prefixes, args.output, args.overwrite, advance)
    if args.json:
        console.print_json({"prefix": args.output} | summary(manifest))
    else:
        print(f"{args.output}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    console.run(main)
