"""Code, packages and cluster.env as they are at submission; a job reads nothing else of ours."""

import importlib.metadata
import platform
import shlex
import shutil
import sys
from pathlib import Path

from pretrain.files import write_atomic
from pretrain.provenance import code_revision
from slurm.cluster import Cluster
from slurm.sizing import Shape

ROOT = Path(__file__).parent.parent


def freeze(folder: Path, site: Cluster, form: Shape) -> None:
    """Code, packages and cluster.env as they are now; a job reads nothing else of ours."""
    shutil.rmtree(folder / "code", ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "sample", "results")
    for package in ("pretrain", "tools", "slurm"):
        shutil.copytree(ROOT / package, folder / "code" / package, ignore=skip)
    write_atomic(folder / "code" / "REVISION", f"{code_revision() or 'unknown'}\n")
    own = {"PYTHON": site.python or sys.executable, "GPUS_PER_NODE": str(form.gpus)}
    lines = [f"{name}={shlex.quote(value)}" for name, value in own.items()]
    write_atomic(
        folder / "cluster.env", site.text + "\n# ---- of this submission\n" + "\n".join(lines) + "\n"
    )
    packages = {f"{one.name}=={one.version}" for one in importlib.metadata.distributions()}
    python = f"# Python {platform.python_version()} on {platform.platform()}"
    write_atomic(folder / "requirements.txt", "\n".join([python, *sorted(packages)]) + "\n")
