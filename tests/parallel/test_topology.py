"""Who am I, from what real launchers set, and the groups that follow."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.errors import UserError
from pretrain.parallel import topology
from pretrain.parallel.launchers import Identity, first_host, identify
from tests.support import ranks
from tests.support.ranks import PATIENCE, free_port

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# What srun sets for the last of four tasks on two nodes, and its batch shell (Slurm 22.05).
BATCH = {
    "SLURM_JOB_ID": "20002",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NODELIST": "node[1-2]",
}
SRUN = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[1-2]",
}
PMI2 = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "20002.1"}
# mpirun in a job: its daemons are tasks of a step of their own, one on each node.
DAEMON = {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
ADDRESS = {"MASTER_ADDR": "n7", "MASTER_PORT": "1234"}
SRUN_PORT = 10000 + (20002 + 997) % 20000


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Identity("python", 0, 1, 0)),
        (TORCH, Identity("RANK", 3, 8, 1, "n1", 29500)),
        ({**TORCH, "LOCAL_SIZE": "2"}, Identity("deepspeed", 3, 8, 1, "n1", 29500)),
        ({**TORCH, "TORCHELASTIC_RUN_ID": "x"}, Identity("torchrun", 3, 8, 1, "n1", 29500)),
        # One torchrun a node, started by srun: torchrun knows better.
        ({**DAEMON, **TORCH}, Identity("RANK", 3, 8, 1, "n1", 29500)),
        (OPEN_MPI, Identity("mpirun", 3, 4, 1)),
        (MPICH, Identity("mpirun", 3, 4, 1)),
        ({**DAEMON, **OPEN_MPI}, Identity("mpirun", 3, 4, 1)),
        ({**DAEMON, **MPICH}, Identity("mpirun", 3, 4, 1)),
        ({**OPEN_MPI, **ADDRESS}, Identity("mpirun", 3, 4, 1, "n7", 1234)),
        (SRUN, Identity("srun", 3, 4, 1, "node1", SRUN_PORT)),
        ({**SRUN, **PMI2}, Identity("srun", 3, 4, 1, "node1", SRUN_PORT)),
        ({**SRUN, **ADDRESS, "WORLD_SIZE": "4"}, Identity("srun", 3, 4, 1, "n7", 1234)),
    ],
)
def test_identity(environ: dict[str, str], expected: Identity) -> None:
    assert identify(environ) == expected


def test_steps_of_a_job_have_different_ports() -> None:
    assert identify(SRUN).port != identify({**SRUN, "SLURM_STEP_ID": "2"}).port


def test_a_batch_shell_is_one_process_and_is_told() -> None:
    with pytest.warns(UserWarning, match="one process in an allocation of 4 tasks"):
        assert identify(BATCH) == Identity("python", 0, 1, 0)


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        *((without(TORCH, name), f"not {name}") for name in list(TORCH)[1:]),
        (without(TORCH, "RANK"), "WORLD_SIZE=8, but python says 1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2, but python says 0"),
        ({**TORCH, "RANK": "8"}, "rank 8 .* of 8 cannot be"),
        ({**TORCH, "WORLD_SIZE": "0"}, "of 0 cannot be"),
        ({**TORCH, "RANK": "first"}, "RANK='first' is not a number"),
        ({**TORCH, "RANK": "-1"}, "RANK='-1' is not a number"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE=8, but srun says 4"),
        ({**SRUN, "MASTER_ADDR": "n1"}, "only MASTER_ADDR is set"),
        (without(SRUN, "SLURM_PROCID"), "SLURM_PROCID is missing"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is missing"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is missing"),
    ],
)
def test_half_set_or_contradictory_variables_are_errors(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        identify(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),  # as `scontrol show hostnames` expands them
    [
        ("node1", "node1"),
        ("gpu[03-05,9],n1", "gpu03"),
        ("n1,gpu[1-2]", "n1"),
        ("rack[0-1]n[3-4]", "rack0n3"),
        ("n[9,11-12],m2", "n9"),
        ("c[001]", "c001"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


# ---- connecting ----------------------------------------------------------------------------------


def run(code: str, *before: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository; `before` is a launcher's command line."""
    root = Path(__file__).parents[2]
    command = [*before, sys.executable, "-c", code]
    inherited = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=root, env={**inherited, **environ}, capture_output=True, text=True, timeout=PATIENCE
    )


def test_one_process_needs_torch_alone() -> None:
    code = """if True:
        import sys
        import torch.distributed
        from pretrain.parallel import engine, tensor_parallel, topology
        place = topology.connect()
        assert place == topology.Topology(device=place.device) and place.is_main
        assert place.agree([3]) == [3]
        assert place.broadcast_text("a") == "a" and place.mpu() is None
        assert not torch.distributed.is_initialized()
        assert not {"megatron", "deepspeed", "mpi4py"} & {name.split(".")[0] for name in sys.modules}
        place.close()
    """
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_ranks_that_do_not_come_are_an_error_not_a_hang() -> None:
    code = """if True:
        import datetime
        from pretrain.parallel import topology
        topology.RENDEZVOUS = datetime.timedelta(seconds=10)
        try:
            topology.connect()
        except topology.UserError as error:
            print(error)
    """
    lonely = {**TORCH, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = run(code, **{**lonely, "MASTER_PORT": str(free_port())})
    assert done.stdout.startswith("rank 0 of 8 (by RANK) did not meet the others"), done.stderr
    assert "1/8 clients joined" in done.stdout


def test_under_mpirun() -> None:
    mpirun = Path(sys.executable).parent / "mpirun"
    code = """if True:
        from pretrain.parallel import topology
        place = topology.connect()
        words = place.launcher, place.world_size, place.agree([place.rank]), place.local_rank
        print(*words, sep=" ", end="\\n", flush=True)
        place.close()
    """
    done = run(code, str(mpirun), "-n", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["mpirun 2 [1] 0", "mpirun 2 [1] 1"]


def test_local_rank_of_a_launcher_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCH:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="--local_rank=1, but python says 0"):
        topology.connect(local_rank=1)
    with pytest.raises(UserError, match="parallel.tensor = 2 does not divide the 1 ranks"):
        topology.connect(tensor=2)


def members(group: Any) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def on_three_ranks() -> tuple[Any, ...]:
    with pytest.raises(UserError, match="does not divide the 3 ranks"):
        topology.connect(tensor=2)
    place = topology.connect()
    summed = place.sum_over_data(torch.tensor([1.0, place.rank])).tolist()
    found = (
        place.agree([place.rank, -place.rank, 2**53 + place.rank]),
        place.broadcast_text("" if place.rank else "Zo\u00eb"),
        place.broadcast_text("long" if place.rank else ""),
        place.first_text("" if place.rank == 0 else f"rank {place.rank}"),
        place.first_text(""),
        summed,
        place.sum_over_tensor(torch.ones(1)).item(),
        members(place.data_group),
        members(place.tensor_group),
        place.mpu(),
        "megatron" in sys.modules,
    )
    place.barrier()
    place.close()
    return found


def test_decisions_and_sums_on_three_ranks() -> None:
    expected = (
        [2, 0, 2**53 + 2],
        "Zo\u00eb",
        "",
        "rank 1",
        "",
        [3.0, 3.0],
        1.0,
        [0, 1, 2],
        None,
        None,
        False,
    )
    assert ranks.run(3, on_three_ranks) == [expected] * 3


def on_four_ranks() -> tuple[Any, ...]:
    place = topology.connect(tensor=2)
    unit = place.mpu()
    assert unit is not None
    # What DeepSpeed asks for, over all stages.
    assert unit.get_model_parallel_rank() == unit.get_tensor_model_parallel_rank() == place.tensor_rank
    assert unit.get_model_parallel_world_size() == unit.get_tensor_model_parallel_world_size() == 2
    assert members(unit.get_model_parallel_group()) == members(place.tensor_group)
    assert unit.get_data_parallel_group() is place.data_group
    assert unit.get_data_parallel_world_size() == place.data_size == 2
    number = place.sum_over_tensor(torch.tensor([10.0**place.rank])).item()
    other = place.sum_over_data(torch.tensor([10.0**place.rank])).item()
    ranks_of = members(place.tensor_group), members(place.data_group)
    place.close()
    return place.tensor_rank, place.data_rank, *ranks_of, number, other


def test_neighbours_share_a_model() -> None:
    assert ranks.run(4, on_four_ranks) == [
        (0, 0, [0, 1], [0, 2], 11.0, 101.0),
        (1, 0, [0, 1], [1, 3], 11.0, 1010.0),
        (0, 1, [2, 3], [0, 2], 1100.0, 101.0),
        (1, 1, [2, 3], [1, 3], 1100.0, 1010.0),
    ]


def test_the_device_has_a_name() -> None:
    assert topology.device_name(torch.device("cpu")).strip()


# ---- the helper itself ---------------------------------------------------------------------------


def fails_on_rank_one() -> int:
    place = topology.connect()
    if place.rank == 1:
        raise RuntimeError("of purpose")
    return place.rank


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 1 failed:(?s:.*)of purpose"):
        ranks.run(2, fails_on_rank_one)


def sleeps() -> None:
    time.sleep(PATIENCE)


def test_silence_ends() -> None:
    before = multiprocessing.active_children()
    with pytest.raises(TimeoutError, match=r"no word from ranks \[0, 1\]"):
        ranks.run(2, sleeps, seconds=1)
    assert set(multiprocessing.active_children()) <= set(before)
