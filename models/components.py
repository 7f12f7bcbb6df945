"""Principal components, the same on any number of threads."""

from typing import Any

import numpy as np


def fit_components(x: np.ndarray, count: int) -> Any:
    """scikit-learn's PCA, whose components have a fixed sign.

    Args:
        x: (n, features).
        count: of components; fewer if there are fewer rows or features.
    """
    from sklearn.decomposition import PCA  # noqa: PLC0415  slow to import

    n, features = x.shape
    return PCA(min(count, n, features), svd_solver="full" if n < features or min(x.shape) < 500 else "covariance_eigh").fit(x)
