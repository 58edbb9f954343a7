"""From one command to a queue that finishes by itself: ``python -m slurm.submit CONFIG``."""
