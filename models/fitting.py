"""The rows that a method is fitted on before it is stepped."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.distributed import gather_divided, own_rows
from models.method import RowSource


@torch.no_grad()
def fitting_rows(rows: RowSource, most: int, extract: Callable[[Tensor], Tensor], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Vectors and labels of a domain's rows, the same on every rank: each rank's first shuffled rows, ``most`` of all ranks together.

    Args:
        extract: (batch, ...) as stored -> vectors (batch, width).
        device: where ``extract`` runs.

    Returns:
        (n, width) on ``device``, and (n,) int64, or None if the rows have no labels.
    """
    total = min(rows.total, most)
    first, stop = own_rows(total)
    vectors, labels, count = list[Tensor](), list[Tensor](), 0
    for part in rows.rows():
        vectors.append(extract(part.x.to(device))[: stop - first - count])
        labels += [] if part.label is None else [part.label[: stop - first - count].to(device)]
        count += len(vectors[-1])
        if count >= stop - first:
            break
    return gather_divided(torch.cat(vectors), total), gather_divided(torch.cat(labels), total) if labels else None
