"""LateMask: pre-train RoBERTa-class encoders for less compute, and say exactly what it cost."""

__version__ = "0.2.0"
