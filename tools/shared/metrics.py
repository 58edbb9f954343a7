"""How predictions are scored: scikit-learn's and SciPy's figures under one name each."""

from collections.abc import Sequence

import numpy as np

from pretrain.errors import UserError


def scored(metric: str, targets: Sequence[float], predictions: Sequence[float]) -> float:
    """Return a metric (accuracy, f1 of class 1, matthews, pearson, spearman) of predictions, one a target.

    What is undefined, as the correlation with a constant, is 0.
    """
    try:
        from scipy import stats
        from sklearn import metrics
    except ImportError as error:
        raise UserError(f"{error.name}: not installed; pip install '.[finetune]'") from None
    t, p = np.asarray(targets, dtype=float), np.asarray(predictions, dtype=float)
    if metric in ("pearson", "spearman"):
        if len(t) < 2 or np.ptp(t) == 0 or np.ptp(p) == 0 or not np.isfinite(p).all():
            return 0.0
        return float((stats.pearsonr if metric == "pearson" else stats.spearmanr)(t, p).statistic)
    if metric == "f1":
        return float(metrics.f1_score(t == 1, p == 1, zero_division=0))
    if metric == "matthews":
        return float(metrics.matthews_corrcoef(t, p)) if np.ptp(t) and np.ptp(p) else 0.0
    return float(metrics.accuracy_score(t, p))
