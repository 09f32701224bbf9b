"""How well predicted classes and predicted numbers agree with the true ones, by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lory.runtime import UsageError

INSTALL = "pip install 'lory-llm[eval]'"


def classification_scores(
    predictions: Sequence[Hashable], labels: Sequence[Hashable], positive: Hashable | None = None
) -> dict[str, float]:
    """Scores of predicted classes, which may be anything that compares and hashes (names, numbers).

    Args:
        predictions: the predicted classes; one that is in no label, such as an answer that names no class, is wrong.
        positive: the class that ``f1`` is about; None: ``f1`` is left out.

    Returns:
        ``accuracy``; ``f1_macro``, the mean of F1 over the classes of labels and predictions; ``mcc``, Matthews'
        correlation coefficient in [-1, 1], 0.0 where one side has one class only; and ``f1`` of `positive`, 0.0 where
        it is never predicted rightly.

    Raises:
        UsageError: nothing was given, not as many predictions as labels, or scikit-learn is missing.
    """
    _check(predictions, labels)
    try:
        from sklearn import metrics
    except ImportError as error:
        raise UsageError(f"Class scores need scikit-learn, which is not installed; to install it: {INSTALL}") from error
    # as numbers, since scikit-learn wants one type of class; the order of the classes is no matter for the scores
    numbers = {name: number for number, name in enumerate(dict.fromkeys([*labels, *predictions]))}
    found, true = [numbers[name] for name in predictions], [numbers[name] for name in labels]
    scores = {
        "accuracy": float(metrics.accuracy_score(true, found)),
        "f1_macro": float(metrics.f1_score(true, found, average="macro", zero_division=0.0)),
        "mcc": float(metrics.matthews_corrcoef(true, found)) if len(numbers) > 1 else 0.0,
    }
    if positive is None:
        return scores
    one = [numbers.get(positive, len(numbers))]
    return scores | {"f1": float(metrics.f1_score(true, found, labels=one, average="macro", zero_division=0.0))}


def correlation_scores(predictions: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Scores of predicted numbers.

    Returns:
        ``pearson`` and ``spearman``, correlation coefficients in [-1, 1], 0.0 where one side is constant and none is
        defined; ``rmse``, the root of the mean squared error, in the values' unit.

    Raises:
        UsageError: fewer than two were given, not as many predictions as values, or SciPy is missing.
    """
    _check(predictions, values)
    if len(values) < 2:
        raise UsageError("One prediction was given; a correlation needs two or more.")
    try:
        from scipy import stats
    except ImportError as error:
        raise UsageError(f"Correlations need SciPy, which is not installed; to install it: {INSTALL}") from error
    constant = len(set(predictions)) == 1 or len(set(values)) == 1
    squares = [(found - true) ** 2 for found, true in zip(predictions, values, strict=True)]
    return {
        "pearson": 0.0 if constant else float(stats.pearsonr(predictions, values).statistic),
        "spearman": 0.0 if constant else float(stats.spearmanr(predictions, values).statistic),
        "rmse": (sum(squares) / len(squares)) ** 0.5,
    }


def _check(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> None:
    if not predictions or len(predictions) != len(labels):
        raise UsageError(f"{len(predictions)} predictions and {len(labels)} labels were given; give one for each.")
