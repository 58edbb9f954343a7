"""What real Slurms printed, and ledgers made to go with it: every device-second of a job has its place.

The texts are of Slurm 22.05 with slurmdbd: a job of two ranks on four GPUs that was requeued once.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.account import ledger, process
from pretrain.account.ledger_writer import Ledger
from pretrain.errors import UserError
from tests.account.test_ledger import COST, Clock
from tools.ledger import emissions, reconcile
from tools.shared import journal

REQUEUED = "2|REQUEUED|1795178388|1795178408|billing=2,cpu=2,gres/gpu=4,mem=2000M,node=1\n"
PENDING = "2|PENDING|Unknown|Unknown|\n"
RUNNING = "2|RUNNING|1795178539|Unknown|billing=2,cpu=2,gres/gpu=4,mem=2000M,node=1\n"
COMPLETED = "2|COMPLETED|1795178539|1795178639|billing=2,cpu=2,gres/gpu=4,mem=2000M,node=1\n"
COMPLETION = "2|COMPLETED|2026-11-20T12:39:48|2026-11-20T12:40:08|2\n"
CONTROL = (
    "JobId=2 JobName=job.sh UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901758 Nice=0"
    " JobState={} Reason=BeginTime Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 ExitCode=0:0"
    " RunTime=00:00:00 TimeLimit=01:00:00 TimeMin=N/A SubmitTime=2026-11-20T12:40:18"
    " StartTime=2026-11-20T12:42:19 EndTime=2026-11-20T12:43:59 Deadline=N/A NodeList=node1"
    " TRES=cpu=2,mem=2000M,node=1,billing=2,gres/gpu=4 Command=/home/me/job.sh TresPerNode=gres:gpu:4 \n"
)


def spend(run: Path, clock: Clock, job: str, begin: float, seconds: float, head: tuple[int, str] = (0, "")):
    """An attempt of two ranks: 3 s of start-up, work of 1 s a step, a save and its last word."""
    clock.now = begin
    account = Ledger.open(run, 2, "gpu", clock, started=begin)
    clock.now += 3
    account.begin(*head, job={"job_id": job} if job else {})
    for _ in range(int(seconds) - 3):
        clock.now += 1
        account.step(COST)
    saved = account.totals().steps, account.save()
    account.note("stop")
    return saved


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """12 s of the first allocation's 20, then two attempts of 40 s in the second one's 100."""
    clock = Clock()
    saved = spend(tmp_path, clock, "2", 1795178388 + 5, 12)
    saved = spend(tmp_path, clock, "2", 1795178539 + 4, 40, saved)
    spend(tmp_path, clock, "2", 1795178539 + 50, 40, saved)
    return tmp_path


def test_the_parts_add_up_to_slurms_figure(run: Path) -> None:
    given = reconcile.read_sacct(REQUEUED + PENDING + COMPLETED)
    first, second = reconcile.accounts(given, reconcile.attempts(ledger.read(run)))
    assert (first.devices, first.slurm, first.ledger) == (4, 80.0, 24.0)
    assert (first.before, first.between, first.after, first.undriven) == (20.0, 0.0, 12.0, 24.0)
    assert (second.slurm, second.ledger) == (400.0, 160.0)
    assert (second.before, second.between, second.after, second.undriven) == (16.0, 24.0, 40.0, 160.0)
    assert first.rest == second.rest == 0.0
    total = ledger.total([run]).device_seconds["total"]
    assert first.ledger + second.ledger == pytest.approx(total)


def test_a_killed_attempts_silence_is_after_its_last_line(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = 1795178539
    account = Ledger.open(tmp_path, 4, "gpu", clock, started=clock.now)
    account.begin(job={"job_id": "2"})
    clock.work(account, 10)  # heartbeats at 10 s and 20 s, then killed at 100 s
    (one,) = reconcile.accounts(reconcile.read_sacct(COMPLETED), reconcile.attempts(ledger.read(tmp_path)))
    assert (one.ledger, one.after, one.undriven) == (80.0, 320.0, 0.0)


def test_without_gpus_a_rank_is_a_device(run: Path) -> None:
    given = reconcile.read_sacct(COMPLETED.replace("gres/gpu=4,", ""))
    (one,) = reconcile.accounts(given, reconcile.attempts(ledger.read(run)))
    assert (one.devices, one.device, one.slurm, one.undriven, one.rest) == (2, "rank", 200.0, 0.0, 0.0)


def test_what_slurm_prints_is_read() -> None:
    assert reconcile.read_sacct(PENDING) == []
    (running,) = reconcile.read_sacct(RUNNING)
    assert running.end == pytest.approx(process.now(), abs=60) and running.gpus == 4
    (cancelled,) = reconcile.read_sacct(COMPLETED.replace("COMPLETED", "CANCELLED by 0"))
    assert cancelled.state == "CANCELLED"
    (done,) = reconcile.read_sacct(COMPLETION)
    assert (done.end - done.start, done.gpus, done.nodes) == (20.0, None, 2)
    (one,) = reconcile.read_scontrol(CONTROL.format("COMPLETED"))
    assert (one.job, one.state, one.end - one.start, one.gpus) == ("2", "COMPLETED", 100.0, 4)
    assert reconcile.read_scontrol(CONTROL.format("PENDING")) == []  # its times are a forecast


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("billing=2,gres/gpu:h100=4,node=1", 4),
        ("gres/gpu:h100=4,gres/gpu=4", 4),
        ("gres/gpu:a100_1g.10gb=2,gres/gpu:h100=1", 3),
        ("cpu=2,gres/gpumem=80,gres/gpuutil=100", None),
        ("gres/gpu=0", None),
    ],
)
def test_gpus_are_counted_once_by_whatever_name(tres: str, gpus: int | None) -> None:
    (one,) = reconcile.read_sacct(COMPLETED.replace("gres/gpu=4", tres))
    (same,) = reconcile.read_scontrol(CONTROL.format("COMPLETED").replace("gres/gpu=4", tres))
    assert one.gpus == same.gpus == gpus


def test_saved_words_that_are_not_sacct_s_are_named(run: Path, tmp_path: Path) -> None:
    assert reconcile.read_sacct("\nJobIDRaw|State|Start|End|AllocTRES\n" + COMPLETED + "\n")[0].gpus == 4
    saved = tmp_path / "sacct.txt"
    saved.write_bytes(COMPLETED.encode() + b"\xffslurm says no\n")
    with pytest.raises(UserError, match=r"sacct.txt:2: expected JobIDRaw\|State"):
        reconcile.reconcile([str(run)], str(saved))


PROGRAMS = {
    "sacct": "#!/bin/sh\ncase $* in *--completion*) printf '%s' \"$COMPLETION\";;"
    " *) printf '%s' \"$SACCT\";; esac\n",
    "scontrol": "#!/bin/sh\nprintf '%s' \"$CONTROL\"\n",
}


@pytest.mark.parametrize(
    ("answers", "source"),
    [
        ({"SACCT": REQUEUED + COMPLETED}, "sacct"),
        ({"COMPLETION": COMPLETION}, "sacct --completion"),
        ({"CONTROL": CONTROL.format("COMPLETED")}, "scontrol"),
        ({}, None),
    ],
)
def test_slurm_is_asked_for_what_it_keeps(
    answers: dict[str, str], source: str | None, run: Path, tmp_path: Path
) -> None:
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environ = {**os.environ, "SACCT": "", "COMPLETION": "", "CONTROL": "", **answers}
    environ |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TZ": "UTC"}
    command = [sys.executable, "-m", "tools.ledger", "reconcile", str(run), "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if source is None:
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "Slurm knows nothing of job 2" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["source"] == source and document["missing_jobs"] == []
    for job in document["jobs"]:
        assert job["slurm"] == pytest.approx(sum(job[part] for part in reconcile.PARTS[1:]))


def test_saved_words_serve_too(run: Path, tmp_path: Path) -> None:
    saved = tmp_path / "sacct.txt"
    saved.write_text(REQUEUED + COMPLETED + COMPLETED.replace("2|", "3|", 1))
    document, text = reconcile.reconcile([str(run)], str(saved))
    assert [job["job"] for job in document["jobs"]] == ["2", "2"]
    hours = "0.1333  0.0511  0.0100   0.0067  0.0144    0.0511  0.0000  0.0000"
    assert text.splitlines()[3].split()[1:] == hours.split() and text.splitlines()[3].startswith("all")


def submitted(run: Path, **stages: str) -> None:
    (run / "slurm").mkdir(parents=True)
    for stage, job in stages.items():
        journal.note(run, "submit", stage, job)


def test_jobs_that_reached_no_ledger_are_paid_for_too(run: Path, tmp_path: Path) -> None:
    """A corpus on two nodes, a start of the training that its pre-flight ended, and a report to come."""
    submitted(run, corpus="1", train="2", report="3")
    corpus = "1|COMPLETED|1795178000|1795178060|billing=8,cpu=8,node=2\n"
    early = REQUEUED.replace("1795178388", "1795178428").replace("1795178408", "1795178438")
    saved = tmp_path / "sacct.txt"
    saved.write_text(corpus + REQUEUED + early + COMPLETED)
    document, text = reconcile.reconcile([str(run)], str(saved))
    found = [(job["stage"], job["devices"], job["device"], job["unledgered"]) for job in document["jobs"]]
    assert found == [
        ("corpus", 2, "node", 120.0),
        ("train", 4, "GPU", 0.0),
        ("train", 4, "GPU", 40.0),
        ("train", 4, "GPU", 0.0),
    ]
    for job in document["jobs"]:
        assert job["slurm"] == sum(job[part] for part in reconcile.PARTS[1:]) and job["rest"] == 0
    lines = text.splitlines()
    sums = {tuple(line.split()[:-8]): [float(hours) for hours in line.split()[-8:]] for line in lines[5:7]}
    assert set(sums) == {("all", "GPUs"), ("all", "no", "GPUs")}
    assert sums["all", "no", "GPUs"] == [0.0333, 0, 0, 0, 0, 0, 0.0333, 0]
    assert sums["all", "GPUs"] == [0.1444, 0.0511, 0.01, 0.0067, 0.0144, 0.0511, 0.0111, 0]
    assert document["missing_jobs"] == ["3"] and "no record that job 3 began" in text


def test_a_run_whose_jobs_all_ended_before_its_ledger(tmp_path: Path) -> None:
    submitted(tmp_path / "run", train="2")
    saved = tmp_path / "sacct.txt"
    saved.write_text(COMPLETED)
    (one,) = reconcile.reconcile([str(tmp_path / "run")], str(saved))[0]["jobs"]
    assert one["slurm"] == one["unledgered"] == 400.0
    (tmp_path / "run" / "ledger.jsonl").touch()  # made before its first line
    (one,) = reconcile.reconcile([str(tmp_path / "run")], str(saved))[0]["jobs"]
    assert one["slurm"] == one["unledgered"] == 400.0


def test_starts_that_slurm_has_forgotten_are_told(run: Path, tmp_path: Path) -> None:
    saved = tmp_path / "sacct.txt"
    saved.write_text(COMPLETED)
    document, text = reconcile.reconcile([str(run)], str(saved))
    assert document["forgotten_by_slurm"] == 24.0 and "0.0067 device-hours more" in text


def test_a_real_job(slurm: None, tiny: Path, tmp_path: Path) -> None:
    """Without accounting: what scontrol still knows of a run of two ranks."""
    from tests.support.slurm_cluster import jobs

    folder = tmp_path / "run"
    words = [str(tiny / "tiny.yaml"), f"run.dir={folder}", "budget.steps=40", "checkpoint.every_steps=10"]
    (job,) = jobs.start([*words, "--nodes", "2"], jobs.site(tmp_path))
    assert jobs.wait(job, folder) == "COMPLETED", jobs.log(folder)
    document, text = reconcile.reconcile([str(folder)])
    assert document["source"] == "scontrol" and journal.read(folder)
    (one,) = document["jobs"]
    total = ledger.total([folder]).device_seconds["total"]
    assert (one["job"], one["state"], one["devices"]) == (job, "COMPLETED", 2)
    assert one["ledger"] == pytest.approx(total, abs=0.1) and one["undriven"] == one["between"] == 0
    assert 0 < one["before"] < one["slurm"] and abs(one["rest"]) <= 2 * 2  # seconds of start and end, cut
    assert (document["outside_of_slurm"], document["forgotten_by_slurm"], document["missing_jobs"]) == (
        0,
        0,
        [],
    )


def test_a_run_outside_of_slurm_has_nothing_to_compare(tmp_path: Path) -> None:
    spend(tmp_path, Clock(), "", 1000.0, 10)
    with pytest.raises(UserError, match="no attempt ran in a Slurm job"):
        reconcile.reconcile([str(tmp_path)])


# ---- energy and carbon ---------------------------------------------------------------------------

CARBON = emissions.CarbonFactor(41.0, "Ember, Sweden, 2023")


@pytest.fixture
def metered(tmp_path: Path) -> Path:
    """1 kWh of a GPU and a tenth of the host's in an hour; then an attempt without a sensor."""
    clock = Clock()
    account = Ledger.open(tmp_path, 1, "GPU 9000", clock, started=clock.now)
    sensors = {"gpu": "NVML counter", "cpu": "RAPL"}
    account.begin(sensors=sensors, host_share=0.1)
    account.meter({"gpu": 0.0, "cpu": 0.0})
    clock.now += 3600
    account.meter({"gpu": 3.6e6, "cpu": 3.6e5})
    head = account.save()
    account.note("stop")
    again = Ledger.open(tmp_path, 1, "GPU 9000", clock, started=clock.now)
    again.begin(0, head, sensors={})
    clock.now += 3600
    again.note("stop")
    return tmp_path


def test_energy_of_each_attempt_and_carbon_by_a_given_factor_only(metered: Path, tmp_path: Path) -> None:
    document, text = emissions.report([str(metered)], None, None)
    assert document.kwh == pytest.approx(1.1) and document.metered_share == 0.5
    assert document.kg_co2e is None and "carbon" not in text and "10% of the host" in text
    assert [one.kwh for one in document.attempts] == [{"gpu": 1.0, "cpu": pytest.approx(0.1)}, {}]
    document, text = emissions.report([str(metered)], CARBON, None)
    assert document.kg_co2e == pytest.approx(1.1 * 0.041)
    assert "41 g/kWh (Ember, Sweden, 2023)" in text
    with pytest.raises(UserError, match="/proc: cannot be written"):
        emissions.report([str(metered)], None, "/proc/x.csv")


def test_the_table_has_codecarbons_columns(metered: Path, tmp_path: Path) -> None:
    emissions.report([str(metered)], CARBON, str(tmp_path / "emissions.csv"))
    with open(tmp_path / "emissions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and tuple(rows[0]) == emissions.COLUMNS
    one = {name: float(rows[0][name]) for name in ("duration", "energy_consumed", "gpu_power", "cpu_power")}
    assert one == {"duration": 3600, "energy_consumed": 1.1, "gpu_power": 1000, "cpu_power": 100}
    assert rows[0]["gpu_model"] == "GPU 9000"
    assert float(rows[0]["emissions"]) == pytest.approx(1.1 * 0.041)
    assert rows[1]["energy_consumed"] == rows[1]["emissions"] == ""  # absent, not 0
    # Nobody asked, and this machine is not that of the run.
    unknown = ("on_cloud", "pue", "wue", "os", "python_version", "codecarbon_version", "ram_total_size")
    assert {rows[0][name] for name in unknown} == {""}


def test_the_table_tells_of_the_software_of_each_attempt(metered: Path, tmp_path: Path) -> None:
    """The start between the two failed before its first line; the first was made by an older version."""
    told = [
        {"time": 1000.0, "python": "3.10.1", "version": "0.0.9"},
        {"time": 4300.0, "python": "3.11.1", "os": "Plan 9", "version": "0.1.0"},
        {"time": 4600.0, "python": "3.12.1", "os": "Linux-6", "version": "0.1.0"},
    ]
    (metered / "provenance.json").write_text(json.dumps(told))
    emissions.report([str(metered)], None, str(tmp_path / "emissions.csv"))
    with open(tmp_path / "emissions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["os"], row["python_version"], row["codecarbon_version"]) for row in rows]
    assert found == [("", "3.10.1", "LateMask 0.0.9"), ("Linux-6", "3.12.1", "LateMask 0.1.0")]


@pytest.mark.parametrize(
    ("grams", "source", "problem"),
    [
        ("DEU", "Ember", "--carbon DEU: not a number"),
        ("-1", "Ember", "--carbon -1: not a number"),
        ("nan", "Ember", "--carbon nan: not a number"),
        ("354", " ", "--carbon 354: say where it is from"),
    ],
)
def test_what_is_no_factor_is_refused(grams: str, source: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        emissions.carbon_factor(grams, source)


def test_options_of_other_actions_are_refused(metered: Path) -> None:
    command = [sys.executable, "-m", "tools.ledger", "total", str(metered), "--carbon", "354", "Ember"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--carbon belongs to `energy`" in done.stderr
