"""Programs over the pretrain package; run each as ``python -m tools.NAME``."""
