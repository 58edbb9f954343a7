"""Every launcher on a real Slurm, as in the table of slurm/README.md: the same run, the same losses.

Each line is what stands in a batch script on two nodes with a task each, or on one node. Those marked slow
are special cases of others, or run without Slurm in test_launch.py.
"""

import json
import shlex
import sys
from pathlib import Path

import pytest

from pretrain.monitor import read_metrics
from tests.support.runs import finish
from tests.support.slurm_cluster import jobs
from tests.support.slurm_cluster.cluster import run as command

pytestmark = pytest.mark.usefixtures("slurm")

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FIRST = "$(scontrol show hostnames | head -n 1)"
OPEN_MPI = "MPI4PY_MPIABI=openmpi -x MPI4PY_LIBMPI=libmpi.so.40"  # mpi4py's wheel takes the other MPI else
# name: (nodes, what starts the ranks, launcher as the run notes it)
LAUNCHERS = {
    "srun": (2, "srun python -m pretrain", "srun"),
    "torchrun": (1, "torchrun --nproc_per_node=2 --master_port=$PORT -m pretrain", "torchrun"),
    "torchrun, two nodes": (
        2,
        "srun torchrun --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=$SLURM_JOB_ID"
        f" --rdzv_endpoint={FIRST}:$PORT -m pretrain",
        "torchrun",
    ),
    "deepspeed": (1, "deepspeed --num_gpus=2 --master_port=$PORT --module pretrain", "deepspeed"),
    "deepspeed, hostfile": (
        1,
        "deepspeed --hostfile=$ONE --no_ssh_check --master_addr=127.0.0.1 --master_port=$PORT"
        " --module pretrain",
        "deepspeed",
    ),
    "deepspeed, two nodes": (
        2,
        "srun bash -c 'deepspeed --hostfile=$TWO --no_ssh --node_rank=$SLURM_NODEID --master_addr=lm1"
        ' --master_port=$PORT --module pretrain "$@"\' -',
        "deepspeed",
    ),
    "deepspeed --launcher slurm": (
        2,
        "deepspeed --hostfile=$TWO --no_ssh_check --master_addr=lm1 --master_port=$PORT --launcher=slurm"
        " --launcher_args=--ntasks-per-node=1 --module pretrain",
        "srun",
    ),
    "deepspeed --launcher openmpi": (
        2,
        "PATH=/usr/bin:$PATH deepspeed --hostfile=$TWO --no_ssh_check --master_addr=lm1 --master_port=$PORT"
        " --launcher=openmpi --launcher_args='--mca btl_tcp_if_include 198.18.78.0/24 -x PATH"
        f" -x PYTHONPATH -x {OPEN_MPI}' --module pretrain",
        "mpirun",
    ),
    "mpirun of MPICH": (2, "mpirun -n 2 python -m pretrain", "mpirun"),
    "mpirun of Open MPI": (2, f"/usr/bin/mpirun -n 2 -x PATH -x {OPEN_MPI} python -m pretrain", "mpirun"),
}
SLOW = ("srun", "torchrun", "deepspeed", "deepspeed, hostfile", "deepspeed --launcher openmpi")


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What one plain process logs."""
    run = tmp_path_factory.mktemp("alone")
    finish([str(tiny / "tiny.yaml"), f"run.dir={run}"])
    return read_metrics(run)


def script(folder: Path, start: str, words: list[str]) -> str:
    """The body of a batch script."""
    (folder / "one").write_text("localhost slots=2\n")
    (folder / "two").write_text("lm1 slots=1\nlm2 slots=1\n")
    variables = {
        "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "ONE": str(folder / "one"),
        "TWO": str(folder / "two"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
    port = "export PORT=$((20000 + SLURM_JOB_ID % 10000))"
    return f"{exports}\n{port}\n{start} {shlex.join(words)}\n"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAUNCHERS]
)
def test_the_same_losses(name: str, tiny: Path, tmp_path: Path, expected: list[dict[str, float]]) -> None:
    nodes, start, launcher = LAUNCHERS[name]
    run, log = tmp_path / "run", tmp_path / "log"
    words = [str(tiny / "tiny.yaml"), f"run.dir={run}", "train.engine=deepspeed", "parallel.zero=1"]
    options = [
        f"--nodes={nodes}",
        "--nodelist=lm1,lm2" if nodes == 2 else "--nodelist=lm1",
        f"--output={log}",
    ]
    options += ["--ntasks-per-node=1", "--time=15", "--wrap", script(tmp_path, start, words)]
    job = command("sbatch", "--parsable", *options).strip()
    jobs.until(lambda: jobs.state(job) not in jobs.LIVE, f"job {job}")
    assert jobs.state(job) == "COMPLETED", log.read_text()
    last = json.loads((run / "provenance.json").read_text())[-1]
    assert (last["launcher"], last["ranks"]) == (launcher, 2)
    for mine, theirs in zip(read_metrics(run), expected, strict=True):
        for key in {"loss", "held_out_loss"} & theirs.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (key, mine["step"])
    print(f"{name}: {read_metrics(run)[-1]['held_out_loss']}")


def test_the_readme_has_this_table() -> None:
    text = (ROOT / "slurm" / "README.md").read_text("utf-8")
    for name in ("python", *LAUNCHERS):
        assert f"| {name} |" in text, name
