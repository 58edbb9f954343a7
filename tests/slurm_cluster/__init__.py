"""A real Slurm on one machine for the tests: ``python -m tests.slurm_cluster up`` and ``down``."""
