"""``python -m tests.support.slurm_cluster up|down``: the tests' cluster by hand."""

import argparse

from tests.support.slurm_cluster import cluster

parser = argparse.ArgumentParser(prog="python -m tests.support.slurm_cluster", description=cluster.__doc__)
parser.add_argument("action", choices=("up", "down"))
if parser.parse_args().action == "up":
    cluster.keep()
    print(f"export SLURM_CONF={cluster.CONF}")
else:
    cluster.down()
