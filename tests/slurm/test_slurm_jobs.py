"""Jobs on a real Slurm: that runs finish by themselves, whatever is done to them, with the same result.

Every run lives in a folder whose name a shell or Slurm would like to take apart.
"""

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from pretrain import checkpoint
from pretrain.errors import UserError
from pretrain.files import locked
from pretrain.monitor import read_metrics
from pretrain.parallel.launchers import job_end
from pretrain.provenance import code_revision
from pretrain.run_folder import RunFolder
from slurm import status, submit
from slurm.render import STAGES
from tests.support.finetuning import encoder, sentences
from tests.support.runs import finish, result
from tests.support.slurm_cluster import cluster, jobs
from tests.support.slurm_cluster.cluster import SCRATCH
from tests.support.slurm_cluster.cluster import run as command
from tools import sweep
from tools.finetune import __main__ as finetune
from tools.finetune.cells import read_runs
from tools.shared import journal

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("slurm")

FOREVER = "sleep infinity"
"""A job that ends when somebody ends it."""


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder for a run."""
    return tmp_path / 'it\'s "a" 100%j $run'


# ---- whatever is done to a run -------------------------------------------------------------------


@pytest.mark.parametrize("event", jobs.EVENTS)
def test_a_run_goes_on_after(event: str, tiny: Path, odd: Path, tmp_path: Path) -> None:
    """The weights are those of a run that nothing happened to."""
    nodes, options = 1 + (event == "node down"), ["--partition", "spare"] if event == "preemption" else []
    site = jobs.site(tmp_path, jobs.RESTLESS)
    words = [str(tiny / "tiny.yaml"), f"run.dir={odd}", *jobs.LONG, "checkpoint.every_steps=1"]
    (job,) = jobs.start([*words, "--nodes", str(nodes), *options], site)
    jobs.trains(odd, job)
    assert jobs.row(odd)["state"] == "running" and jobs.row(odd)["seconds_left"] > 0
    jobs.EVENTS[event](job)
    jobs.requeued(job)
    assert jobs.row(odd)["state"] == "requeued", jobs.row(odd)
    if event in ("signal", "time limit"):
        assert jobs.row(odd)["message"] == "stopped by SIGUSR1"
    reached = max(checkpoint.steps(odd))
    steps = reached + 3
    jobs.shorten(odd, steps)
    jobs.set_limit(job, 10)
    jobs.hurry(job)
    assert jobs.wait(job, odd) == "COMPLETED", jobs.log(odd)
    assert jobs.row(odd)["state"] == "finished" and 2 <= jobs.row(odd)["attempts"] <= 1 + jobs.restarts(job)
    told_so = RunFolder(odd).status()
    assert (told_so["exit_code"], told_so["step"]) == (0, steps)
    alone = [*words[:1], f"run.dir={tmp_path / 'alone'}", *jobs.LONG, f"budget.steps={steps}"]
    finish(alone, nodes)
    assert result(odd) == result(tmp_path / "alone")


def test_scancel_saves_and_ends(
    tiny: Path, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny / "tiny.yaml"), f"run.dir={odd}", *jobs.LONG]
    (job,) = jobs.start(words, jobs.site(tmp_path))
    with pytest.raises(UserError, match="train is .* as job"):
        submit.main([*words, "--cluster", str(tmp_path / "cluster.env")])
    jobs.trains(odd, job)
    assert submit.main(["--cancel", str(odd)]) == 0
    assert jobs.wait(job, odd) == "CANCELLED"
    told_so = RunFolder(odd).status()
    assert (told_so["state"], told_so["exit_code"]) == ("stopped", 75)
    assert checkpoint.steps(odd) == [told_so["step"]]
    assert jobs.row(odd)["state"] == "cancelled"


def test_what_the_user_must_change_stops_the_chain(tiny: Path, odd: Path, tmp_path: Path) -> None:
    """A file that was whole when the job was submitted."""
    for extension in ("idx", "json", "bin"):
        shutil.copy(tiny / f"valid.{extension}", tmp_path / f"bad.{extension}")
    words = [str(tiny / "tiny.yaml"), f"run.dir={odd}", f"corpus.valid={tmp_path / 'bad'}"]
    site = jobs.site(tmp_path, "OPTIONS=--hold\n")
    train, report = jobs.start([*words, "--pipeline", "train,report"], site)
    (tmp_path / "bad.bin").write_bytes(b"")
    command("scontrol", "release", train)
    assert jobs.wait(train, odd) == "FAILED"
    assert jobs.wait(report, odd) == "CANCELLED"
    assert jobs.row(odd)["state"] == "failed" and "bad.bin" in jobs.row(odd)["message"], jobs.log(odd)
    assert jobs.row(odd, "report")["state"] == "cancelled"


def test_a_run_that_dies_without_progress_stops(tiny: Path, odd: Path, tmp_path: Path) -> None:
    site = jobs.site(tmp_path, "MAX_ATTEMPTS=2\n")
    (job,) = jobs.start([str(tiny / "tiny.yaml"), f"run.dir={odd}", *jobs.LONG], site)
    for number in (1, 2):
        begun = (odd / "metrics.jsonl").stat().st_mtime if number == 2 else 0.0
        jobs.until(
            lambda: (odd / "metrics.jsonl").exists() and (odd / "metrics.jsonl").stat().st_mtime > begun,  # noqa: B023
            f"updates of attempt {number}",
        )
        # Who made updates has written into its lock before.
        os.kill(int((odd / ".lock").read_text().split()[1]), signal.SIGKILL)
        if number == 1:
            jobs.requeued(job)
            jobs.hurry(job)
    assert jobs.wait(job, odd) == "FAILED"
    assert jobs.row(odd)["message"].startswith("NonZeroExitCode; 2 attempts without progress")


def test_where_requeue_is_forbidden(
    tiny: Path, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job submits its successor, and who waited for it waits for that; also from within an array."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    site = jobs.site(tmp_path, "REQUEUE=no\n")
    words = [str(tiny / "tiny.yaml"), f"run.dir={odd}", *jobs.LONG, "--pipeline", "train,report"]
    first, report = jobs.start(words, site)
    jobs.trains(odd, first)
    jobs.shorten(odd, 10**6)
    jobs.tell(first)
    assert jobs.wait(first, odd) == "COMPLETED"
    second = jobs.row(odd)["job"]
    assert second != first and jobs.state(report) == "PENDING"
    jobs.until(lambda: "continues   from" in jobs.log(odd), "the second attempt")
    jobs.tell(second)
    jobs.wait(second, odd)
    third = jobs.row(odd)["job"]
    assert third not in (first, second)
    command("scancel", third)
    jobs.wait(third, odd)
    assert jobs.wait(report, odd) == "CANCELLED"


# ---- ranks on two nodes --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["parallel.zero=1", "parallel.tensor=2"])
def test_two_nodes(layout: str, tiny: Path, odd: Path, tmp_path: Path) -> None:
    """With a copy of the corpus on each node's disk: the losses of one process."""
    site = jobs.site(tmp_path, f"LOCAL_SCRATCH={SCRATCH}\n")
    words = [str(tiny / "tiny.yaml"), f"run.dir={odd}", "train.engine=deepspeed", layout]
    (job,) = jobs.start([*words, "--nodes", "2"], site)
    assert jobs.wait(job, odd) == "COMPLETED", jobs.log(odd)
    finish([words[0], f"run.dir={tmp_path / 'alone'}"])
    for mine, theirs in zip(read_metrics(odd), read_metrics(tmp_path / "alone"), strict=True):
        for name in {"loss", "held_out_loss"} & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (name, mine["step"])
    provenance = json.loads((odd / "provenance.json").read_text())[-1]
    assert (provenance["launcher"], provenance["ranks"]) == ("srun", 2)
    assert provenance["commit"] == code_revision()
    text = jobs.log(odd)
    assert text.count("train: copied") + text.count("train: there already") == 2
    assert "lm1: " in text and "lm2: " in text
    copies = yaml.safe_load((odd / "config.yaml").read_text())["corpus"]["copies"]
    assert copies == f"{SCRATCH}/latemask-{getpass.getuser()}"


@pytest.mark.parametrize(
    ("nodes", "bad", "begun"),
    [(2, ["lm2"], ["lm[1-2]", "lm[1,3]"]), (1, ["lm1", "lm2"], ["lm1", "lm2", "lm3"])],
)
def test_bad_nodes_are_named_and_left_out(
    nodes: int, bad: list[str], begun: list[str], tiny: Path, odd: Path, tmp_path: Path
) -> None:
    """Their scratch disks cannot be written: the job goes on with the others."""
    site = jobs.site(tmp_path, f"PREFLIGHT=yes\nLOCAL_SCRATCH={SCRATCH}/deep{nodes}\n")
    for node in bad:
        disk = SCRATCH.with_name(f"{SCRATCH.name}.{node}")
        (disk / f"deep{nodes}").write_text("a file where there should be a folder")
    (job,) = jobs.start([str(tiny / "tiny.yaml"), f"run.dir={odd}", "--nodes", str(nodes)], site)
    for node in bad:
        reason = f"pre-flight: {node}: {SCRATCH}/deep{nodes}/latemask-{getpass.getuser()}: Not a directory"
        jobs.until(lambda: reason in jobs.row(odd)["message"], reason)  # noqa: B023
        jobs.requeued(job)
        assert jobs.row(odd)["state"] == "requeued"
        jobs.hurry(job)
    assert jobs.wait(job, odd) == "COMPLETED", jobs.log(odd)
    assert [line["nodes"] for line in journal.read(odd) if line["event"] == "begin"] == begun


# ---- chains and arrays ---------------------------------------------------------------------------


def test_a_pipeline_from_raw_text_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command; the corpus is encoded on two nodes, and all names have blanks in them."""
    home = tmp_path / "all of it"
    home.mkdir()
    site = jobs.site(home)
    data, run = home / "my data", home / "a run"
    words = [str(ROOT / "configs" / "demo-3ml.yaml"), f"run.dir={run}", "evaluate.samples=8"]
    words += ["model.hidden_size=32", "model.num_heads=2", "model.ffn_size=48"]
    words += ["budget.flops=null", "budget.steps=6"]
    words += [f"corpus.train={data}/train", f"corpus.valid={data}/train-valid"]
    words += ["--pipeline", "corpus,train,evaluate,export,report", "--holdout", "0.1", "--vocab-size", "700"]
    words += ["--input", str(ROOT / "tools" / "sample" / "*.jsonl.gz"), "--corpus-nodes", "2"]
    chain = jobs.start([*words, "--corpus-tasks-per-node", "1"], site)
    assert [jobs.wait(job, run) for job in chain] == ["COMPLETED"] * 5, jobs.log(run)
    rows = status.rows([run])
    assert [(row.stage, row.state) for row in rows] == [(stage, "finished") for stage in STAGES]
    assert (run / "export" / "model.safetensors").exists() and (run / "report" / "report.html").exists()
    assert "loss" in (run / "slurm" / f"evaluate-{chain[2]}.log").read_text()


USED_HEAP = """
import ctypes, os, runpy
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
held = [(libc.malloc(size), size) for size in (256, 1000, 4096, 4100, 8200) for _ in range(4000)]
for place, size in held:
    ctypes.memmove(place, os.urandom(size), size)
for place, _ in held[::2]:
    libc.free(place)
runpy.run_module("tools.encode_corpus", run_name="__main__", alter_sys=True)
"""
"""A program in whose freed memory is anything but zeros, as in one that has worked before it starts MPI."""


def test_a_corpus_is_the_same_from_ranks_on_two_nodes(tiny: Path, tmp_path: Path) -> None:
    source = ROOT / "tools" / "sample" / "valid.jsonl.gz"
    for name, before in {"one": [], "many": ["srun", "-N2", "--ntasks-per-node=2", "--mpi=pmi2"]}.items():
        words = ["-c", USED_HEAP, "--input", str(source), "--tokenizer", str(tiny / "tokenizer")]
        line = [*before, sys.executable, *words, "--output", str(tmp_path / name), "--workers", "1"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=jobs.PATIENCE)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("documents") == 1
    for extension in ("bin", "idx"):
        assert (tmp_path / f"one.{extension}").read_bytes() == (tmp_path / f"many.{extension}").read_bytes()


def test_an_array_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is done once; one that asks for it is started again, not for ever; one that fails counts.

    Also where jobs begin without the environment, as some sites want it.
    """
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    home = tmp_path / "a grid"
    commands = [f"echo {word} >>'{home}/out'" for word in ("one", "two")]
    commands += [
        f"[ -e '{home}/again' ] || {{ touch '{home}/again'; exit 75; }}; echo three >>'{home}/out'",
        "exit 3",
        f"echo x >>'{home}/never'; exit 75",
    ]
    (tmp_path / "commands").write_text("\n".join(commands))
    words = [
        "--array",
        str(tmp_path / "commands"),
        "--output",
        str(home),
        "--cluster",
        str(jobs.site(tmp_path, "MAX_ATTEMPTS=2\n")),
    ]
    assert submit.main(words) == 0
    (job,) = [line["job"] for line in journal.read(home) if line["event"] == "submit"]
    waiting = {"finished": 2, "requeued": 2, "failed": 1}
    jobs.until(
        lambda: jobs.row(home, "array")["tasks"] == waiting, "two tasks to be requeued, the others' end"
    )
    assert jobs.row(home, "array")["state"] == "requeued"
    jobs.hurry(f"{job}_2")
    jobs.hurry(f"{job}_4")
    jobs.until(lambda: jobs.row(home, "array")["state"] in status.ENDED, "the array")
    assert jobs.row(home, "array")["tasks"] == {"finished": 3, "failed": 2}
    assert (home / "never").read_text().split() == ["x", "x"]
    assert sorted((home / "out").read_text().split()) == ["one", "three", "two"]
    assert sorted(path.name for path in (home / "slurm" / "done").iterdir()) == ["0", "1", "2"]
    # Slurm forgets tasks one by one.
    assert sorted(status.tasks(home, journal.read(home), [])) == ["failed"] * 2 + ["finished"] * 3
    assert jobs.row(home, "array")["message"] == "failed in commands.txt: line 4, 5"


def waiting_for(file: Path) -> int:
    """Return how many processes wait for the lock of a file."""
    locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    return sum("->" in lock and f":{file.stat().st_ino} " in lock for lock in locks)


def test_fine_tuning_as_an_array(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares that are told of their job's end go on in the next one, and do every run once."""
    encoder(tmp_path / "encoder")
    out = tmp_path / "a grid"
    words = [str(tmp_path / "encoder"), f"--data={sentences(tmp_path / 'data')}", f"--output={out}"]
    words += ["--lrs=1e-3", "--epochs=1", "--seeds=2", "--tasks", "SST-2"]
    file, home = out / "runs.jsonl", out / "jobs"
    monkeypatch.setattr(finetune, "MAX_SHARES", 2)
    out.mkdir()
    with file.open("a+b") as opened, locked(opened, file):
        assert finetune.main([*words, "--slurm", f"--cluster={jobs.site(tmp_path)}"]) == 0
        (job,) = [line["job"] for line in journal.read(home) if line["event"] == "submit"]
        jobs.until(lambda: waiting_for(file) == 2, "both shares to have a run to write down")
        command("scancel", "--signal=USR1", job)
        jobs.until(lambda: jobs.row(home, "array")["tasks"] == {"requeued": 2}, "both to be told of the end")
    for share in range(2):
        jobs.hurry(f"{job}_{share}")
    jobs.until(lambda: jobs.row(home, "array")["state"] in status.ENDED, "the array")
    assert jobs.row(home, "array")["tasks"] == {"finished": 2}, jobs.log(home)
    assert len(file.read_text(encoding="utf-8").splitlines()) == len(read_runs(file)) == 2 + 2 * 2
    capfd.readouterr()
    assert finetune.main([*words, "--dry-run"]) == 0 and capfd.readouterr().out.startswith("0 runs to do")
    assert finetune.main([*words, "--slurm"]) == 0 and "nothing is left" in capfd.readouterr().err
    assert finetune.main(words) == 0 and "SST-2, accuracy" in capfd.readouterr().out


def test_a_job_from_within_a_job_is_a_job_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job around the submitter left would be options of srun in the new one."""
    left = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x3", "SLURM_CPU_BIND_LIST": "0x3", "SLURM_NTASKS": "77"}
    left |= {"SLURM_MEM_PER_CPU": "123", "SLURM_GPUS_PER_TASK": "gpu:9", "SLURM_JOB_ID": "999999"}
    left |= {"SLURM_NODELIST": "elsewhere", "SLURM_DISTRIBUTION": "arbitrary", "SLURM_HINT": "nomultithread"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "commands").write_text(f"env >{tmp_path}/env\n")
    home = tmp_path / "array"
    array = ["--array", str(tmp_path / "commands"), "--output", str(home)]
    assert submit.main([*array, "--cluster", str(jobs.site(tmp_path))]) == 0
    jobs.until(lambda: jobs.row(home, "array")["state"] in status.ENDED, "the array")
    assert jobs.row(home, "array")["state"] == "finished", jobs.log(home)
    given = (tmp_path / "env").read_text().splitlines()
    assert not [f"{name}={value}" for name, value in left.items() if f"{name}={value}" in given]


def test_an_array_where_requeue_is_forbidden(tmp_path: Path) -> None:
    """A task's successor takes its place; the others stay what they were."""
    home = tmp_path / "a grid"
    (tmp_path / "commands").write_text("exit 3\nsleep infinity\n[ -e again ] || { touch again; exit 75; }")
    site = jobs.site(tmp_path, f"REQUEUE=no\nsetup() {{ cd '{tmp_path}'; }}\n")
    array = ["--array", str(tmp_path / "commands"), "--output", str(home)]
    assert submit.main([*array, "--cluster", str(site)]) == 0
    jobs.until(lambda: len(jobs.row(home, "array")["jobs"]) == 2, "the successor")
    tasks = {"failed": 1, "running": 1, "finished": 1}
    jobs.until(lambda: jobs.row(home, "array")["tasks"] == tasks, "its end, and that of the first")
    assert submit.main(["--cancel", str(home)]) == 0
    jobs.until(lambda: jobs.row(home, "array")["state"] in status.ENDED, "the array's end")
    assert jobs.row(home, "array")["tasks"] == {"failed": 1, "cancelled": 1, "finished": 1}


def test_a_sweep_through_the_queue(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Interrupted, it goes on with what is left; the table is that of a sweep on one machine."""
    home = tmp_path / "a sweep"
    # Until this job has gone the sweep is in the queue, and until it is interrupted its second run.
    before = command(
        "sbatch", "--parsable", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", FOREVER
    ).strip()
    jobs.until(lambda: jobs.state(before) == "RUNNING", "the job before")
    words = [str(tiny / "tiny.yaml"), "budget.steps=3", "--output", str(home), "--over", "run.seed=1,2"]
    words += ["--slurm", "--cluster", str(jobs.site(tmp_path)), "--at-once", "1", "--json"]
    assert sweep.main(words) == 0
    first = jobs.row(home, "array")["job"]
    assert sweep.main(words) == 0  # not twice at the same time
    assert f"job {first}: pending" in capfd.readouterr().err
    command("scontrol", "hold", f"{first}_1")
    command("scancel", before)
    jobs.until(lambda: RunFolder(home / "seed-1").status().get("state") == "finished", "the first run")
    submit.main(["--cancel", str(home)])
    jobs.until(lambda: jobs.row(home, "array")["state"] in status.ENDED, "the array's end")
    assert not (home / "seed-2").exists()
    assert sweep.main(words) == 0
    assert len((home / "slurm" / "commands.txt").read_text().splitlines()) == 1
    jobs.until(lambda: jobs.row(home, "array")["state"] == "finished", "the rest")
    capfd.readouterr()
    assert sweep.main(words) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [(line["name"], line["state"], line["steps"]) for line in rows] == [
        ("seed-1", "finished", 3),
        ("seed-2", "finished", 3),
    ]


# ---- status, as Slurm has it ---------------------------------------------------------------------


def test_every_state_has_its_word(tmp_path: Path) -> None:
    """Of jobs that do nothing: what is asked is how the queue's answers are read."""

    def put(name: str, *options: str, do: str = FOREVER) -> str:
        (tmp_path / name / "slurm").mkdir(parents=True)
        job = command("sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", do).strip()
        journal.note(tmp_path / name, "submit", "train", job)
        return job

    put("finished", do="true")
    put("failed", do="exit 3")
    put("held", "--hold")
    command("scancel", put("cancelled"))
    doomed = put("preempted", "-p", "doomed", "-w", "lm3", "--exclusive")
    jobs.until(lambda: jobs.state(doomed) == "RUNNING", "the doomed job")
    put("running", "-w", "lm3", "--exclusive")
    put("pending", "-w", "lm3", "--exclusive")
    sent_back = put("requeued", "-w", "lm1")
    jobs.until(lambda: jobs.state(sent_back) == "RUNNING", "the job to be sent back")
    command("scontrol", "requeue", sent_back)
    jobs.requeued(sent_back)
    (tmp_path / "vanished" / "slurm").mkdir(parents=True)
    journal.note(tmp_path / "vanished", "submit", "train", "987654")
    runs = sorted(path.name for path in tmp_path.iterdir())

    def words() -> dict[str, str]:
        return {Path(line.run).name: line.state for line in status.rows([tmp_path / name for name in runs])}

    jobs.until(lambda: words() == {name: name for name in runs}, f"{words()}")
    assert submit.main(["--cancel", *(str(tmp_path / name) for name in runs)]) == 0


def test_the_jobs_end_is_found() -> None:
    """SLURM_JOB_END_TIME is not set by this Slurm: the queue is asked."""
    job = command("sbatch", "--parsable", "--time", "7", "-o", "/dev/null", "--wrap", FOREVER).strip()
    jobs.until(lambda: jobs.state(job) == "RUNNING", "the job")
    end = job_end({**os.environ, "SLURM_JOB_ID": job})
    (known,) = re.findall(r" EndTime=(\S+)", command("scontrol", "-o", "show", "job", job))
    command("scancel", job)
    assert end == datetime.fromisoformat(known).timestamp()


def test_a_drained_node_returns_to_service() -> None:
    """The other tests count on it."""
    command("scontrol", "update", "nodename=lm1", "state=drain", "reason=Kill task failed")
    assert not cluster.healthy()
    cluster.heal()
    jobs.until(cluster.healthy, "the node")
