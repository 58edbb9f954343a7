"""A real Slurm on one machine for the tests: ``python -m tests.support.slurm_cluster up`` and ``down``."""
