"""BA and BDNN: autoencoders whose codes are binary while they are learned, by turns between the networks and the codes. Fitted on all rows at once.

Symbols: x feature vector, z or b its binary code, h(x) the encoder's output, f the linear decoder, L bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.codes import signs
from models.hyperparameters import hyperparameter
from models.itq import fit_itq
from models.methods.classic import Classic, ClassicConfig

SWEEPS = 5  # over the bits, in a step that changes codes


def minimise(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int) -> None:
    """Minimise a function of leaf tensors by L-BFGS on all data at once."""
    search = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(objective)  # type: ignore[no-untyped-call]


def linear_decoder(codes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares weights (L, features) and bias (features,) that make vectors (n, features) of codes (n, L)."""
    mean, centre = x.mean(0), codes.mean(0)
    around = codes - centre
    weights = torch.linalg.solve(around.T @ around + 1e-3 * len(x) * torch.eye(codes.shape[1]), around.T @ (x - mean))
    return weights, mean - centre @ weights


def best_codes(x: Tensor, codes: Tensor, weights: Tensor, bias: Tensor, wanted: Tensor, weight: float, values: tuple[float, float]) -> Tensor:
    """Codes of low error ``||x - f(z)||^2 + weight ||z - wanted||^2``, bit by bit with the others kept, from given ones.

    Args:
        x: (n, features).
        codes: (n, L), where it begins.
        weights, bias: of f, (L, features) and (features,).
        wanted: (n, L), h(x).
        values: the lower and the higher value of a bit.
    """
    low, high = values
    gram, fitting, codes = weights @ weights.T, (x - bias) @ weights.T, codes.clone()
    for _ in range(SWEEPS):
        before = codes.clone()
        for bit in range(codes.shape[1]):
            rest = fitting[:, bit] - codes @ gram[:, bit] + codes[:, bit] * gram[bit, bit]
            rise = (high**2 - low**2) * (gram[bit, bit] + weight) - 2 * (high - low) * (rest + weight * wanted[:, bit])  # error at high minus at low
            codes[:, bit] = torch.where(rise < 0, high, low)
        if codes.equal(before):
            break
    return codes


@dataclass(frozen=True)
class BAConfig(ClassicConfig):
    """Settings of BA."""

    rounds: int = hyperparameter(10, "turns; the penalty mu doubles at each")
    penalty: float = hyperparameter(0.005, "first mu, relative to the mean squared norm of the decoder's weights", 1e-4, 0.1, log=True)
    margin: float = hyperparameter(1e-3, "weight of the SVMs' squared norm", 1e-5, 1e-1, log=True)


class BA(Classic):
    """Binary autoencoder by auxiliary coordinates: turns between an SVM for each bit, a linear decoder, and the codes.

    The SVMs have the squared hinge and are solved together; the first codes are ITQ's.
    """

    name: ClassVar[str] = "ba"
    reference: ClassVar[str] = "Carreira-Perpinan and Raziperchikolaei, Hashing with Binary Autoencoders, CVPR 2015"
    Config: ClassVar[Any] = BAConfig
    config: BAConfig

    def build(self, features: int, bits: int) -> nn.Module:
        return nn.Linear(features, bits).requires_grad_(False)

    def fit(self, x: Tensor) -> None:
        c = self.config
        z = (fit_itq(x, self.bits, self.draw().initial_seed())(x) > 0).to(x)
        weight, bias = torch.zeros(self.bits, x.shape[1], requires_grad=True), torch.zeros(self.bits, requires_grad=True)
        for turn in range(c.rounds):

            def loss(wanted: Tensor = 2 * z - 1) -> Tensor:
                hinge = (1 - wanted * (x @ weight.T + bias)).clamp(min=0)
                return hinge.square().sum(1).mean() + c.margin * weight.square().sum()

            minimise([weight, bias], loss, 30)
            hashed = ((x @ weight.T + bias).detach() > 0).to(x)
            decoder, base = linear_decoder(z, x)
            mu = c.penalty * 2**turn * float(decoder.square().sum(1).mean())
            z = best_codes(x, z, decoder, base, hashed, mu, (0.0, 1.0))
            if z.equal(hashed):
                break
        self.hashing.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})


@dataclass(frozen=True)
class BDNNConfig(ClassicConfig):
    """Settings of BDNN: the paper's weights."""

    rounds: int = hyperparameter(5, "turns between the network and the codes")
    decay: float = hyperparameter(1e-5, "lambda_1, weight of the squared weights", 1e-7, 1e-2, log=True)
    binary_weight: float = hyperparameter(5e-2, "lambda_2, weight of the distance between outputs and codes", 1e-3, 1.0, log=True)
    independence_weight: float = hyperparameter(1e-2, "lambda_3, weight of the bits' correlation", 1e-4, 1.0, log=True)
    balance_weight: float = hyperparameter(1e-6, "lambda_4, weight of the bits' means", 1e-8, 1.0, log=True)


class BDNN(Classic):
    """Binary deep network without labels (UH-BDNN): its codes reconstruct the input, are independent and balanced.

    Two sigmoid layers, of four and two times L units, and a linear one; the paper has 8 to 32 bits and names widths for these. The first codes are ITQ's.
    """

    name: ClassVar[str] = "bdnn"
    reference: ClassVar[str] = "Do et al., Learning to Hash with Binary Deep Neural Network, ECCV 2016"
    Config: ClassVar[Any] = BDNNConfig
    config: BDNNConfig

    def build(self, features: int, bits: int) -> nn.Module:
        widths = features, 4 * bits, 2 * bits, bits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.draw().initial_seed())
            layers = [nn.Linear(one, next_) for one, next_ in zip(widths[:-1], widths[1:], strict=True)]
        return nn.Sequential(layers[0], nn.Sigmoid(), layers[1], nn.Sigmoid(), layers[2])

    def fit(self, x: Tensor) -> None:
        c, n, device = self.config, len(x), self.device
        network = self.hashing.cpu()
        b = signs(fit_itq(x, self.bits, self.draw().initial_seed())(x))
        weights = [layer.weight for layer in network if isinstance(layer, nn.Linear)]
        for _ in range(c.rounds):
            decoder, base = linear_decoder(b, x)

            def loss(b: Tensor = b) -> Tensor:
                h = network(x)
                terms = [
                    c.binary_weight / 2 * (h - b).square().sum(1).mean(), c.independence_weight / 2 * (h.T @ h / n - torch.eye(self.bits)).square().sum(),
                    c.balance_weight / 2 * h.sum(0).square().sum() / n, c.decay / 2 * torch.stack([each.square().sum() for each in weights]).sum(),
                ]  # fmt: skip
                return torch.stack(terms).sum()

            minimise([*network.parameters()], loss, 40)
            b = best_codes(x, b, decoder, base, network(x), c.binary_weight, (-1.0, 1.0))
        self.hashing.to(device)
