"""Faults that are injected into real runs: ``python -m tests.faults --count N --seed S``."""
