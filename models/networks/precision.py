"""Networks whose heavy part can compute in a reduced precision, or be compiled.

Only the heavy part does: its output is float32, and so are codes, losses, gathers and the moments of batch-norm.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Result = TypeVar("Result")
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}


class HeavyModule(nn.Module):
    """A module with a method that ``reducible`` decorates.

    Attributes:
        precision: type that its heavy part computes in under autocast; None for that of its input.
    """

    precision: torch.dtype | None = None


def reducible(method: Callable[..., Result]) -> Callable[..., Result]:
    """Run a method of a ``HeavyModule``, whose first argument is a tensor, in the module's precision; its output is float32."""

    @wraps(method)
    def run(self: HeavyModule, x: Tensor, *rest: Any) -> Result:
        if self.precision is None:
            return method(self, x, *rest)
        with torch.autocast(x.device.type, self.precision):
            made = method(self, x, *rest)
        return tree_map_only(Tensor, Tensor.float, made)  # type: ignore[no-any-return]

    return run


def set_precision(networks: nn.Module, name: str) -> None:
    """Let all heavy parts of networks compute in one of ``PRECISIONS``."""
    for module in networks.modules():
        if isinstance(module, HeavyModule):
            module.precision = PRECISIONS[name]


def compile_heavy(networks: nn.Module) -> None:
    """Compile all heavy parts of networks where they are; each is compiled when it is first called."""
    for module in networks.modules():
        if isinstance(module, HeavyModule):
            module.compile(dynamic=False)
