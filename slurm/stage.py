"""A checked copy of the training corpora on a node's own disk; one process on each node.

    srun --ntasks-per-node=1 python -m slurm.stage CONFIG --to /scratch/latemask
    ... python -m pretrain CONFIG corpus.copies=/scratch/latemask

Copies are named by the corpus's fingerprint. The manifest is written last, after every byte was read back
and compared with its checksums. A copy that is there is compared again, and replaced where it differs.
"""

import glob
import os
import shutil
import sys
from pathlib import Path

from pretrain.config import load_config
from pretrain.data.corpora import copy_of, is_copy
from pretrain.data.indexed import corpus_file
from pretrain.data.verify import verify
from pretrain.errors import UserError
from pretrain.files import own_folder
from tools.shared import console


def copy(prefix: str, folder: Path) -> tuple[Path, bool]:
    """Return the copy's prefix, and whether it was made now; UserError if it differs from what it should
    be."""
    target = copy_of(prefix, own_folder(folder))
    if _is_good(prefix, target):
        return target, False
    for extension in ("json", "bin", "idx", "src"):  # planted, stale or damaged
        corpus_file(target, extension).unlink(missing_ok=True)
    partial = Path(f"{target}.{os.getpid()}")
    try:
        for extension in ("bin", "idx", "src", "json"):
            source = corpus_file(prefix, extension)
            if source.exists():
                shutil.copyfile(source, corpus_file(partial, extension))
        verify(partial)
        for extension in ("bin", "idx", "src", "json"):
            if (file := corpus_file(partial, extension)).exists():
                os.replace(file, corpus_file(target, extension))
    finally:
        for file in folder.glob(f"{glob.escape(partial.name)}.*"):
            file.unlink()
    return target, True


def _is_good(prefix: str, target: Path) -> bool:
    try:
        verify(target)
    except UserError:
        return False
    return is_copy(prefix, target)


def main() -> int:
    parser = console.parser("stage", __doc__.partition("\n")[0], package="slurm")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder on the node's own disk")
    args = parser.parse_args()
    node, blend = os.uname().nodename, load_config(args.config).corpus.blend
    try:
        for _, prefix in blend:
            target, new = copy(prefix, args.to)
            megabytes = corpus_file(target, "bin").stat().st_size / 1e6
            print(f"{node}: {prefix}: {'copied' if new else 'there already'}, {megabytes:,.1f} MB, {target}")
    except (UserError, OSError) as error:
        print(f"{node}: no copy of the corpus, the original is read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    console.run(main)
