"""Means over seeds, and how far to trust them."""

from typing import Any

import numpy as np


def standard_error(values: Any) -> float:
    """The standard error of the mean of float[seeds]; NaN for one seed, whose mean has none."""
    values = np.asarray(values)
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def with_error(values: Any, form: str) -> str:
    """`mean ± standard error` of float[seeds]; the mean alone for one seed.

    Arguments:
        form: how both are written, such as `.1%`; a sign that it asks for is the mean's.
    """
    return shown(float(np.mean(values)), standard_error(values), form)


def shown(mean: float, error: float, form: str) -> str:
    """The same of a mean and its error; the mean alone where that is NaN."""
    return f"{mean:{form}}" if np.isnan(error) else f"{mean:{form}} ± {error:{form.lstrip('+')}}"
