"""What is said about jobs without a cluster: sizes, sbatch files, verdicts, who is to blame."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest

from pretrain import checkpoint
from pretrain.account.recipe import make_recipe
from pretrain.config import Config, dump_config, load_config
from pretrain.data import corpora, document_order
from pretrain.data.corpora import mapped, open_blend, open_data
from pretrain.data.indexed import IndexedReader
from pretrain.errors import UserError
from pretrain.parallel.launchers import Identity
from pretrain.run_folder import RunFolder
from slurm import attempts, cluster, preflight, scheduler, stage, status, submit
from slurm import time_limit as forms
from slurm.render import STAGES
from slurm.scheduler import Seen
from tests.support import ranks, runs
from tests.support.slurm_cluster.jobs import site
from tools import sweep
from tools.plan import memory as plan_memory
from tools.shared import journal

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "slurm" / "cluster.env.example"
LARGE = str(ROOT / "configs" / "mlm-large.yaml")


def dry(capsys: pytest.CaptureFixture[str], *words: str, cluster: Path = EXAMPLE) -> str:
    """The sbatch files that a command line would submit."""
    assert submit.main([*words, "--cluster", str(cluster), "--dry-run"]) == 0
    return capsys.readouterr().out


# ---- sizes and files -----------------------------------------------------------------------------


def test_a_job_has_a_rank_for_each_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    text = dry(capsys, LARGE, "--nodes", "4", "--time", "2:00:00")
    for head in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "time=2:00:00", "signal=USR1@300"):
        assert f"#SBATCH --{head}\n" in text
    assert "#SBATCH --requeue\n" in text and "@" not in re.sub(r"USR1@300|\[@\]", "", text)


def test_what_cannot_fit_is_refused_and_the_smallest_that_does_is_named() -> None:
    words = [LARGE, "train.micro_batch_size=256", "--cluster", str(EXAMPLE), "--dry-run"]
    with pytest.raises(UserError, match=r"needs \d+.* GiB a rank on 8 x H100, .*smallest layout that fits"):
        submit.main(words)


def test_without_nodes_the_fewest_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """What ZeRO divides of this one fits when there are two nodes to divide it among."""
    wide = [LARGE, "model.hidden_size=4096", "model.num_heads=32", "model.ffn_size=16384"]
    wide += ["model.num_layers=50", "train.micro_batch_size=1", "train.recompute=block", "parallel.zero=3"]
    text = dry(capsys, *wide)
    assert "#SBATCH --nodes=2\n" in text
    with pytest.raises(UserError, match="smallest layout"):
        dry(capsys, *wide, "--nodes", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tensor=16"], "no multiple of parallel.tensor"),
        (["train.batch_size=12"], "train.batch_size"),
        (["--pipeline", "train,corpus"], "in the order of"),
        (["--pipeline", "train,tests"], "no stage 'tests'"),
        (["--pipeline", "corpus,train"], "--input"),
        (["corpus.valid=data/train-valid", "--pipeline", "corpus", "--input", "a"], "--holdout"),
        (["corpus.train=[[1, a], [2, b]]", "--pipeline", "corpus", "--input", "a"], "a blend"),
        (["--pipeline", "corpus", "--input", "-"], "no standard input"),
        (["--pipeline", "corpus", "--input", "a", "--encode", "it's"], "No closing quotation"),
        (["--pipeline", "corpus", "--input", "a", "--encode=--dedupe"], "arguments: --dedupe"),
        (["--pipeline", "corpus", "--input", "a", "--encode", "--dedupe"], "arguments: --dedupe"),
        (
            ["--pipeline", "corpus", "--input", "a", "--vocab-size", "900", "model.vocab_size=800"],
            "leave one",
        ),
        (["--time", "5"], f"{EXAMPLE}: SIGNAL_SECONDS=300 is not shorter than a job (5)"),
        (["--cluster", "/no/where"], "cluster.env.example"),
        (["--array", "commands"], f"--array commands: its lines are whole commands; leave out {LARGE}"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        submit.main([LARGE, "--cluster", str(EXAMPLE), "--dry-run", "--nodes", "1", *words])


@pytest.mark.parametrize(
    "words",
    [
        *(["--nodes", number] for number in ("0", "-2", "two")),
        *(["--tasks-per-node", number] for number in ("-1", "0")),
        *(["--time", limit] for limit in ("abc", "1-", "1:2:3:4", "-5")),
        *(["--holdout", share] for share in ("5", "0", "1", "nan", "x")),
        ["--gpus-per-node", "-3"],
        ["--at-once", "0"],
        ["--vocab-size", "-1"],
        ["--corpus-nodes", "0"],
        ["--corpus-tasks-per-node", "-4"],
        ["--cancel"],
    ],
    ids=" ".join,
)
def test_words_that_mean_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=f"argument {words[0]}: '{words[1]}' is not a" if words[1:] else "is for"
    ):
        dry(capsys, LARGE, *words)


def test_seconds_of_a_time_limit() -> None:
    """As in sbatch's manual."""
    known = {"90": 5400, "1:30": 90, "2:00:01": 7201, "1-2": 93600, "1-2:3": 93780, "1-2:3:4": 93784}
    assert {limit: forms.seconds(limit) for limit in known} == known
    assert forms.seconds("unlimited") == forms.seconds("0") == float("inf")


MISSING = {
    "TMP/none: no such corpus": ["corpus.train=TMP/none"],
    "TMP/nor: no such corpus": ["corpus.train=[[1, TINY/train], [2, TMP/nor]]"],
    "TMP/valid: no such corpus": ["corpus.valid=TMP/valid"],
    "TMP/part.idx: no such file": ["corpus.train=TMP/part"],
    "TMP: no tokenizer.model": ["corpus.tokenizer=TMP", "model.vocab_size=400"],
    "TMP/a*.txt: no such file": [
        "corpus.train=TMP/new",
        "--pipeline",
        "corpus,train",
        "--input",
        "TMP/a*.txt",
    ],
    "no corpus.valid": ["--pipeline", "train,evaluate", "corpus.valid=null"],
    "TMP/run: has no checkpoint for export": ["--pipeline", "export,report"],
}


@pytest.mark.parametrize("message", MISSING)
def test_what_a_job_would_not_find(
    message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused; a dry run, which may be far from the cluster, warns."""

    def here(text: str) -> str:
        return text.replace("TMP", str(tmp_path)).replace("TINY", str(tiny))

    for extension in ("bin", "json"):
        shutil.copy(tiny / f"train.{extension}", tmp_path / f"part.{extension}")
    words = [str(tiny / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", *map(here, MISSING[message])]
    words += ["--cluster", str(site(tmp_path))]
    with pytest.raises(UserError, match=re.escape(here(message))):
        submit.main(words)
    assert submit.main([*words, "--dry-run"]) == 0
    assert f"warning: {here(message)}" in capsys.readouterr().err.replace(
        "--pipeline evaluate: the config has ", ""
    )
    assert not (tmp_path / "run").exists()


def test_what_the_corpus_job_makes_is_not_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "words"}')
    words = [f"corpus.train={tmp_path}/train", f"corpus.valid={tmp_path}/train-valid", "--holdout", "0.1"]
    words += ["--pipeline", "corpus,train,evaluate", "--input", f"{tmp_path}/*.jsonl", "--text-key", "body"]
    assert submit.main([LARGE, *words, "--cluster", str(EXAMPLE), "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "warning" not in told.err
    # The tokenizer is trained on the same documents.
    (tmp_path / "a.jsonl").rename(tmp_path / "archived")
    assert submit.main([LARGE, *words, "--cluster", str(EXAMPLE), "--dry-run"]) == 0
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "train.json").touch()
    assert submit.main([LARGE, *words, "--cluster", str(EXAMPLE), "--dry-run", "model.vocab_size=400"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert f"input=('{tmp_path}/*.jsonl' --text-key body --txt-document blank-line)\n" in told.out
    more = ["--encode=--keep-going --max-document-bytes 99", "--cluster", str(EXAMPLE), "--dry-run"]
    assert submit.main([LARGE, *words, *more, "model.vocab_size=400"]) == 0
    training, _, encoding = capsys.readouterr().out.partition("-m tools.encode_corpus")
    assert submit.main([LARGE, *words, "--encode", "--dedup", *more[1:], "model.vocab_size=400"]) == 0
    assert re.search(r"tools.encode_corpus .*\n.* --holdout 0.1 --dedup\n", capsys.readouterr().out)
    assert " --max-document-bytes 99 --keep-going || finish" in training
    assert "--keep-going --max-document-bytes 99\n" in encoding


def test_a_dry_run_says_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no sbatch file and no JSON document is in its way."""
    words = [LARGE, "--nodes", "2", "--cluster", str(EXAMPLE), "--dry-run"]
    for more in ([], ["--json"]):
        assert submit.main([*words, *more]) == 0
        told = capsys.readouterr()
        assert re.search(r"^nodes x ranks: 2 x 8; [\d.]+ GB a rank, about [\d.]+ hours of ", told.err, re.M)
        assert "nodes x ranks" not in told.out
    assert [stage["stage"] for stage in json.loads(told.out)] == ["train"]


def test_corpus_ranks_have_one_cpu_and_programs_a_limit_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("words")
    words = [LARGE, "--pipeline", ",".join(STAGES), "--input", str(tmp_path / "a.txt")]

    def asked(name: str, more: str, *options: str) -> list[str]:
        file = site(tmp_path, f"CPUS_PER_TASK=6\nTIME=9:00:00\n{more}")
        return re.findall(rf"#SBATCH --{name}=(\S+)", dry(capsys, *words, *options, cluster=file))

    assert asked("cpus-per-task", "") == ["1", "6", "6", "6", "6"]
    assert asked("time", "") == ["9:00:00"] * 5
    assert asked("time", "CPU_TIME=30\n") == ["9:00:00", "9:00:00", "30", "30", "30"]
    assert asked("time", "CPU_TIME=30\n", "--time", "2:00:00") == ["2:00:00"] * 5


def test_a_job_without_gpus_is_for_the_other_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would not fit the site's device is not for it either."""
    more = "GPUS_PER_NODE=8\nDEVICE=H100\nPARTITION=gpu\nCONSTRAINT=ib\n"
    words = [LARGE, "train.micro_batch_size=256", "--nodes", "1", "--gpus-per-node", "0"]
    text = dry(capsys, *words, cluster=site(tmp_path, more + "CPU_PARTITION=cpu\n"))
    assert "--partition=cpu\n" in text and "gpus" not in text and "constraint" not in text
    assert "--partition=gpu\n" in dry(capsys, *words, cluster=site(tmp_path, more))
    (tmp_path / "commands").write_text("true\n")
    words = ["--array", str(tmp_path / "commands"), "--output", str(tmp_path / "out")]
    file = site(tmp_path, more + "CPU_PARTITION=cpu\n")
    assert "--partition=gpu\n" in dry(capsys, *words, cluster=file)
    assert "--partition=cpu\n" in dry(capsys, *words, "--gpus-per-node", "0", cluster=file)


def test_an_array_takes_whole_nodes_where_nodes_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "commands").write_text("true\n")
    words = ["--array", str(tmp_path / "commands"), "--output", str(tmp_path / "out")]
    heads = [r"nodes=(\d+)", r"ntasks-per-node=(\d+)", r"gpus-per-node=(\d+)"]

    def asked(*more: str) -> list[str]:
        text = dry(capsys, *words, *more)
        return [found for head in heads for found in re.findall(f"#SBATCH --{head}\n", text)]

    assert asked() == ["1", "1", "1"]
    assert asked("--nodes", "4") == ["4", "8", "8"]
    assert asked("--nodes", "4", "--gpus-per-node", "2") == ["4", "2", "2"]


def test_the_dry_run_of_a_sweep_shows_file_and_size(capfd: pytest.CaptureFixture[str]) -> None:
    """The defaults are cluster.env's, as those of a run."""
    words = [LARGE, "--over", "optimizer.lr=2e-4,4e-4", "--slurm", "--dry-run", "--cluster", str(EXAMPLE)]
    assert sweep.main([*words, "--nodes", "4"]) == 0
    told = capfd.readouterr()
    for head in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "mem=0", "array=0-1"):
        assert f"#SBATCH --{head}\n" in told.out
    assert re.search(
        r"^nodes x ranks: 4 x 8; [\d.]+ GB a rank, about ([\d.]+) hours of training, [\d.]+ in all 2$",
        told.err,
        re.M,
    )
    assert sweep.main([*words, "--json"]) == 0
    told = capfd.readouterr()
    assert len(json.loads(told.out)) == 2 and "#SBATCH --nodes=1\n" in told.err
    assert sweep.main([*words, "train.micro_batch_size=256"]) == 2
    assert re.search(r"^error: lr-2e-4: .*smallest layout that fits", capfd.readouterr().err, re.M)


def test_an_unknown_device_is_the_sites(tmp_path: Path) -> None:
    file = site(tmp_path, "DEVICE=V100\n")
    with pytest.raises(UserError, match=f"^{file}: DEVICE: 'V100': not in the table"):
        submit.main([LARGE, "--cluster", str(file), "--dry-run"])


def test_an_array_is_only_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "commands").write_text("true\nfalse\n")
    words = ["--array", str(tmp_path / "commands"), "--output", str(tmp_path / "out"), "--at-once", "1"]
    assert "#SBATCH --array=0-1%1\n" in dry(capsys, *words)
    (shown,) = json.loads(dry(capsys, *words, "--json"))
    assert shown["stage"] == "array" and shown["text"].startswith("#!/bin/bash")
    assert not (tmp_path / "out").exists()


def test_every_sbatch_file_is_good_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / 'it\'s "a" 100% run'
    words = [f"run.dir={run}", "--pipeline", "corpus,train,evaluate,export,report", "--input", "it's a.txt"]
    text = dry(capsys, LARGE, *words)
    files = re.split(r"^# ==== .*\n", text, flags=re.MULTILINE)[1:]
    assert len(files) == 5 and not run.exists()
    for file in [*files, (ROOT / "slurm" / "job.sh").read_text(), EXAMPLE.read_text()]:
        checked = subprocess.run(["bash", "-n"], input=file, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
    # Programs that have nothing to save work until the time is up.
    told = [re.findall(r"--signal=(\S+)", file) for file in files]
    assert told == [["TERM@300"], ["USR1@300"], [], [], []]


def test_a_misspelt_site_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PARTITON means nothing here; did you mean PARTITION"):
        cluster.read(site(tmp_path, "PARTITON=gpu\n"))
    wrong = {"TASKS_PER_NODE": "two", "CPUS_PER_TASK": "0", "SIGNAL_SECONDS": "99999999", "TIME": "abc"}
    wrong |= {"REQUEUE": "maybe", "PREFLIGHT": "on", "MAX_ATTEMPTS": "0"}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"cluster.env: {name}: '{value}' is n"):
            cluster.read(site(tmp_path, f"{name}={value}\n"))
    with pytest.raises(UserError, match="bash cannot read it"):
        cluster.read(site(tmp_path, "setup() {\n"))
    assert cluster.read(EXAMPLE).gpus_per_node == 8 and cluster.read(EXAMPLE).tasks_per_node is None


def test_what_the_example_suggests_can_be_typed(tmp_path: Path) -> None:
    """A value where the others are, as it stands in the comment."""
    text, suggested = EXAMPLE.read_text(), {}
    for line in text.splitlines():
        if found := re.match(r"(\w+)=.*# .*such as (\"[^\"]*\"|[^ ,;]+)", line):
            suggested[found[1]] = found[2]
            text = text.replace(line, f"{found[1]}={found[2]}  # {line}")
        elif found := re.match(r"(SRUN|WRAP)=.*# \w+: (\1=\(.*\))$", line):
            text = text.replace(line, found[2])
    assert suggested.keys() == {
        *("CPU_PARTITION", "CONSTRAINT", "CPU_TIME", "OPTIONS", "PYTHON", "LOCAL_SCRATCH"),
    }
    (tmp_path / "cluster.env").write_text(text)
    read = cluster.read(tmp_path / "cluster.env")
    assert read.options == "--exclusive --mail-type=FAIL" and read.constraint == "h100&ib"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["preflight", "no/where.yaml", "--report", "TMP"], "no/where.yaml"),
        (["stage", "no/where.yaml", "--to", "TMP"], "no/where.yaml"),
        (["attempts", "begin", "TMP/run", "train", "--job", "1", "--limit", "3"], "TMP/run"),
        (["submit", "no/where.yaml", "--cluster", str(EXAMPLE)], "no/where.yaml"),
    ],
)
def test_programs_say_what_is_wrong(words: list[str], named: str, tmp_path: Path) -> None:
    def start(*more: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", f"slurm.{words[0]}", *more]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)

    done = start(*(word.replace("TMP", str(tmp_path)) for word in words[1:]))
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {named}: ".replace("TMP", str(tmp_path)))
    assert start("--version").stdout.startswith("LateMask ")


@pytest.mark.usefixtures("queue")
def test_what_a_run_cannot_go_on_with_is_refused_before_it_waits(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", "train.precision=null"]
    file = str(site(tmp_path))
    runs.finish([*words, "budget.steps=1"])
    assert submit.main([*words, "budget.steps=3", "--cluster", file]) == 0  # the rest is as it was
    before = (tmp_path / "run" / "slurm" / "config.yaml").read_bytes()
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="optimizer.lr: 0.003 -> 0.01: a run cannot continue"):
            submit.main([*words, "optimizer.lr=0.01", "--cluster", file, *more])
    assert (tmp_path / "run" / "slurm" / "config.yaml").read_bytes() == before
    # Of a sweep too: one of its runs is there.
    (tmp_path / "s").mkdir()
    (tmp_path / "run").rename(tmp_path / "s" / "steps-5")
    swept = ["--output", str(tmp_path / "s"), "--over", "budget.steps=5,6", "--slurm", "--cluster", file]
    assert sweep.main([words[0], "train.precision=null", "optimizer.lr=0.01", *swept]) == 2
    assert "optimizer.lr: 0.003 -> 0.01: a run cannot continue" in capfd.readouterr().err


def test_the_size_says_the_epochs(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = json.loads((tiny / "train.json").read_text())["tokens"]
    words = [str(tiny / "tiny.yaml"), "budget.steps=1000", "--dry-run", "--cluster", str(site(tmp_path))]
    assert submit.main(words) == 0
    assert f"nodes x ranks: 1 x 1, {1000 * 8 * 22 / tokens:,.2f} epochs\n" in capsys.readouterr().err


def test_an_absurd_plan_is_warned_of(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tiny / "tiny.yaml"), "budget.steps=900000", "--dry-run", "--cluster", str(site(tmp_path))]
    assert submit.main(words) == 0
    read = 900_000 * 8 * 22 / json.loads((tiny / "train.json").read_text())["tokens"]
    assert f"warning: the budget reads the corpus {read:,.0f} times (epochs)" in capsys.readouterr().err


def test_the_size_says_what_hours_buy(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tiny / "tiny.yaml"), "budget.steps=null", "budget.device_hours=3", "--dry-run"]
    gpus = site(tmp_path, "GPUS_PER_NODE=1\nDEVICE=H100\n")
    assert submit.main([*words, "--cluster", str(gpus)]) == 0
    assert re.search(
        r"about 3\.0 hours of training, about [\d,]+ updates, [\d,.]+ epochs\n", capsys.readouterr().err
    )


# ---- images --------------------------------------------------------------------------------------


def test_the_images_hold_what_is_pinned() -> None:
    """Both recipes run the same steps, whose pins are those of requirements.txt."""
    recipes = [(ROOT / "slurm" / name).read_text() for name in ("Dockerfile", "latemask.def")]
    words = "bash /opt/latemask/image.sh /opt/latemask/requirements.txt"
    for recipe in recipes:
        assert recipe.count(words) == 1
        for file in ("requirements.txt", "slurm/image.sh"):
            assert re.search(rf"^(COPY|    {file}|COPY .* {file}) ?.*/opt/latemask/", recipe, re.M), file
            assert (ROOT / file).is_file()
    (base,) = {found for recipe in recipes for found in re.findall(r"^F(?:ROM|rom:) (\S+)", recipe, re.M)}
    assert base.startswith("python:3.11-")  # as requires-python says
    steps = (ROOT / "slurm" / "image.sh").read_text()
    assert not re.search(r"[\w-]+[=<>]=\d", steps)  # no pin of its own
    assert subprocess.run(["bash", "-n"], input=steps, text=True).returncode == 0
    first = re.search(r'install .*"\$\((grep .*) "\$1"\)"', steps)
    assert first
    found = subprocess.run(
        [*first[1].replace("'", "").split(), ROOT / "requirements.txt"], capture_output=True, text=True
    )
    assert found.stdout == f"torch=={importlib.metadata.version('torch').partition('+')[0]}\n"


# ---- inside another job --------------------------------------------------------------------------

OF_A_JOB = {
    "SLURM_JOB_ID": "5",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_JOB_END_TIME": "4000000000",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x3",
    "SLURM_CPU_BIND_LIST": "0x3",
    "SLURM_MEM_PER_NODE": "4000",
    "SLURM_TRES_PER_TASK": "cpu=2",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_EXPORT_ENV": "NONE",
}
OF_A_USER = {"SBATCH_ACCOUNT": "mine", "SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_JWT": "key"}


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell inside a job, with commands of Slurm that write down their environment beside this file."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\nenv >{tmp_path}/{name}.env\necho 77\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in {**OF_A_JOB, **OF_A_USER}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def of_slurm(file: Path) -> dict[str, str]:
    """The variables of Slurm that a command was given."""
    lines = [line.partition("=") for line in file.read_text().splitlines()]
    return {name: value for name, _, value in lines if name.startswith(("SLURM_", "SBATCH_"))}


def test_variables_of_a_surrounding_job_stay_in_it(tiny: Path, seen: Path) -> None:
    file = site(seen)
    (seen / "commands").write_text("true\n")
    words = ["--array", str(seen / "commands"), "--output", str(seen / "out"), "--cluster", str(file)]
    assert submit.main(words) == 0
    assert of_slurm(seen / "sbatch.env") == OF_A_USER
    (seen / "sbatch.env").unlink()
    swept = [str(tiny / "tiny.yaml"), "--output", str(seen / "sweep"), "--over", "run.seed=1,2", "--slurm"]
    assert sweep.main([*swept, "--cluster", str(file)]) == 0
    assert of_slurm(seen / "sbatch.env") == OF_A_USER


def in_a_job(seen: Path, stage: str, script: str, more: str = "") -> None:
    """Runs lines of an sbatch file where job.sh is sourced; `more`: lines of cluster.env."""
    here = seen / "run" / "slurm"
    here.mkdir(parents=True)
    site = "PYTHON=python3\nREQUEUE=no\nSRUN=()\nWRAP=()\nsetup() { :; }\n"
    (here / "cluster.env").write_text(site + more)
    (here / "code").symlink_to(ROOT)
    lines = f'here={here}\nstage={stage}\n. "$here/code/slurm/job.sh"\n{script}\n'
    subprocess.run(["bash", "-c", lines], check=True)


@pytest.mark.parametrize("stage", ["train", "array"])
def test_a_job_that_submits_its_successor_keeps_its_variables(stage: str, seen: Path) -> None:
    os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"] = "5", "0"
    try:
        in_a_job(seen, stage, "again n3")
    finally:
        del os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]
    assert of_slurm(seen / "sbatch.env") == OF_A_USER
    assert journal.read(seen / "run")[0]["job"] == "77"


def test_ranks_are_not_bound_to_the_cores_of_a_shell(seen: Path) -> None:
    """In which somebody submitted the file of a job by hand."""
    in_a_job(seen, "train", "step true")
    given = of_slurm(seen / "srun.env")
    assert not [name for name in given if name.startswith(("SLURM_CPU_BIND", "SLURM_STEP_"))]
    assert given["SLURM_EXPORT_ENV"] == "ALL" and given["SLURM_MEM_PER_NODE"] == "4000"


def test_copies_on_a_shared_disk_are_each_users_own(seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, user in (("a", "ada"), ("b", "bob")):
        monkeypatch.setenv("USER", user)
        in_a_job(seen / name, "train", f'echo "$copies" >{seen / name}/told', "LOCAL_SCRATCH=/disk\n")
        assert (seen / name / "told").read_text() == f"/disk/latemask-{user}\n"


def test_wishes_that_are_not_passed_on_are_named(
    seen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in OF_A_JOB:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CPU_BIND", "none")
    (seen / "commands").write_text("true\n")
    words = ["--array", str(seen / "commands"), "--output", str(seen / "out"), "--cluster", str(site(seen))]
    assert submit.main(words) == 0
    assert "warning: SLURM_CPU_BIND: not passed on to jobs" in capsys.readouterr().err


# ---- files of other systems and of nobody --------------------------------------------------------


def test_line_ends_and_marks_of_another_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "cluster.env"
    plain.write_text(EXAMPLE.read_text().replace("ACCOUNT=\n", "ACCOUNT=lm\n"))
    (tmp_path / "dos.env").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    assert dry(capsys, LARGE, cluster=tmp_path / "dos.env") == dry(capsys, LARGE, cluster=plain)
    read = cluster.read(tmp_path / "dos.env")
    assert read.partition == "gpu" and read.text == plain.read_text()


def test_without_a_cluster_env_a_dry_run_shows_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "DEFAULT", tmp_path / "cluster.env")
    assert submit.main([LARGE, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert f"warning: {tmp_path}/cluster.env: no such file; what follows is of {EXAMPLE}" in told.err
    assert told.out == dry(capsys, LARGE)
    with pytest.raises(UserError, match="no such file; copy"):
        submit.main([LARGE])


def test_comments_of_an_array_are_no_commands(tmp_path: Path) -> None:
    file = tmp_path / "commands"
    file.write_bytes(b"\xef\xbb\xbf# first\r\n\r\n  # second\ntrue # third\r\necho a\x0bb \xe2\x80\xa8 c")
    assert submit.read_commands(file) == ["true # third", "echo a\x0bb \u2028 c"]
    file.write_text("true \\\n  and more\n")
    with pytest.raises(UserError, match="commands:1: ends with a backslash; a command is one line"):
        submit.read_commands(file)
    file.write_text("# nothing\n\n")
    with pytest.raises(UserError, match="no commands"):
        submit.read_commands(file)


def test_a_line_end_in_a_path_is_refused(tmp_path: Path) -> None:
    """Before anything is shown or written: what follows would be a line of the sbatch file."""
    run = f"{tmp_path}/a\nscancel --me"
    (tmp_path / "commands").write_text("true\n")
    array = ["--array", str(tmp_path / "commands"), "--output", run]
    for words in ([LARGE, f"run.dir={run}"], array):
        for more in (["--dry-run"], []):
            with pytest.raises(UserError, match="a line's end in a path"):
                submit.main([*words, *more, "--cluster", str(EXAMPLE)])
    with pytest.raises(UserError, match="is to be one line"):
        submit.main([LARGE, "--dry-run", "--cluster", str(site(tmp_path, "ACCOUNT=$'a\\nb'\n"))])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("a")]


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ("WRAP=(apptainer exec --nv a.sif)\n", True),
        ("SRUN=(--container-image=a.sqsh)\n", True),
        ("WRAP=(apptainer exec --nv a.sif)\nPYTHON=python3\n", False),
        ("WRAP=(nice)\n", False),
    ],
)
def test_a_container_has_a_python_of_its_own(
    more: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([LARGE, "--dry-run", "--cluster", str(site(tmp_path, more))]) == 0
    assert (f"jobs would call {sys.executable} of this machine" in capsys.readouterr().err) == warned


# ---- what is frozen ------------------------------------------------------------------------------


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that takes every job and starts none."""
    monkeypatch.setattr(scheduler, "submit", lambda script, after=None: "7")
    monkeypatch.setattr(scheduler, "query", lambda jobs: {})


@pytest.fixture
def share(tiny: Path, tmp_path: Path) -> list[str]:
    """A command line for a run that may spend what ten updates of `ref.yaml` cost."""
    words = ["budget.steps=10", f"run.dir={tmp_path / 'ref'}"]
    (tmp_path / "ref.yaml").write_text(dump_config(load_config(tiny / "tiny.yaml", words)))
    relative = ["budget.steps=null", f"budget.relative_to={tmp_path / 'ref.yaml'}"]
    return [str(tiny / "tiny.yaml"), *relative, f"run.dir={tmp_path / 'run'}"]


def frozen(run: Path, vocab_size: int) -> tuple[Config, float]:
    """The config of a submitted run, and the FLOPs that it may spend once its vocabulary is known."""
    config = load_config(run / "slurm" / "config.yaml")
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return config, make_recipe(config.model_copy(update={"model": model})).config.budget.amount[1]


@pytest.mark.usefixtures("queue")
def test_a_budget_is_frozen_as_an_amount(share: list[str], tmp_path: Path) -> None:
    """What it is relative to may be edited while the job waits."""
    assert submit.main([*share, "--cluster", str(site(tmp_path))]) == 0
    cost = make_recipe(load_config(tmp_path / "ref.yaml", ["model.vocab_size=400"])).budget.planned("flops")
    (tmp_path / "ref.yaml").unlink()
    config, amount = frozen(tmp_path / "run", 400)
    assert amount == pytest.approx(cost, rel=1e-12)
    assert config.budget.relative_to == str(tmp_path / "ref.yaml") and config.model.vocab_size is None


@pytest.mark.usefixtures("queue")
@pytest.mark.parametrize(("tokenizer", "pieces"), [("tokenizer", 400), ("new", 700)])
def test_a_budget_is_that_of_the_vocabulary_to_come(
    tokenizer: str, pieces: int, share: list[str], tiny: Path, tmp_path: Path
) -> None:
    """The corpus job finds a tokenizer, or makes one."""
    words = [*share, f"corpus.train={tmp_path}/train", f"corpus.tokenizer={tiny / tokenizer}"]
    words += ["--pipeline", "corpus,train", "--input", str(tiny / "train.jsonl"), "--vocab-size", "700"]
    assert submit.main([*words, "--cluster", str(site(tmp_path))]) == 0
    cost = make_recipe(load_config(tmp_path / "ref.yaml", [f"model.vocab_size={pieces}"])).budget.planned(
        "flops"
    )
    assert frozen(tmp_path / "run", pieces)[1] == pytest.approx(cost, rel=1e-12)


@pytest.mark.usefixtures("queue")
@pytest.mark.parametrize("submitted", [False, True])
def test_a_share_of_a_run_to_come_is_refused(submitted: bool, share: list[str], tmp_path: Path) -> None:
    if submitted:
        (tmp_path / "mlm" / "slurm").mkdir(parents=True)
    words = [*share, f"budget.relative_to={tmp_path / 'mlm'}", "--cluster", str(site(tmp_path))]
    with pytest.raises(UserError, match="budget.relative_to = .*/mlm: no such config, and no run that"):
        submit.main(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("seen")
def test_the_budgets_of_a_sweep_are_frozen(share: list[str], tmp_path: Path) -> None:
    words = [*share, "--output", str(tmp_path / "sweep"), "--over", "budget.fraction=0.5,1", "--slurm"]
    assert sweep.main([*words, "--cluster", str(site(tmp_path))]) == 0
    (tmp_path / "ref.yaml").unlink()
    half, whole = (
        load_config(tmp_path / "sweep" / "slurm" / f"fraction-{share}.yaml") for share in ("0.5", "1")
    )
    assert whole.budget.amount == ("flops", 2 * half.budget.amount[1])


# ---- verdicts ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("state", "said", "code", "verdict"),
    [
        ("finished", 0, 0, "done"),
        ("finished", 0, 143, "done"),  # a rank was stopped while it was leaving
        ("stopped", 75, 75, "again"),
        ("stopped", 75, 1, "again"),  # torchrun makes 1 of everything
        ("failed", 2, 1, "stop"),
        ("failed", 1, 1, "again"),
        ("running", None, 137, "again"),
        (None, None, 1, "again"),
        (None, None, 2, "stop"),  # the folder was in use: only the exit code says so
    ],
)
def test_what_follows_an_attempt(run: Path, state: str | None, said: Any, code: int, verdict: str) -> None:
    assert attempts.begin(run, "train", "7", "n1", limit=3) == 0
    if state:
        RunFolder(run).write_status(state, 5, "a reason", said)
    assert attempts.end(run, "train", "7", code, limit=3) == verdict
    assert journal.read(run)[-1]["verdict"] == verdict


def test_what_an_earlier_attempt_said_does_not_count(run: Path) -> None:
    RunFolder(run).write_status("failed", 5, "an old reason", 2)
    journal.note(run, "begin", "train", "8", reached=-1)
    verdict, reason = attempts.verdict_on_attempt(run, "train", 1, time.time() + 1)
    assert verdict == "again" and "an old reason" not in reason


def test_attempts_are_counted_since_the_last_checkpoint(run: Path) -> None:
    def fail() -> str:
        assert attempts.begin(run, "train", "7", "n1", limit=2) == 0
        return attempts.end(run, "train", "7", 1, limit=2)

    assert fail() == "again"
    (run / "checkpoints" / "step-00000004").mkdir()
    assert [fail(), fail()] == ["again", "stop"]
    assert "2 attempts without progress" in journal.read(run)[-1]["reason"]
    assert fail() == "again"  # it was started by hand after that
    # A lost node says nothing at the end: the next start notices.
    assert attempts.begin(run, "train", "7", "n1", limit=2) == 0
    assert attempts.begin(run, "train", "7", "n1", limit=2) == 1
    journal.note(run, "submit", "train", "9")
    assert attempts.begin(run, "train", "9", "n1", limit=2) == 0


def test_a_node_that_keeps_two_attempts_is_left_out(run: Path) -> None:
    def stall(job: str, *hosts: str) -> str:
        assert attempts.begin(run, "train", job, "n[1-3]", limit=9) == 0
        about = {"since": time.time() - 240, "where": "all-reduce (engine.py:9 step)", "hosts": hosts}
        RunFolder(run).write_status("running", 5, stalled=about)
        assert re.fullmatch(
            f"stalled 4 min in all-reduce on {hosts[-1]}", status.message(run, "train", [], [])
        )
        RunFolder(run).write_status("stopped", 5, "a reason", 75, stalled=about)
        return attempts.end(run, "train", job, 75, limit=9)

    assert [stall("1", "n2"), stall("2", "n3"), stall("3", "n2")] == ["again", "again", "again n2"]
    assert attempts.begin(run, "train", "4", "n[1-3]", limit=9) == 0
    RunFolder(run).write_status("stopped", 5, "a signal", 75)
    assert attempts.end(run, "train", "4", 75, limit=9) == "again"


# ---- bad nodes -----------------------------------------------------------------------------------


def note(folder: Path, rank: int, node: str, *problems: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{rank}.json").write_text(json.dumps({"node": node, "problems": problems}))


def test_the_judge_names_who_complains_and_who_is_silent(run: Path, tmp_path: Path) -> None:
    note(tmp_path / "a", 0, "n1")
    note(tmp_path / "a", 1, "n2", "disk full")
    verdict = preflight.verdict_on_nodes(run, "7", ["n1", "n2", "n3"], tmp_path / "a", limit=3)
    assert verdict == "again n3,n2"
    assert journal.read(run)[-1]["reason"] == "pre-flight: n3: no answer, n2: disk full"


def test_what_is_wrong_everywhere_is_no_nodes_fault(run: Path, tmp_path: Path) -> None:
    note(tmp_path / "a", 0, "n1", "no such corpus")
    note(tmp_path / "a", 1, "n2", "no such corpus")
    assert preflight.verdict_on_nodes(run, "7", ["n1", "n2"], tmp_path / "a", limit=3) == "stop"
    assert journal.read(run)[-1]["reason"] == "pre-flight: on every node: no such corpus"


def test_nodes_that_are_well_but_fail_together_try_again(run: Path, tmp_path: Path) -> None:
    note(tmp_path / "a", 0, "n1")
    note(tmp_path / "a", 1, "n2")
    assert preflight.verdict_on_nodes(run, "7", ["n1", "n2"], tmp_path / "a", limit=3) == "again"
    assert "failed together" in journal.read(run)[-1]["reason"]


def meet_with_a_wrong_clock(file: str) -> list[str]:
    """What a rank says, each on a node of its own, where that of rank 0 has a wrong clock."""
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
    with mock.patch("time.time", lambda: 1e9 + (100 if rank == 0 else 0)):
        return preflight.check_together(load_config(file))


def test_the_first_node_may_be_the_one_with_the_wrong_clock(run: Path, tiny: Path, tmp_path: Path) -> None:
    for rank, said in enumerate(ranks.run(3, meet_with_a_wrong_clock, str(tiny / "tiny.yaml"))):
        note(tmp_path / "a", rank, f"n{rank + 1}", *said)
    assert preflight.verdict_on_nodes(run, "7", ["n1", "n2", "n3"], tmp_path / "a", limit=3) == "again n1"
    assert "n1: its clock is +100 s off" in journal.read(run)[-1]["reason"]


def test_of_two_clocks_neither_is_known_to_be_right() -> None:
    assert [preflight.off({"n1": 100.0, "n2": 0.0}, node) for node in ("n1", "n2")] == [50, -50]


def test_there_must_be_room_for_two_checkpoints(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as one is on disk."""
    run = tmp_path / "run"
    runs.finish([str(tiny / "tiny.yaml"), f"run.dir={run}", "budget.steps=1"])
    size = sum(file.stat().st_size for file in checkpoint.find_verified(run)[0].iterdir())
    usage, free = shutil.disk_usage(run), 0
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))
    config = load_config(run / "config.yaml")
    free = int(2.2 * size)
    assert preflight._space(config, "") == []
    free = int(1.8 * size)
    (said,) = preflight._space(config, "")
    assert said.startswith(f"{run}: ") and said.endswith(" needed")


def test_there_must_be_room_for_orders_of_many_documents(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the node's disk, where what is there already counts, and in its memory."""
    copies = tmp_path / "copies"
    config = load_config(tiny / "tiny.yaml", [f"run.dir={tmp_path}", f"corpus.copies={copies}"])
    assert preflight._space(config, "") == [] and not copies.exists()
    monkeypatch.setattr(document_order, "MANY", 0)
    needed, usage, free = mapped(config.corpus), shutil.disk_usage(tmp_path), 1 << 40
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: usage._replace(free=free if folder == copies else 1 << 40)
    )
    before = os.umask(0o002)
    try:
        assert preflight._space(config, "") == []
    finally:
        os.umask(before)
    assert copies.stat().st_mode & 0o777 == 0o700  # or training would refuse it
    free = needed.orders - 1
    (said,) = preflight._space(config, "")
    assert said.startswith(f"{copies}: ")
    open_blend(config, open_data(config.corpus)).read(np.array([0]))
    assert preflight._space(config, "") == []
    copies.chmod(0o777)
    (said,) = preflight._space(config, "")
    assert "others may write there" in said

    memory = psutil.virtual_memory()
    available = preflight.MEMORY_BYTES + needed.total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=available))
    assert preflight._memory(config, range(1), 1) == []
    available -= 1
    (said,) = preflight._memory(config, range(1), 1)
    assert "GB of memory free" in said
    words = ["checkpoint.background=true", "model.vocab_size=400", "parallel.tensor=2"]
    writes = load_config(tiny / "tiny.yaml", words)
    copies = [plan_memory.copied(make_recipe(writes), plan_memory.Layout(tensor=2), rank) for rank in (0, 1)]
    assert copies[0] > copies[1] > 0
    for node in (range(1), range(1, 2), range(2)):  # each rank has a node of its own, or both have one
        available = len(node) * preflight.MEMORY_BYTES + needed.total + sum(copies[rank] for rank in node)
        assert preflight._memory(writes, node, 2) == []
        available -= 1
        assert preflight._memory(writes, node, 2) != []


def test_the_ranks_of_a_node() -> None:
    for nodes, expected in ((1, [range(4)] * 4), (2, [range(2)] * 2 + [range(2, 4)] * 2)):
        places = [Identity("srun", rank, 4, rank % (4 // nodes)) for rank in range(4)]
        environ = {"SLURM_STEP_NUM_NODES": str(nodes)}
        assert [preflight.node_ranks(me, environ) for me in places] == expected


# ---- copies of the corpus ------------------------------------------------------------------------


def test_a_planted_copy_is_replaced(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    copy, _ = stage.copy(str(tiny / "train"), folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    for extension in ("bin", "idx", "json"):
        shutil.copyfile(tiny / f"valid.{extension}", f"{copy}.{extension}")
    expected = IndexedReader(tiny / "train").tokens
    assert np.array_equal(corpora.open_nearest(str(tiny / "train"), str(folder)).tokens, expected)
    assert stage.copy(str(tiny / "train"), folder) == (copy, True)
    assert np.array_equal(IndexedReader(copy).tokens, expected)


def test_a_copy_is_checked_and_read(tiny: Path, tmp_path: Path) -> None:
    from pretrain.data.corpora import open_nearest
    from pretrain.data.indexed import IndexedReader, corpus_file

    copy, new = stage.copy(str(tiny / "train"), tmp_path)
    assert new and stage.copy(str(tiny / "train"), tmp_path) == (copy, False)
    near = open_nearest(str(tiny / "train"), str(tmp_path))
    original = IndexedReader(tiny / "train")
    assert near.prefix == original.prefix and (near.tokens == original.tokens).all()
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".idx", ".json"}
    corpus_file(copy, "bin").write_bytes(bytes(original.tokens.nbytes))
    assert not open_nearest(str(tiny / "train"), str(tmp_path)).tokens.any()  # it is the copy that is read
    corpus_file(copy, "bin").write_bytes(b"")
    assert (open_nearest(str(tiny / "train"), str(tmp_path)).tokens == original.tokens).all()
    corpus_file(copy, "json").unlink()  # a copy that was interrupted
    assert len(open_nearest(str(tiny / "train"), str(tmp_path)).tokens) == len(original.tokens)


def test_a_bad_original_makes_no_copy(tiny: Path, tmp_path: Path) -> None:
    for extension in ("bin", "idx", "json"):
        (tmp_path / f"bad.{extension}").write_bytes((tiny / f"train.{extension}").read_bytes())
    data = bytearray((tmp_path / "bad.bin").read_bytes())
    data[100] ^= 1
    (tmp_path / "bad.bin").write_bytes(data)
    with pytest.raises(UserError, match="differ from the manifest"):
        stage.copy(str(tmp_path / "bad"), tmp_path / "copies")
    assert not list((tmp_path / "copies").iterdir())


# ---- status --------------------------------------------------------------------------------------


def test_a_run_is_named_by_a_config_with_overrides(tiny: Path, run: Path, tmp_path: Path) -> None:
    journal.note(run, "submit", "train", "7")
    file, odd = str(tiny / "tiny.yaml"), tmp_path / "lr=3"
    assert submit.runs_of([file, f"run.dir={run}"]) == [run]
    shutil.copytree(run, odd)
    assert submit.runs_of([str(odd), file, f"run.dir={run}"]) == [odd, run]
    with pytest.raises(UserError, match=f"^run.dir={run}: no such folder, and no CONFIG"):
        submit.runs_of([str(odd), f"run.dir={run}"])


@pytest.mark.parametrize(
    ("count", "undone", "message"),
    [
        (3, [1], "failed in commands.txt: line 2"),
        (1003, [0, 1001, 1002], "failed in commands.txt: line 1, 1002, 1003"),  # tasks 0, 1 and 2
        (9, range(2, 9), "failed in commands.txt: line 3, 4, 5, 6, 7, ..."),
    ],
)
def test_failed_commands_are_numbered(
    count: int, undone: Sequence[int], message: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "slurm" / "commands.txt").write_text("a command\n" * count)
    (run / "slurm" / "done").mkdir()
    for number in set(range(count)) - set(undone):
        (run / "slurm" / "done" / str(number)).touch()
    journal.note(run, "submit", "array", "7")
    monkeypatch.setattr(scheduler, "query", lambda jobs: {})
    (row,) = status.rows([run])
    assert row.state == "failed" and row.tasks and row.tasks["failed"] == len(undone)
    assert row.message == message and status.text([row]).endswith(f"; {message}")
    # What is not over has not failed.
    running = [Seen(f"7_{task}", "RUNNING", "None", 0) for task in range(count)]
    monkeypatch.setattr(scheduler, "query", lambda jobs: {"7": running})
    assert status.rows([run])[0].message == ""


def test_words_for_states() -> None:
    def word(state: str, reason: str = "None", restarts: int = 0) -> str:
        return status.state(Seen("1", state, reason, restarts))

    assert [word("PENDING"), word("PENDING", "BeginTime", 1)] == ["pending", "requeued"]
    assert [word("PENDING", "JobHeldUser"), word("TIMEOUT")] == ["held", "failed"]


def test_a_job_that_slurm_has_forgotten() -> None:
    begun: list[journal.Line] = [{"event": "begin", "job": "1"}]
    left = {code: [*begun, {"event": "exit", "job": "1", "code": code}] for code in (0, 1)}
    assert [status.forgotten(left[code], "1") for code in (0, 1)] == ["finished", "failed"]
    assert status.forgotten(begun, "1") == "vanished"
    cancelled = {"event": "cancel", "job": "1"}
    assert status.forgotten([*begun, cancelled, *left[1]], "1") == "cancelled"


def test_a_cancel_says_what_there_was(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.note(run, "submit", "train", "7")
    monkeypatch.setattr(scheduler, "query", lambda jobs: {})
    assert submit.main(["--cancel", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: no job in the queue (train vanished)\n"


def test_a_job_that_was_submitted_by_hand_is_known_when_it_begins() -> None:
    lines: list[journal.Line] = [
        {"event": "submit", "stage": "train", "job": "1"},
        {"event": "begin", "stage": "train", "job": "1"},
        {"event": "exit", "stage": "train", "job": "1"},
        {"event": "begin", "stage": "train", "job": "2"},
    ]
    assert status.newest_jobs(lines) == {"train": ["2"]}


def test_no_answer_is_no_forgotten_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Slurm's controller is down."""
    (tmp_path / "squeue").write_text("#!/bin/sh\necho squeue: error: Unable to contact >&2; exit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="^squeue: Unable to contact; try again"):
        scheduler.query(["7"])
