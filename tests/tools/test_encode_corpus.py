"""Encoding at scale: killed and resumed, on workers and ranks, without duplicates, by source."""

import errno
import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import indexed as corpus
from pretrain.data.indexed import IndexedReader
from pretrain.data.manifest import Tally, load_manifest, read_sources, seal_of
from pretrain.data.tokenizer import load_tokenizer, train_sentencepiece
from pretrain.data.verify import verify
from pretrain.data.writer import merge
from pretrain.errors import UserError
from tests.support.ranks import PATIENCE
from tools.encode_corpus import __main__ as encode_corpus
from tools.encode_corpus import duplicates, join
from tools.encode_corpus import parts as encode_parts
from tools.verify_corpus import __main__ as verify_corpus

ROOT = Path(__file__).parents[2]
VALID = ROOT / "tools" / "sample" / "valid.jsonl.gz"
MPIRUN = Path(sys.executable).with_name("mpirun")


@pytest.fixture(scope="module")
def texts() -> list[dict]:
    with gzip.open(VALID, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(texts: list[dict], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece([record["text"] for record in texts], path, "unigram", 800)
    return str(path)


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def words(folder: str, output: Path, *inputs: Path, options: str = "") -> list[str]:
    files = [str(path) for path in inputs]
    return ["--input", *files, "--tokenizer", folder, "--output", str(output), *options.split()]


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.parent.iterdir() if path.is_file()}


# ---- the same bytes, whoever does the work -------------------------------------------------------


@pytest.fixture(scope="module")
def job(texts: list[dict], folder: str, tmp_path_factory: pytest.TempPathFactory):
    """A program with small pieces, its arguments, and what it writes when nothing happens to it."""
    here = tmp_path_factory.mktemp("job")
    first = write(here / "a.jsonl", texts[:20])
    with first.open("a") as file:
        file.write("{bad\n")
    (here / "b.jsonl.gz").write_bytes(gzip.compress(write(here / "b", texts[10:]).read_bytes()))
    script = here / "program.py"
    script.write_text(
        "import os, pathlib, time\n"
        "from tools.shared import console; from tools.encode_corpus import parts as encode_parts\n"
        "from tools.encode_corpus import __main__ as encode_corpus\n"
        "encode_corpus._PIECE_BYTES = (20_000, 20_000)\n"
        "write, parts = encode_parts.PartEncoder._write, pathlib.Path(os.environ.get('PARTS', ''))\n"
        "def held(*inner):\n"
        "    write(*inner)\n"
        "    while 'PARTS' in os.environ and len([*parts.glob('*.json')]) >= int(os.environ['HOLD']):\n"
        "        time.sleep(0.01)\n"
        "encode_parts.PartEncoder._write = held\n"
        "if __name__ == '__main__': console.run(encode_corpus.main)\n"
    )
    options = "--holdout 0.3 --dedup --keep-going"
    inputs = first, here / "b.jsonl.gz"

    def command(output: Path, workers: int) -> list[str]:
        more = f"{options} --workers {workers}"
        return [sys.executable, str(script), *words(folder, output, *inputs, options=more)]

    output = here / "whole" / "c"
    subprocess.run(command(output, 1), check=True, env=environment(), capture_output=True)
    return command, contents(output)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_time_it_goes_on(job, workers: int, tmp_path: Path) -> None:
    command, expected = job
    output, parts = tmp_path / "out" / "c", 0
    for more in (1, 5, 8):
        hold = {"PARTS": f"{output}.parts", "HOLD": str(parts + more)}  # it waits there to be killed
        process = subprocess.Popen(
            command(output, workers),
            env=environment() | hold,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(list(tmp_path.glob("out/c.parts/*.json"))) < parts + more:
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        parts = len(list(tmp_path.glob("out/c.parts/*.json")))
    subprocess.run(command(output, workers), env=environment(), check=True, capture_output=True)
    assert contents(output) == expected
    assert not list(tmp_path.glob("out/c.parts*"))


def test_killed_at_every_step_of_the_end_it_goes_on(texts: list[dict], folder: str, tmp_path: Path) -> None:
    """Killed before the n-th renaming or removal after all parts are there, for every n."""
    source = write(tmp_path / "in.jsonl", [*texts, {}])
    options = "--workers 1 --holdout 0.3 --dedup --keep-going"
    encode_corpus.main(words(folder, tmp_path / "good" / "c", source, options=options))
    expected, survived, number = contents(tmp_path / "good" / "c"), False, 0
    while not survived:
        arguments = words(folder, tmp_path / "out" / "c", source, options=options)
        killed, code = _killed_at(number, arguments), 0
        assert killed or number > 8
        survived, number = not killed, number + 1
        if killed:
            code = encode_corpus.main([*arguments, *(["--overwrite"] if _is_complete(tmp_path) else [])])
        assert code == 0 and contents(tmp_path / "out" / "c") == expected
        assert not list(tmp_path.glob("out/c.parts*")) or not killed
        shutil.rmtree(tmp_path / "out")


def _is_complete(folder: Path) -> bool:
    """Whether the job had been over when it was killed: a rerun is then a new job."""
    return not (folder / "out" / "c.parts").exists() and (folder / "out" / "c.json").exists()


def _killed_at(number: int, arguments: list[str]) -> bool:
    """Run the program in a child that kills itself; whether it came to that."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    left, assemble = number, encode_corpus.assemble

    def count(action):
        def counted(*inner, **named):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return action(*inner, **named)

        return counted

    def begin(*inner):
        for name in ("replace", "rename", "unlink"):
            setattr(Path, name, count(getattr(Path, name)))
        shutil.rmtree = count(shutil.rmtree)
        return assemble(*inner)

    encode_corpus.assemble = begin
    try:
        os._exit(encode_corpus.main(arguments))
    finally:
        os._exit(1)


@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (3, 2)])
def test_ranks_do_not_change_a_byte(job, ranks: int, workers: int, tmp_path: Path) -> None:
    command, expected = job
    mpi = [str(MPIRUN), "-n", str(ranks), *command(tmp_path / "out" / "c", workers)]
    done = subprocess.run(mpi, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out" / "c") == expected
    assert done.stdout.count("documents") == 2  # rank 0 reports, once for each corpus


def test_a_rank_with_bad_text_stops_all(job, tmp_path: Path) -> None:
    command, _ = job
    line = [word for word in command(tmp_path / "out" / "c", 1) if word != "--keep-going"]
    done = subprocess.run(
        [str(MPIRUN), "-n", "2", *line], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert "a.jsonl:21: not JSON" in done.stderr and done.stderr.count("error:") == 1
    assert not list(tmp_path.glob("out/c.[bij]*"))


@pytest.mark.parametrize(
    ("options", "told"),
    [("--workers 0", "--workers: '0'"), ("--input none.jsonl", "none.jsonl: no such file")],
)
def test_ranks_say_a_mistake_once(job, options: str, told: str, tmp_path: Path) -> None:
    command, _ = job
    mpi = [str(MPIRUN), "-n", "3", *command(tmp_path / "out" / "c", 1), *options.split()]
    done = subprocess.run(mpi, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert told in done.stderr and done.stderr.count("error:") == 1


def test_the_error_of_one_rank_is_said_by_the_first(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "from pretrain.errors import UserError\n"
        "from tools.shared import console\n"
        "from tools.encode_corpus.ranks import Ranks\n"
        "def main():\n"
        "    ranks = Ranks()\n"
        "    def fail():\n"
        "        if ranks.rank == 1: raise UserError('of one rank alone')\n"
        "    ranks.raise_on_all_ranks(fail)\n"
        "console.run(main)\n"
    )
    done = subprocess.run(
        [str(MPIRUN), "-n", "3", sys.executable, str(script)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: of one rank alone") == done.stderr.count("error:") == 1


def test_srun_without_mpi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    code = "from tools.encode_corpus.ranks import Ranks; Ranks()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "srun started 4 tasks that do not see each other" in done.stderr


def test_damaged_and_foreign_parts_are_made_again(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_corpus, "_PIECE_BYTES", (20_000, 20_000))
    source, output = write(tmp_path / "in.jsonl", texts), tmp_path / "out" / "c"
    encode_corpus.main(words(folder, tmp_path / "good" / "c", source, options="--workers 1"))

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(encode_corpus, "assemble", crash)
        encode_corpus.main(words(folder, output, source, options="--workers 1"))
    parts = sorted((output.parent / "c.parts").glob("*.bin"))
    assert len(parts) > 5
    data = bytearray(parts[0].read_bytes())
    data[3] ^= 1
    parts[0].write_bytes(data)  # a bit that rotted
    for end in ("bin", "idx", "json", "src"):  # another piece's part
        shutil.copy(parts[2].with_suffix(f".{end}"), parts[1].with_suffix(f".{end}"))
    parts[3].with_suffix(".json").write_text("{")
    made: list[int] = []
    write_part = encode_parts.PartEncoder._write
    monkeypatch.setattr(
        encode_parts.PartEncoder,
        "_write",
        lambda self, task, piece, *more: (made.append(piece), write_part(self, task, piece, *more)),
    )
    encode_corpus.main(words(folder, output, source, options="--workers 1"))
    assert made == [0, 1, 3]
    assert contents(output) == contents(tmp_path / "good" / "c")


def test_the_manifest_names_the_tokenizer_that_encoded(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that took its place before the parts were joined."""
    source, tokenizer = write(tmp_path / "a.jsonl", texts[:5]), tmp_path / "tokenizer"
    shutil.copytree(folder, tokenizer)
    run = encode_corpus.run_tasks

    def change(*arguments: object) -> None:
        run(*arguments)
        train_sentencepiece([record["text"] for record in texts[:20]], tokenizer, "unigram", 500)

    monkeypatch.setattr(encode_corpus, "run_tasks", change)
    with pytest.raises(UserError, match="tokenizer: was changed while it was used; start again"):
        encode_corpus.main(words(str(tokenizer), tmp_path / "c", source, options="--workers 1"))
    assert not (tmp_path / "c.json").exists()


def test_a_corrected_file_is_encoded_again_and_the_others_are_not(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write(tmp_path / "a.jsonl", texts[:5]), tmp_path / "b.jsonl"
    b.write_text("{bad\n")
    with pytest.raises(UserError, match="b.jsonl:1: not JSON"):
        encode_corpus.main(words(folder, tmp_path / "c", a, b, options="--workers 1"))
    assert (tmp_path / "c.parts").is_dir()
    write(b, texts[5:6])
    made: list[str] = []
    write_part = encode_parts.PartEncoder._write
    monkeypatch.setattr(
        encode_parts.PartEncoder,
        "_write",
        lambda self, task, *more: (made.append(task.path), write_part(self, task, *more)),
    )
    encode_corpus.main(words(folder, tmp_path / "c", a, b, options="--workers 1"))
    assert made == [str(b)]
    assert load_manifest(tmp_path / "c").documents == 6


def test_the_standard_input_goes_on_and_is_listed_by_its_name(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_corpus, "_PIECE_BYTES", (20_000, 20_000))
    source, output = write(tmp_path / "in.jsonl", [*texts, {}]), tmp_path / "out" / "c"
    data, made = source.read_bytes(), []
    line = len(texts) + 1

    def encode(data: bytes, options: str = "") -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        encode_corpus.main(words(folder, output, Path("-"), options=f"--workers 1 {options}"))

    with pytest.raises(UserError, match=f"^-:{line}: no key 'text'"):
        encode(data)
    write_part = encode_parts.PartEncoder._write
    monkeypatch.setattr(
        encode_parts.PartEncoder,
        "_write",
        lambda self, task, piece, *more: (made.append(piece), write_part(self, task, piece, *more)),
    )
    with pytest.raises(UserError, match=f"^-:{line}: "):
        encode(data)
    assert len(made) == 1 and made[0] > 3  # the last piece alone
    changed = data.replace(b" the ", b" tha ", 1)
    with pytest.raises(UserError, match=f"^-:{line}: "):
        encode(changed)
    assert made[1:] == list(range(made[0] + 1))
    encode(data, "--keep-going")
    assert [(file.path, file.bytes) for file in load_manifest(output).inputs] == [("-", len(data))]
    (rejected,) = map(json.loads, (tmp_path / "out" / "c.rejected.jsonl").read_text().splitlines())
    assert (rejected["path"], rejected["line"]) == ("-", line)


def test_what_a_failed_job_left_does_not_permit_to_overwrite(
    texts: list[dict], folder: str, tmp_path: Path
) -> None:
    good, more = write(tmp_path / "a.jsonl", texts[:3]), write(tmp_path / "b.jsonl", texts[3:5])
    bad, output = tmp_path / "bad.jsonl", tmp_path / "out" / "c"
    bad.write_text("{bad\n")
    encode_corpus.main(words(folder, output, good, options="--workers 1"))
    expected = contents(output)
    with pytest.raises(UserError, match="not JSON"):
        encode_corpus.main(words(folder, output, more, bad, options="--workers 1 --overwrite"))
    assert (tmp_path / "out" / "c.parts").is_dir()
    for inputs in ([more], [more, bad], [good]):
        with pytest.raises(UserError, match="c.json: exists already"):
            encode_corpus.main(words(folder, output, *inputs, options="--workers 1"))
    assert contents(output) == expected


def test_only_the_command_that_was_joining_may_go_on(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = write(tmp_path / "a.jsonl", texts[:9]), write(tmp_path / "b.jsonl", texts[9:])
    output, options = tmp_path / "out" / "c", "--workers 1 --holdout 0.4"
    join_parts = join.join_parts

    def crash(*arguments: object) -> None:
        join_parts(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(join, "join_parts", crash)
        encode_corpus.main(words(folder, output, source, options=options))
    with pytest.raises(UserError, match="c-valid.json: exists already"):
        encode_corpus.main(words(folder, output, other, options=options))
    encode_corpus.main(words(folder, output, source, options=options.replace("1", "2", 1)))
    assert sum(load_manifest(f"{output}{side}").documents for side in ("", "-valid")) == 9


def test_one_job_at_a_time(texts: list[dict], folder: str, tmp_path: Path) -> None:
    import fcntl

    source = write(tmp_path / "in.jsonl", texts[:2])
    (tmp_path / "c.parts").mkdir()
    with (tmp_path / "c.parts" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another encode_corpus is at work"):
            encode_corpus.main(words(folder, tmp_path / "c", source))


def test_totals_add_up(texts: list[dict], folder: str, tmp_path: Path, capsys) -> None:
    copies = [{"text": record["text"].upper() + " \n"} for record in texts[:7]]
    source = write(tmp_path / "in.jsonl", [*texts, *copies, *texts[3:5]])
    with source.open("ab") as file:
        file.write(b'\n{"no": 1}\n\xff\n{"text": ""}\n')
    capsys.readouterr()
    options = "--workers 1 --holdout 0.2 --dedup --keep-going --json"
    encode_corpus.main(words(folder, tmp_path / "c", source, options=options))
    report = json.loads(capsys.readouterr().out)
    kept = sum(entry["documents"] for entry in report["corpora"])
    assert (report["rejected"], report["duplicates"]) == (2, 9)
    assert kept + report["duplicates"] + report["rejected"] == len(texts) + 7 + 2 + 3
    lines = [json.loads(line)["line"] for line in (tmp_path / "c.rejected.jsonl").read_text().splitlines()]
    assert lines == [len(texts) + 11, len(texts) + 12]
    for side in ("", "-valid"):
        manifest = verify(tmp_path / f"c{side}")
        assert manifest.history["duplicates"] == 9
        tokenizer, reader = load_tokenizer(folder), IndexedReader(tmp_path / f"c{side}")
        decoded = [tokenizer.decode(reader.document(i)).casefold() for i in range(reader.num_documents)]
        assert len(set(decoded)) == len(decoded)


def test_rejected_lines_are_kept_where_nothing_else_is(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"no": 1}\n\n{"text": 3}\n')
    options = "--workers 1 --holdout 0.2 --dedup --keep-going"
    told = rf"no documents in .*in\.jsonl but 2 rejected lines in {tmp_path}/c\.rejected\.jsonl"
    for _ in range(2):  # nothing is left that would stand in the way
        with pytest.raises(UserError, match=told):
            encode_corpus.main(words(folder, tmp_path / "c", source, options=options))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c.rejected.jsonl", "in.jsonl"]
        lines = (tmp_path / "c.rejected.jsonl").read_text().splitlines()
        assert [json.loads(line)["line"] for line in lines] == [1, 3]


def test_held_out_copies_stay_held_out(folder: str, tmp_path: Path) -> None:
    """Of two variants of a text on both sides of the split, the one to train on goes."""
    number = next(
        i
        for i in range(100)
        if not encode_parts.held_out(f"text {i}".encode(), 0.5)
        and encode_parts.held_out(f"Text {i}".encode(), 0.5)
    )
    records = [{"text": f"text {number}"}, {"text": f"Text {number}"}, {"text": "more to train on"}]
    more = next(f"more {i}" for i in range(100) if not encode_parts.held_out(f"more {i}".encode(), 0.5))
    records[2] = {"text": more}
    source = write(tmp_path / "in.jsonl", records)
    encode_corpus.main(words(folder, tmp_path / "c", source, options="--workers 1 --holdout 0.5 --dedup"))
    tokenizer = load_tokenizer(folder)
    train, valid = (IndexedReader(tmp_path / f"c{side}") for side in ("", "-valid"))
    assert [tokenizer.decode(train.document(i)) for i in range(train.num_documents)] == [more]
    assert [tokenizer.decode(valid.document(i)) for i in range(valid.num_documents)] == [f"Text {number}"]


def test_the_bar_of_the_join_ends_full(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where documents are passed over."""
    done: dict[str, list[int]] = {}

    @contextmanager
    def progress(title: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
        done[title] = [total]
        yield done[title].append

    monkeypatch.setattr(encode_corpus.console, "progress", progress)
    source = write(tmp_path / "in.jsonl", texts[:6] * 3)
    encode_corpus.main(words(folder, tmp_path / "c", source, options="--workers 1 --dedup"))
    assert load_manifest(tmp_path / "c").documents == 6
    total, *steps = done["join"]
    assert total == sum(steps) > 0


# ---- duplicates ----------------------------------------------------------------------------------


def test_duplicates_against_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BUCKET_BYTES", 2000)  # some ten buckets
    monkeypatch.setattr(duplicates, "_CHUNK", 100)
    draw = np.random.default_rng(0)
    files, expected, seen = [], [], set()
    for i, count in enumerate((0, 500, 1, 300)):
        records = np.zeros(count, encode_parts.HASH)
        records["key"] = draw.integers(0, 30, (count, 2))
        files.append(tmp_path / f"{i}.hash")
        records.tofile(files[-1])
        expected.append([])
        for j, key in enumerate(map(tuple, records["key"].tolist())):
            if key in seen:
                expected[-1].append(j)
            seen.add(key)
    counts, found = duplicates.find_duplicates(files, encode_parts.HASH, tmp_path)
    assert [array.tolist() for array in found] == expected
    assert counts == [len(each) for each in expected] and sum(counts) > 100
    assert not list(tmp_path.glob("bucket-*"))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("A  b\n", "a B", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("x\u00b2", "x2", False),
        ("\uff21", "A", False),
        ("e\u0301", "\u00e9", False),
        ("a", "b", False),
    ],
)
def test_what_counts_as_the_same_text(a: str, b: str, same: bool) -> None:
    assert (encode_parts.text_hash(a) == encode_parts.text_hash(b)) is same


# ---- sources -------------------------------------------------------------------------------------


def test_each_document_keeps_its_source(texts: list[dict], folder: str, tmp_path: Path) -> None:
    records = [*texts, {"text": "nobody knows"}, {"text": "", "source": "new/1"}]
    for name, part in (("a", records[:15]), ("b", records[15:]), ("all", records)):
        source = write(tmp_path / f"{name}.jsonl", part)
        encode_corpus.main(words(folder, tmp_path / name, source, options="--workers 1"))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    for name in ("all", "merged"):
        names, codes = read_sources(tmp_path / name)
        said = [names[code] if code != corpus.NO_SOURCE else None for code in codes]
        assert said == [r["source"].split("/")[0] if "source" in r else None for r in records]
        reader, sources = IndexedReader(tmp_path / name), verify(tmp_path / name).sources
        assert set(names) == set(sources)
        for code, kind in enumerate(names):
            mine = codes == code
            assert sources[kind].documents == mine.sum()
            assert sources[kind].tokens == reader.document_lengths[mine].sum()
    assert load_manifest(tmp_path / "merged").sources == load_manifest(tmp_path / "all").sources
    path = tmp_path / "all.src"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match="all.src: bytes 0 to .* differ"):
        verify(tmp_path / "all")
    path.write_bytes(b"12")
    with pytest.raises(UserError, match="all.src: 1 entries for 38 documents"):
        verify(tmp_path / "all")


def test_corpora_without_sources_have_no_such_file(folder: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}])
    encode_corpus.main(words(folder, tmp_path / "c", source, options="--workers 1"))
    assert not (tmp_path / "c.src").exists()
    names, codes = read_sources(tmp_path / "c")
    assert (names, codes.tolist()) == ([], [corpus.NO_SOURCE] * 2)
    assert load_manifest(tmp_path / "c").sources == dict[str, Tally]()


# ---- nothing vanishes, nothing of the user's is replaced -----------------------------------------


@pytest.mark.parametrize("harm", ["touch", "append", "remove"])
def test_the_join_proves_that_all_was_read(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    first, second = write(tmp_path / "a.jsonl", texts[:6]), write(tmp_path / "b.jsonl", texts[6:9])
    work = words(folder, tmp_path / "out" / "c", first, second, options="--workers 1")
    run = encode_corpus.run_tasks

    def harmed(*arguments: object) -> None:
        run(*arguments)
        if harm == "touch":
            os.utime(first, (1, 1))
        elif harm == "append":
            with first.open("a") as file:
                file.write(json.dumps(texts[9]) + "\n")
        else:
            for file in (tmp_path / "out" / "c.parts").glob("00000-000000.*"):
                file.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(encode_corpus, "run_tasks", harmed)
        with pytest.raises(UserError, match=r"a\.jsonl"):
            encode_corpus.main(work)
    assert not (tmp_path / "out" / "c.json").exists()
    encode_corpus.main(work)
    manifest = verify(tmp_path / "out" / "c")
    assert manifest.documents == 9 + (harm == "append")
    assert sum(entry["read"] for entry in manifest.history["coverage"]) == manifest.documents
    assert [entry["end"] for entry in manifest.history["coverage"]] == [
        entry.bytes for entry in manifest.inputs
    ]


@pytest.mark.parametrize("options", ["", "--holdout 0.5"])
def test_overwrite_spares_what_is_not_ours(
    texts: list[dict], folder: str, tmp_path: Path, options: str
) -> None:
    mine = tmp_path / ("c-valid.json" if options else "c.json")
    write(mine, texts[:5])
    content = mine.read_bytes()
    source = write(tmp_path / "in.jsonl", texts[5:])
    for inputs in ([source], [mine]):
        with pytest.raises(UserError, match="choose another --output"):
            encode_corpus.main(words(folder, tmp_path / "c", *inputs, options=f"--overwrite {options}"))
        assert mine.read_bytes() == content


def test_a_file_system_without_locks_is_a_warning(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    source = write(tmp_path / "in.jsonl", texts[:3])
    encode_corpus.main(words(folder, tmp_path / "c", source, options="--workers 1"))
    assert verify(tmp_path / "c").documents == 3


def test_a_merge_or_encoding_never_writes_to_a_link_of_its_input(
    texts: list[dict], folder: str, tmp_path: Path
) -> None:
    encode_corpus.main(words(folder, tmp_path / "c", write(tmp_path / "in.jsonl", texts[:3])))
    for extension in ("bin", "idx", "json"):
        (tmp_path / f"d.{extension}").hardlink_to(tmp_path / f"c.{extension}")
    with pytest.raises(UserError, match="is also an input"):
        merge([tmp_path / "c"], tmp_path / "d", overwrite=True)


@pytest.mark.parametrize("end", ["parts", "parts.done"])
@pytest.mark.parametrize("mine", ["notes.txt", "thesis.json", "00000-000000.bin"])
def test_a_folder_that_is_no_folder_of_parts_is_left_alone(
    texts: list[dict], folder: str, tmp_path: Path, end: str, mine: str
) -> None:
    source = write(tmp_path / "in.jsonl", texts[:3])
    (tmp_path / f"c.{end}").mkdir()
    (tmp_path / f"c.{end}" / mine).write_text("years of work")
    for options in ("", "--overwrite"):
        with pytest.raises(UserError, match=rf"c\.{end}: has .*; move it away"):
            encode_corpus.main(words(folder, tmp_path / "c", source, options=f"--workers 1 {options}"))
        assert (tmp_path / f"c.{end}" / mine).read_text() == "years of work"


def test_rejected_lines_replace_only_their_like(texts: list[dict], folder: str, tmp_path: Path) -> None:
    source, path = write(tmp_path / "in.jsonl", [*texts[:3], {}]), tmp_path / "c.rejected.jsonl"
    command = words(folder, tmp_path / "c", source, options="--workers 1 --keep-going")
    path.write_text('{"text": "of the user"}\n')
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"c\.rejected\.jsonl: exists and is no list of rejected lines"):
            encode_corpus.main([*command, *more])
        assert path.read_text() == '{"text": "of the user"}\n'
    earlier = json.dumps(dict.fromkeys(encode_parts.Rejected._fields, "of another text")) + "\n"
    path.write_text(earlier)
    with pytest.raises(UserError, match=r"c\.rejected\.jsonl: exists already; .*--overwrite"):
        encode_corpus.main(command)
    assert path.read_text() == earlier and not (tmp_path / "c.json").exists()
    encode_corpus.main([*command, "--overwrite"])
    assert json.loads(path.read_text())["line"] == 4


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("room", [6_000, 30_000])
def test_a_full_disk_leaves_nothing_half_written(job, room: int, workers: int, tmp_path: Path) -> None:
    """Too little room for a part, or for the whole of which the parts are; its file is named."""
    command, expected = job
    output = tmp_path / "out" / "c"
    done = subprocess.run(
        command(output, workers),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {output}." in done.stderr and "File too large" in done.stderr, done.stderr
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix == ".partial" or path.parent == output.parent]
    parts = {path.name.partition(".")[0].removesuffix("-valid") for path in left} - {
        "lock",
        "stop",
        "joining",
    }
    assert parts <= {path.stem for path in left if path.suffix == ".json"} | {"duplicates"}
    assert subprocess.run(command(output, workers), env=environment(), capture_output=True).returncode == 0
    assert contents(output) == expected


def test_what_a_part_was_made_from_is_the_same_after_json(tmp_path: Path) -> None:
    """Else every part would be made again, and the join would find none."""
    path = tmp_path / "in.jsonl"
    path.write_text("")
    job = encode_parts.EncodeJob(
        folder=str(tmp_path / "c.parts"),
        tokenizer="t",
        tokenizer_hash="h",
        text_key="text",
        txt_document="line",
        max_bytes=1,
        holdout=0.5,
        dedup=True,
        keep_going=True,
        stdin_hash="s",
        map_literal=["<unk>", "a=b"],
        end=2,
    )
    (task,) = encode_corpus.plan([path], "line", 1)
    made_from = encode_parts.identity(job, task, 0)
    assert json.loads(json.dumps(made_from)) == made_from


def test_a_join_that_lost_a_document_writes_no_manifest(
    texts: list[dict], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = join.CorpusWriter.append_corpus
    monkeypatch.setattr(
        join.CorpusWriter,
        "append_corpus",
        lambda writer, prefix, gone, advance: append(writer, prefix, [0], advance),
    )
    source = write(tmp_path / "in.jsonl", texts[:5])
    with pytest.raises(UserError, match="4 documents, not the 5 read"):
        encode_corpus.main(words(folder, tmp_path / "c", source, options="--workers 1"))
    assert not (tmp_path / "c.json").exists()


# ---- the proof, again ----------------------------------------------------------------------------


def verified(capsys: pytest.CaptureFixture[str], *prefixes: Path) -> list[dict]:
    capsys.readouterr()
    assert verify_corpus.main([*map(str, prefixes), "--json"]) == 0
    reports: list[dict] = json.loads(capsys.readouterr().out)
    return reports


def test_verification_repeats_the_proof(
    texts: list[dict], folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write(tmp_path / "a.jsonl", [*texts[:9], texts[0], {}])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(write(tmp_path / "b", texts[9:20]).read_bytes()))
    options = "--workers 1 --holdout 0.3 --dedup --keep-going"
    encode_corpus.main(words(folder, tmp_path / "c", plain, packed, options=options))
    both = tmp_path / "c", tmp_path / "c-valid"
    for report in verified(capsys, *both):
        assert report["inputs"] == {"covered": 2, "changed": [], "gone": []}
    os.utime(plain, (1, 1))
    packed.unlink()
    for report in verified(capsys, *both):
        assert report["inputs"] == {"covered": 0, "changed": [str(plain)], "gone": [str(packed)]}
    verify_corpus.main([str(tmp_path / "c")])
    told = capsys.readouterr().out
    assert f"changed since: {plain}" in told and f"no longer there: {packed}" in told


@pytest.mark.parametrize("harm", ["end", "read", "kept", "input"])
def test_verification_refuses_a_manifest_that_covers_less(
    texts: list[dict], folder: str, tmp_path: Path, harm: str
) -> None:
    """As a program with the defect that this is about would have written it: sealed, and wrong."""
    encode_corpus.main(words(folder, tmp_path / "c", write(tmp_path / "a.jsonl", texts[:4])))
    manifest = load_manifest(tmp_path / "c")
    entry = manifest.history["coverage"][0]
    if harm in entry:
        entry[harm] -= 1
    elif harm == "kept":
        manifest.history["kept"]["here"] += 1
    else:
        manifest.history["coverage"].clear()
    manifest = manifest.model_copy(update={"seal": seal_of(manifest)})
    (tmp_path / "c.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    verify(tmp_path / "c")
    with pytest.raises(UserError, match=r"c\.json: .*encode again"):
        verify_corpus.main([str(tmp_path / "c")])


def test_a_merge_carries_the_proof_and_the_literals(
    texts: list[dict], folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [{"text": "a <unk> and <mask>"}, {}]
    options = "--workers 1 --keep-going --dedup --map-literal <unk>"
    for name, some in (("a", texts[:3]), ("b", [*texts[3:5], texts[3], *odd]), ("d", texts[5:6])):
        more = options if name != "d" else "--workers 1"
        encode_corpus.main(
            words(folder, tmp_path / name, write(tmp_path / f"{name}.jsonl", some), options=more)
        )
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    history = load_manifest(tmp_path / "ab").history
    assert [entry["read"] for entry in history["coverage"]] == [3, 5]
    assert (history["rejected"], history["duplicates"], history["kept"]["here"]) == (1, 1, 6)
    assert history["map_literal"] == ["<unk>"] and history["literals"]["<mask>"] >= 1
    merge([tmp_path / "ab", tmp_path / "d"], tmp_path / "all")
    assert "literals" not in load_manifest(tmp_path / "all").history  # treated in two ways
    for report, covered in zip(verified(capsys, tmp_path / "ab", tmp_path / "all"), (2, 3), strict=True):
        assert report["inputs"] == {"covered": covered, "changed": [], "gone": []}
