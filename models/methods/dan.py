"""DAN, deep adaptation networks (Long et al., ICML 2015): MK-MMD of the fully connected layers, with our hash head.

The paper has the linear-time estimate of MMD and learns the kernels' weights; here the estimate is quadratic and the kernels weigh the same, as in our DAH.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.hyperparameters import Preset, hyperparameter
from models.losses.mmd import quadratic_mmd
from models.methods.adaptation import PLAIN, Adaptation, AdaptationConfig, Both


@dataclass(frozen=True)
class DANConfig(AdaptationConfig):
    """Hyper-parameters of DAN."""

    ramp: float = hyperparameter(0.0, "gamma: lambda grows from zero as 2 / (1 + exp(-gamma p)) - 1; 0 for all of it from the start")


class DAN(Adaptation):
    """The layers' activations, the codes and the classifier's outputs have the same distribution in both domains."""

    name: ClassVar[str] = "dan"
    reference: ClassVar[str] = "Long et al., Learning Transferable Features with Deep Adaptation Networks, ICML 2015"
    Config: ClassVar[Any] = DANConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("its loss alone beside our hash head", 0, PLAIN)}

    def adapted(self, both: Both) -> dict[str, Tensor]:
        """Term ``mmd``."""
        compared = [(torch.relu(s), torch.relu(t)) for s, t in both.layers[:-1]] + [both.u, both.logits]
        return {"mmd": torch.stack([quadratic_mmd(s, t) for s, t in compared]).sum()}

    def weights(self, player: str) -> dict[str, float]:
        return super().weights(player) | {"mmd": self.strength}
