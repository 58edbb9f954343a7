"""Programs in other locales, with their streams closed or cut off, and with names that are no text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.files import check_name
from tools.encode_corpus import __main__ as encode_corpus
from tools.shared import console
from tools.text.files import find_files

ROOT = Path(__file__).parents[2]
LATIN = "en_US.ISO-8859-1"


def start(*words: object, environ: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, cwd=ROOT, env=os.environ | (environ or {}), timeout=300, **options)


def cut_off() -> int:
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.fixture(scope="session")
def latin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process whose locale is ISO-8859-1."""
    folder = tmp_path_factory.mktemp("locales")
    try:
        made = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / LATIN], check=False)
    except FileNotFoundError:
        pytest.skip("no localedef here")
    if made.returncode or not (folder / LATIN).is_dir():
        pytest.skip("localedef made no locale of ISO-8859-1 here")
    environ = {"LOCPATH": str(folder), "LC_ALL": LATIN, "PYTHONUTF8": "0"}
    told = start("-c", "import sys; print(sys.getfilesystemencoding())", environ=environ).stdout
    if told != b"iso8859-1\n":
        pytest.skip(f"that locale has the encoding {told!r} here")
    return environ


@pytest.mark.parametrize("workers", [1, 2])
def test_the_locale_changes_no_document(latin: dict[str, str], workers: int, tiny: Path, tmp_path: Path):
    """With encoding by default an error, in the program, its workers and its readers."""
    text, row = (
        tmp_path / "text",
        json.dumps({"text": "na\u00efve \u2581 \u00e9t\u00e9", "source": "\u00e9/1"}, ensure_ascii=False),
    )
    text.mkdir()
    (text / "plain.jsonl").write_text(f"{row}\n" * 6, encoding="utf-8")
    (text / "\u00e9.jsonl").write_text(f"{row}\n" * 30, encoding="utf-8")
    (tmp_path / "list").write_text(f"{text}/plain.jsonl\n{text}/\u00e9.jsonl\n", encoding="utf-8")
    strict = ("-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-m")
    environ = latin | {"PYTHONWARNDEFAULTENCODING": "1"}
    for name, source in (("folder", text), ("list", f"@{tmp_path}/list")):
        words = (*strict, "tools.encode_corpus", "--input", source, "--tokenizer", tiny / "tokenizer")
        done = start(*words, "--output", tmp_path / name, "--workers", workers, environ=environ)
        assert done.returncode == 0, done.stderr
        assert load_manifest(tmp_path / name).documents == 36
        assert list(load_manifest(tmp_path / name).sources) == ["\u00e9"]
        for program in ("verify_corpus", "inspect_corpus"):
            done = start(*strict, f"tools.{program}", tmp_path / name, environ=environ)
            assert done.returncode == 0, done.stderr
    assert b"\\u2581" in done.stdout


def test_a_vocabulary_in_another_locale(latin: dict[str, str], tmp_path: Path):
    (tmp_path / "\u00e9.txt").write_text("un caf\u00e9 \u00e0 la cr\u00e8me\n\n" * 200, encoding="utf-8")
    strict = ("-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-m", "tools.train_tokenizer")
    places = ("--input", tmp_path, "--output", tmp_path / "out", "--vocab-size", "275")
    done = start(*strict, *places, environ=latin)
    assert done.returncode == 0, done.stderr


CORPUS = ["-m", "tools.inspect_corpus", "train"]
DRY_RUN = ["-m", "pretrain", "tiny.yaml", "--dry-run"]


@pytest.mark.parametrize("environ", [{}, {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize(
    "words", [CORPUS, DRY_RUN, ["-m", "pretrain", "--help"], ["-m", "tools.plan", "--help"]]
)
def test_a_reader_that_has_seen_enough(words: list[str], environ: dict[str, str], tiny: Path):
    words = [str(tiny / word) if word in ("train", "tiny.yaml") else word for word in words]
    for streams in (("stdout",), ("stdout", "stderr")):
        end = cut_off()
        done = start(*words, environ=environ, **dict.fromkeys(streams, end))
        os.close(end)
        assert done.returncode == 0
        assert not done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", [CORPUS, DRY_RUN])
def test_closed_streams(words: list[str], closed: str, tiny: Path):
    words = [str(tiny / word) if word in ("train", "tiny.yaml") else word for word in words]
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_work_with_closed_streams(closed: str, tiny: Path, tmp_path: Path):
    """No file that is opened later gets the number of a closed stream, and is written to as one."""
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 9, encoding="utf-8")
    words = ["tools.encode_corpus", "--input", tmp_path / "a.jsonl", "--tokenizer", tiny / "tokenizer"]
    words += ["--output", tmp_path / "c", "--workers", "2"]
    run = ["pretrain", tiny / "tiny.yaml", f"run.dir={tmp_path}/run", "budget.steps=2"]
    for program in (words, run):
        command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-m", *map(str, program)]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    assert load_manifest(tmp_path / "c").documents == 9
    assert json.loads((tmp_path / "run" / "status.json").read_bytes())["state"] == "finished"


def test_a_run_whose_log_is_not_read(tiny: Path, tmp_path: Path):
    end = cut_off()
    words = ("-m", "pretrain", tiny / "tiny.yaml", f"run.dir={tmp_path}/run", "budget.steps=2")
    done = start(*words, stdout=end, stderr=end)
    os.close(end)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "status.json").read_bytes())["state"] == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", [CORPUS, DRY_RUN])
def test_a_result_that_cannot_be_written(words: list[str], tiny: Path):
    words = [str(tiny / word) if word in ("train", "tiny.yaml") else word for word in words]
    with open("/dev/full", "wb") as full:
        done = start(*words, stdout=full)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(b"error: ") and b"Traceback" not in done.stderr
        assert start(*words, stdout=full, stderr=full).returncode == 2


def test_names_that_are_no_text(tiny: Path, tmp_path: Path):
    """Refused by name before the work, wherever they stand."""
    bad = os.fsencode(tmp_path / "in") + b"/caf\xe9.jsonl"
    (tmp_path / "in").mkdir()
    with open(bad, "wb") as file:
        file.write(b'{"text": "good"}\n')
    with open(os.fsencode(tmp_path) + b"/list", "wb") as file:
        file.write(bad + b"\n")
    for name in (str(tmp_path / "in"), f"{tmp_path}/in/*.jsonl"):
        with pytest.raises(UserError, match=r"caf\\udce9.jsonl': not utf-8; rename it"):
            find_files([name])
    parser = console.parser("test", "")
    parser.add_argument("--input")
    for word in (f"@{tmp_path}/list", f"--input={os.fsdecode(bad)}"):
        with pytest.raises(UserError, match=r"caf\\udce9.jsonl': not utf-8; rename it"):
            parser.parse_args([word])
    with pytest.raises(UserError, match="rename it"):
        check_name(os.fsdecode(b"\xff"))
    done = start("-m", "pretrain", tiny / "tiny.yaml", os.fsdecode(b"run.dir=caf\xe9"))
    assert done.returncode == 2 and b"caf\\udce9': not utf-8" in done.stderr
    assert not Path("caf").exists()


def test_a_key_that_no_file_can_hold(tiny: Path, tmp_path: Path):
    """What a bad line is rejected for is told in characters that can be written."""
    (tmp_path / "a.jsonl").write_bytes(b'{"\\ud800": 1}\n{"text": "good"}\n')
    words = ("--input", tmp_path / "a.jsonl", "--tokenizer", tiny / "tokenizer", "--output", tmp_path / "c")
    done = start("-m", "tools.encode_corpus", *words, "--keep-going", "--workers", "1")
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "c.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert "no key 'text'" in json.loads(line)["reason"]


@pytest.mark.parametrize(
    ("data", "suspicion"),
    [
        ("some words\n\nand others\n".encode("utf-16-le"), "NUL: UTF-16 without a byte order mark?"),
        (
            "\u0441\u043b\u043e\u0432\u043e \u0435\u0449\u0451 \u043e\u0434\u043d\u043e".encode("utf-16-le"),
            "NUL: UTF-16 without",
        ),
        (b"one line\rand another\r\ra third\r", "4 carriage returns without a line feed"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_text_that_is_another_kind_is_told(
    data: bytes, suspicion: str, workers: str, tiny: Path, tmp_path: Path, capfd
):
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(b"good\r\n\r\ntext\n")
    words = [
        "--input",
        str(tmp_path),
        "--tokenizer",
        str(tiny / "tokenizer"),
        "--output",
        str(tmp_path / "c"),
    ]
    encode_corpus.main([*words, "--workers", workers])
    told = capfd.readouterr().err
    assert told.count("warning: ") == 1 and suspicion in told
    (kept,) = load_manifest(tmp_path / "c").history["suspicions"]
    assert kept.startswith(f"{tmp_path}/a.txt: ") and suspicion in kept
    assert "? 0:00:00" not in told
