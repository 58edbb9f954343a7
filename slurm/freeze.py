"""Code, packages and cluster.env as they are at submission; a job reads nothing else of ours."""

import importlib.metadata
import platform
import shlex
import shutil
import sys
from pathlib import Path

from pretrain.errors import UserError
from pretrain.files import write_atomic
from pretrain.provenance import code_revision
from slurm.cluster import Cluster
from slurm.sizing import Shape

ROOT = Path(__file__).parent.parent
REVISION = "REVISION"
"""The first file of the frozen code: without it the folder is not ours."""


def refuse_foreign(folder: Path) -> None:
    """Raise UserError where the folder was not made by a submission, which would replace its code."""
    if not (folder / "code" / REVISION).is_file() and any(path.is_file() for path in folder.rglob("*")):
        raise UserError(f"{folder}: exists and is of no submission; move it away, or choose another")


def freeze(folder: Path, site: Cluster, form: Shape) -> None:
    """Keep code, packages and cluster.env as they are now; a job reads nothing else of ours."""
    shutil.rmtree(folder / "code", ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "sample", "results")
    (folder / "code").mkdir(parents=True)
    write_atomic(folder / "code" / REVISION, f"{code_revision() or 'unknown'}\n")
    for package in ("pretrain", "tools", "slurm"):
        shutil.copytree(ROOT / package, folder / "code" / package, ignore=skip)
    own = {"PYTHON": site.python or sys.executable, "GPUS_PER_NODE": str(form.gpus)}
    lines = [f"{name}={shlex.quote(value)}" for name, value in own.items()]
    write_atomic(
        folder / "cluster.env", site.text + "\n# ---- of this submission\n" + "\n".join(lines) + "\n"
    )
    packages = {f"{one.name}=={one.version}" for one in importlib.metadata.distributions()}
    python = f"# Python {platform.python_version()} on {platform.platform()}"
    write_atomic(folder / "requirements.txt", "\n".join([python, *sorted(packages)]) + "\n")
