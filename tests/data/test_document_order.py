"""Orders of many documents: a file that the processes of a node share, against arrays in memory."""

import os
import resource
import signal
import tempfile
from multiprocessing import get_context

import numpy as np
import pytest

from pretrain import __main__ as pretrain
from pretrain.config import MaskingOptions
from pretrain.data import document_order as place
from pretrain.data import rng
from pretrain.data.indexed import IndexedReader
from pretrain.data.sampler import Sampler
from pretrain.data.writer import CorpusWriter
from tests.support import runs
from tests.support.ranks import PATIENCE

SPAWN = get_context("spawn")


def write(prefix, lengths):
    """Documents of so many tokens each."""
    with CorpusWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.append_documents(np.arange(lengths.sum()).astype(np.uint16), lengths)
        writer.finish()


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A corpus whose orders are in files although it is small, and what is to be read of it."""
    lengths = np.random.default_rng(5).integers(0, 30, 3000)
    lengths[-1] = 40
    write(tmp_path / "c", lengths)
    expected = read(tmp_path / "c", None)
    monkeypatch.setattr(place, "MANY", 0)
    return tmp_path / "c", expected


def read(prefix, folder, epochs=(0,), seed=3):
    sampler = Sampler(IndexedReader(prefix), MaskingOptions(), 12, seed, 1, 2, folder=folder)
    epoch = np.arange(sampler.samples_per_epoch)
    return np.concatenate([sampler.read(number * len(epoch) + epoch).tokens for number in epochs])


@pytest.mark.parametrize("rules", [rng.Rules(1), rng.Rules(2)])
@pytest.mark.parametrize("documents", [1, 7, 100, 5000])
def test_many_documents_are_read_as_few_are(documents, rules, tmp_path, monkeypatch):
    """In the same order, with the same bounds, whether their order is in memory or in a file."""
    lengths = np.random.default_rng(documents).integers(0, 30, documents)
    lengths[-1] = 40
    write(tmp_path / "c", lengths)
    corpus = IndexedReader(tmp_path / "c")
    monkeypatch.setattr(place, "CHUNK", 64)  # an epoch's order is added up in several stretches

    def read():
        sampler = Sampler(corpus, MaskingOptions(), 12, 3, 1, 2, rules=rules, folder=tmp_path / "orders")
        samples = np.arange(2 * sampler.samples_per_epoch)
        return [*sampler.read(samples), sampler.documents(samples)]

    few = read()
    assert not (tmp_path / "orders").exists()
    monkeypatch.setattr(place, "MANY", 0)
    for one, other in zip(few, read(), strict=True):
        assert np.array_equal(one, other)
    assert (tmp_path / "orders").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "orders").iterdir():
        assert file.stat().st_size == place.order_bytes(np.count_nonzero(lengths))


def test_orders_are_each_of_one_corpus_seed_and_epoch(many, tmp_path):
    prefix, expected = many
    orders = tmp_path / "orders"
    assert np.array_equal(read(prefix, orders), expected)
    assert not np.array_equal(read(prefix, orders, seed=4), expected)
    write(tmp_path / "other", np.full(3000, 15))
    read(tmp_path / "other", orders)
    assert len(list(orders.iterdir())) == 3
    read(prefix, orders, epochs=(1, 2))  # of epochs that are over none is kept
    assert len(list(orders.iterdir())) == 4
    assert np.array_equal(read(prefix, orders), expected)


def start_together(barrier, prefix, folder, found):
    """Reads at the same time as others do, twice, as a run in phases does, and stays until all have; tells
    what it read, and how often it wrote an order."""
    place.MANY, said = 0, []
    place.log.info = lambda *args: said.append(args)
    corpus = IndexedReader(prefix)
    samplers = [Sampler(corpus, MaskingOptions(), 12, 3, 1, 2, folder=folder) for _ in range(2)]
    barrier.wait(PATIENCE)
    one, other = (sampler.read(np.arange(sampler.samples_per_epoch)).tokens for sampler in samplers)
    assert np.array_equal(one, other)
    barrier.wait(PATIENCE)
    found.put((one.tobytes(), len(said)))


def test_one_of_many_starts_writes_the_order(many, tmp_path):
    prefix, expected = many
    barrier, found = SPAWN.Barrier(4), SPAWN.Queue()
    arguments = barrier, prefix, tmp_path / "orders", found
    processes = [SPAWN.Process(target=start_together, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [found.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    assert {tokens for tokens, _ in answers} == {expected.tobytes()}
    assert sorted(written for _, written in answers) == [0, 0, 0, 1]


def test_ranks_train_on_one_order(tiny, words, tmp_path):
    """In phases, so that each opens it twice, and as a rank does that has it for itself."""
    assert place.MANY == 1_000_000
    tokens = np.random.default_rng(0).integers(5, 390, place.MANY, np.uint16)
    with CorpusWriter(tmp_path / "many", tokens.dtype) as writer:
        writer.append_documents(tokens, np.ones(place.MANY, np.int64))
        writer.finish()
    options = [f"corpus.train={tmp_path / 'many'}", f"corpus.tokenizer={tiny / 'tokenizer'}"]
    options += ["train.phases=[{until: 0.5, seq_length: 16}]", "budget.steps=4"]
    said = runs.finish(words("two", *options, f"corpus.copies={tmp_path / 'orders'}"), ranks=2)
    (order,) = (tmp_path / "orders").iterdir()
    assert order.stat().st_size == place.order_bytes(place.MANY)
    assert said.text.count("order       of the documents of an epoch") == 1
    said = runs.finish(words("one", *options, f"corpus.copies={order}"))
    assert "each process has the order of 1,000,000 documents for itself, 0.016 GB" in said.text
    one, two = (np.array(runs.losses(tmp_path / name), float) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_a_dry_run_leaves_no_order(tiny, words, tmp_path, monkeypatch):
    monkeypatch.setattr(place, "MANY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for more in ([], [f"corpus.copies={tmp_path / 'copies'}"]):
        assert pretrain.main([*words("a", *more), "--dry-run"]) == 0
        assert not list(tmp_path.rglob("*.order"))


def die_while_writing(prefix, folder):
    """Is killed when half of the order is written."""
    place.MANY, place.CHUNK = 0, 1024
    whole = place.DocumentOrder._parts

    def half(order):
        for number, part in enumerate(whole(order)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield part

    place.DocumentOrder._parts = half
    read(prefix, folder)


def test_a_killed_start_leaves_an_order_that_is_written_again(many, tmp_path):
    prefix, expected = many
    process = SPAWN.Process(target=die_while_writing, args=(prefix, tmp_path / "orders"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "orders").iterdir()
    assert left.read_bytes()[:64] == bytes(64)
    assert np.array_equal(read(prefix, tmp_path / "orders"), expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, other: content[:-9] + b"x" + content[-8:],
        lambda content, other: content[:-8],
        lambda content, other: content + bytes(8),
        lambda content, other: bytes(64) + content[64:],
        lambda content, other: b"",
        lambda content, other: other,
    ],
    ids=["a byte", "short", "long", "no seal", "empty", "another epoch's"],
)
def test_an_order_that_is_not_whole_is_written_again(damage, many, tmp_path):
    prefix, expected = many
    orders = tmp_path / "orders"
    read(prefix, orders, epochs=(0, 1))
    path, other = sorted(orders.iterdir())
    whole = path.read_bytes()
    path.write_bytes(damage(whole, other.read_bytes()))
    assert np.array_equal(read(prefix, orders), expected)
    assert path.read_bytes() == whole


def test_without_a_folder_of_ones_own_the_order_is_in_memory(many, tmp_path, caplog):
    """The folder is a file, or everybody's; or the disk is full, of which nothing is left behind."""
    prefix, expected = many
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, why in (("file", "File exists"), ("open", "others may write there")):
        caplog.clear()
        assert np.array_equal(read(prefix, tmp_path / name), expected)
        assert f"warning: {tmp_path / name}: {why}" in caplog.text
        assert "set corpus.copies to a folder of your own with room" in caplog.text
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        assert np.array_equal(read(prefix, tmp_path / "orders"), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large" in caplog.text and not list((tmp_path / "orders").iterdir())


def private_bytes(prefix, folder):
    """Of this process alone, more once two epochs have been read from than before the corpus was opened."""
    before = dirty_bytes()
    sampler = Sampler(IndexedReader(prefix), MaskingOptions(), 128, 0, 1, 2, folder=folder)
    sampler.read(np.arange(8))
    sampler.read(np.arange(8) + sampler.samples_per_epoch)  # two epochs' orders at once
    return dirty_bytes() - before


def dirty_bytes():
    """What no other process could share: pages of mapped files are the kernel's to share and to drop."""
    with open("/proc/self/smaps_rollup", encoding="utf-8") as lines:
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def test_memory_of_a_rank_by_documents(tmp_path):
    """At most 1 GB for C4's 365 million documents, from two sizes."""
    sizes, held = (1_500_000, 4_500_000), []
    for size in sizes:
        write(tmp_path / str(size), np.full(size, 3))
        with SPAWN.Pool(1) as pool:
            held.append(pool.apply(private_bytes, (tmp_path / str(size), tmp_path / "orders")))
    each = (held[1] - held[0]) / (sizes[1] - sizes[0])
    assert held[0] + each * 365e6 < 1e9
