"""The processes that mpirun or srun started, and what they do together."""

import os
import sys
from collections.abc import Callable
from typing import Any

from pretrain.errors import UserError


class Ranks:
    """The processes that mpirun or srun started, or this one alone."""

    def __init__(self) -> None:
        names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        self.rank, self.size, self._world = 0, 1, None
        if tasks == 1 and not any(name in os.environ for name in names):
            return
        if tasks > 1:
            # MPICH over UCX publishes 4,096 bytes of a shorter address, the rest being what the heap held;
            # unless that is mostly zeros, it is too long for a line of Slurm's PMI (1,024), and all ranks
            # hang (github.com/pmodels/mpich/issues/6924). What is sent is short: any network will do.
            os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size
        if tasks > 1 and self.size == 1:
            raise UserError(
                f"srun started {tasks} tasks that do not see each other; use srun --mpi=pmi2 (or pmix)"
            )

    def raise_on_all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """Return every rank's result of `action`; its UserError, of the lowest rank that has one, everywhere.

        Only rank 0 has the words of it: all would print the same line. The others leave no sooner, for
        MPI_Finalize, when Python ends, waits for all.
        """
        result, message = None, None
        try:
            result = action()
        except UserError as error:
            message = str(error)
        except BaseException as error:
            if self._world and not _is_help(error):  # the others would wait for ever
                sys.excepthook(type(error), error, error.__traceback__)
                self._world.Abort(1)
            raise
        mine = (result, message)
        everyone = self._world.allgather(mine) if self._world else [mine]
        for _, problem in everyone:
            if problem is not None:
                raise UserError(problem if self.rank == 0 else "")
        return [answer for answer, _ in everyone]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result of `action`, on all ranks."""
        return self.raise_on_all_ranks(action if self.rank == 0 else lambda: None)[0]


def _is_help(error: BaseException) -> bool:
    """Whether this is the end after --help or --version, which every rank comes to."""
    return isinstance(error, SystemExit) and not error.code
