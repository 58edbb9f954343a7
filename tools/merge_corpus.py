"""Join corpora of one tokenizer into one, in the order given, in constant memory."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.data.indexed import corpus_file
from pretrain.data.writer import merge
from pretrain.files import check_folder
from tools.shared import console
from tools.shared.corpus import show_corpus


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("merge_corpus", "Join corpora of one tokenizer, in order", True)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="corpora to join")
    console.add_output_prefix(parser)
    args = parser.parse_args(arguments)
    console.refuse_twice(args.prefixes, "corpus", ".bin")
    check_folder(Path(args.output).parent)
    files = [corpus_file(prefix, "bin") for prefix in args.prefixes]
    total = sum(file.stat().st_size for file in files if file.exists())
    with console.progress("merge", total) as advance:
        manifest = merge(args.prefixes, args.output, args.overwrite, advance)
    show_corpus(args.output, manifest, args.json)
    return 0


if __name__ == "__main__":
    console.run(main)
