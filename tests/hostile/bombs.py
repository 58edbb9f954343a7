"""Small files that stand for much: ``python -m tests.hostile.bombs FOLDER`` reads them all."""

import bz2
import gzip
import json
import lzma
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from pretrain import checkpoint
from pretrain.account.process import peak_resident
from pretrain.config import load_config
from pretrain.data.indexed import HEADER, MAGIC
from pretrain.data.tokenizer import load_tokenizer
from pretrain.errors import UserError
from tests.hostile.readers import READERS, make
from tools.minimal_pairs import read_all
from tools.text.files import find_files
from tools.text.readers import Rejected, open_reader

MIB = 1 << 20


def aliases(folder: Path) -> None:
    """Nine lists of ten of the one before: a billion."""
    lists = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}' if n else '1'] * 10)}]" for n in range(9)]
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "bomb.yaml").write_text(text + "deepspeed:\n  " + "\n  ".join(lists) + "\n", encoding="utf-8")
    load_config(folder / "bomb.yaml")


def holds_itself(folder: Path) -> None:
    (folder / "bomb.yaml").write_text("deepspeed: &a {b: *a}\n", encoding="utf-8")
    load_config(folder / "bomb.yaml")


def huge_config(folder: Path) -> None:
    (folder / "bomb.yaml").write_bytes(b"#" * (64 * MIB))
    load_config(folder / "bomb.yaml")


def header_of_a_gigabyte(folder: Path) -> None:
    path = folder / "run" / "checkpoints" / "step-00000003"
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 30) + b"{}")
    checkpoint.read_tensors(path)


def index_of_a_billion(folder: Path) -> None:
    head = HEADER.pack(MAGIC, 1, 8, 10**9, 10**9)
    (folder / "corpus.idx").write_bytes(head + bytes(100))
    READERS["corpus"].read(folder)


def shards_elsewhere(folder: Path) -> None:
    """A file outside of the folder is not read, though it has what is asked for."""
    index = folder / "shards" / "model.safetensors.index.json"
    (folder / "shards" / "part.safetensors").rename(folder / "part.safetensors")
    index.write_text(index.read_text(encoding="utf-8").replace('"part', '"../part'), encoding="utf-8")
    READERS["shards"].read(folder)


def pattern(folder: Path) -> None:
    """Which takes for ever to find that it does not match."""
    path = folder / "json" / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False
    }  # fmt: skip
    path.write_text(json.dumps(spec), encoding="utf-8")
    load_tokenizer(folder / "json").encode("a" * 60 + "b")


def compressed(suffix: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    """A small file of one line that is longer than a document may be."""

    def read(folder: Path) -> None:
        path = folder / f"bomb.txt{suffix}"
        path.write_bytes(content())
        with open_reader(path, max_bytes=MIB) as reader:
            for batch in reader.read(None):
                for item in batch.items:
                    assert isinstance(item, Rejected)
                    raise UserError(item.reason)

    return read


def blocks_of_one_letter() -> bytes:
    """Half a GiB in 16 KiB of zstd."""
    head = struct.pack("<IBB", 0xFD2FB528, 0, (27 - 10) << 3)
    block, last = ((128 * 1024 << 3 | bits).to_bytes(3, "little") + b"a" for bits in (2, 3))
    return head + block * ((1 << 12) - 1) + last


def pairs(folder: Path) -> None:
    (folder / "pairs.jsonl.zst").write_bytes(blocks_of_one_letter())
    read_all([str(folder / "pairs.jsonl.zst")])


def dataset_elsewhere(folder: Path) -> None:
    """A saved dataset that names a file outside of its folder."""
    (folder / "saved").mkdir()
    state = {"_data_files": [{"filename": "../../../data.arrow"}]}
    (folder / "saved" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    find_files([str(folder / "saved")])


BOMBS: dict[str, Callable[[Path], None]] = {
    "aliases": aliases,
    "an alias of itself": holds_itself,
    "huge config": huge_config,
    "header of a gigabyte": header_of_a_gigabyte,
    "index of a billion": index_of_a_billion,
    "shards elsewhere": shards_elsewhere,
    "pattern": pattern,
    "gzip": compressed(".gz", lambda: gzip.compress(bytes(64 * MIB), 1)),
    "xz": compressed(".xz", lambda: lzma.compress(bytes(64 * MIB), preset=0)),
    "bzip2": compressed(".bz2", lambda: bz2.compress(bytes(64 * MIB), 1)),
    "zstd": compressed(".zst", blocks_of_one_letter),
    "pairs": pairs,
    "dataset elsewhere": dataset_elsewhere,
}


def burst(folder: Path) -> dict[str, tuple[str, int]]:
    """What is said of each bomb, and by how much the process has grown."""
    make(folder)
    said = {}
    for name, bomb in BOMBS.items():
        before = peak()
        try:
            bomb(folder)
            said[name] = "", 0
        except UserError as error:
            said[name] = str(error), peak() - before
    return said


def peak() -> int:
    """Bytes of this process or of its largest child."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(peak_resident(), 1024 * children)


if __name__ == "__main__":
    print(json.dumps(burst(Path(sys.argv[1]))))
