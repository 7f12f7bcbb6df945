"""Optimal transport with given marginals by Sinkhorn and Knopp's iteration (1967; Cuturi, NIPS 2013)."""

from torch import Tensor

from models.distributed import sum_over_ranks


def transport(weights: Tensor, shares: Tensor, rounds: int, divided: bool = False) -> Tensor:
    """Scale rows and columns in turn until the columns have given shares of the whole; at the end each row sums to 1.

    Args:
        weights: (n, columns), positive: exp(similarity / epsilon) for a transport with entropy epsilon. Only ratios within a row matter.
        shares: (columns,), which sum to 1.
        rounds: of the iteration.
        divided: whether the rows are divided among the ranks.
    """
    scaled = weights / weights.sum(1, keepdim=True)
    for _ in range(rounds):
        columns = scaled.sum(0)
        columns = sum_over_ranks(columns) if divided else columns
        scaled = scaled * (shares / columns.clamp(min=1e-12))
        scaled = scaled / scaled.sum(1, keepdim=True).clamp(min=1e-12)
    return scaled
