"""The interface of a method: everything the training loop, the command line and the registry use."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models.codes import check_bits
from models.hyperparameters import AblationRow, Preset, check_fields
from models.optimisers import MomentumEncoder, averaged_copy


class DomainView(Protocol):
    """One domain's part of a step: this worker's share of the global batch."""

    @property
    def x(self) -> Tensor:
        """(batch, channels, h, w) uint8, or (batch, features) float32."""

    @property
    def views(self) -> tuple[Tensor, ...]:
        """Augmented copies of ``x``, float32 in its range."""

    @property
    def label(self) -> Tensor | None:
        """(batch,) int64, or None if the method may not see labels."""

    @property
    def row(self) -> Tensor:
        """(batch,) int64, row numbers of the Parquet contract."""


class RowSource(Protocol):
    """The training rows of one domain that this worker owns: ``models.distributed.own_rows`` of them, in order."""

    @property
    def total(self) -> int:
        """Number of training rows in the domain, over all workers."""

    def rows(self) -> Iterator[DomainView]:
        """Yield each of this worker's rows once, in stored (shuffled) order, in batches that an encoder takes at once, without a target's labels.

        The only view is all embedded views, (batch, views, features), if there are any and views are wanted; none are made.
        """


class Batch(NamedTuple):
    """The input of a step: a batch of each domain, or None if the method does not use that domain."""

    source: DomainView | None
    target: DomainView | None


@dataclass(frozen=True)
class Wants:
    """The data that a method needs.

    Attributes:
        source_labels: it trains on the source's labels.
        target: it trains on target images (never on their labels).
        per_class: source images per class in a global batch; 0 for batches of ``batch_size`` without regard to class.
        batch_size: size of the target's global batch, and of the source's if ``per_class`` is 0; 0 uses the size that
            ``per_class`` gives.
        views: augmented views per image.
        view: options of ``data.transforms.random_view``.
    """

    source_labels: bool
    target: bool
    per_class: int
    batch_size: int
    views: int
    view: dict[str, Any] = field(default_factory=dict)


def chosen_view(kind: str, crop: float, flip: float = 0.5) -> dict[str, Any]:
    """``Wants.view`` of a kind of views: ``affine`` with its defaults, or ``crop`` or ``contrastive`` with the given smallest area and mirror images."""
    return {} if kind == "affine" else {"kind": kind, "crop": crop, "flip": flip}


@dataclass
class Player:
    """A named group of networks with its own optimiser; one DDP module in training.

    Attributes:
        partial: whether some steps, for example of pretraining, leave some of its parameters without gradient.
    """

    networks: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    partial: bool = False


class Method:
    """Base class of the methods. A method owns its networks, losses and schedules, and knows nothing about datasets.

    Subclasses set ``reference`` (the citation), ``Config`` (their dataclass) and ``presets``, build ``players`` in their constructor, and
    implement ``wants``, ``losses``, ``weights`` and ``encoder``.

    Attributes:
        presets: the paper's settings by name; ``paper`` is the one of its main table.
        ablation: the rows of the paper's ablation table.
        table: the metrics that our tables show; the paper's figures are of the first.
        fitted: it has no players and learns everything in ``begin``, in one process.
        source_optional: it can train without a source; with one it learns from both domains.
        has_features: it implements ``features``; evaluation then also ranks by their cosine similarity.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    Config: ClassVar[Any]
    presets: ClassVar[dict[str, Preset]]
    ablation: ClassVar[tuple[AblationRow, ...]] = ()
    table: ClassVar[tuple[str, ...]] = ("accuracy", "cross/map", "target/map")
    fitted: ClassVar[bool] = False
    source_optional: ClassVar[bool] = False
    has_features: ClassVar[bool] = False
    players: dict[str, Player]
    averaged: AveragedModel | MomentumEncoder | None = None

    def __init__(self, config: Any, shape: tuple[int, ...], classes: int, bits: int) -> None:
        """Args:
            config: the method's hyper-parameters.
            shape: (features,) or (channels, height, width).
            classes: number of classes of the source.
            bits: code length.
        """
        check_fields(config)
        self.config, self.shape, self.classes, self.bits = config, shape, classes, check_bits(bits)
        self.seed, self.epoch, self.draws = torch.initial_seed(), 0, 0

    @classmethod
    def preset(cls, name: str) -> Any:
        """The config of a preset; the defaults for ``default``.

        Raises:
            ValueError: there is no such preset.
        """
        if name != "default" and name not in cls.presets:
            raise ValueError(f"{cls.name} has no preset {name!r}: there are {', '.join(['default', *cls.presets])}")
        return cls.Config(**cls.presets[name].values if name in cls.presets else {})

    @property
    def wants(self) -> Wants:
        """The data it needs, which may depend on its config."""
        raise NotImplementedError

    @property
    def notes(self) -> list[str]:
        """What a user should know before this config trains, a line each."""
        return []

    def is_active(self, player: str) -> bool:
        """Whether a player takes this step; a discriminator, for example, waits while the encoder is pretrained."""
        return True

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """The paper's named terms of a player's loss: unweighted scalars over the global batch."""
        raise NotImplementedError

    def weights(self, player: str) -> dict[str, float]:
        """The weight of each named term."""
        raise NotImplementedError

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum that a player minimises, and its terms."""
        terms, weights = self.losses(player, batch), self.weights(player)
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms

    def begin(self, source: RowSource | None, target: RowSource | None) -> None:
        """Work before the first epoch that needs the training rows: all of a fitted method's learning, or filling a memory bank.

        It is not called again when a run resumes.
        """

    def start_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Begin an epoch: restart its sequence of draws, then call ``begin_epoch``."""
        self.epoch, self.draws = epoch, 0
        self.begin_epoch(epoch, epochs, source, target)

    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Schedules by epoch, staged re-initialisation, clustering of the training rows. Epochs count from 0."""

    def draw(self) -> torch.Generator:
        """A CPU generator for one random draw of the method: a function of the run's seed, the epoch and the draws before it in the epoch.

        All ranks get the same. The three numbers are mixed, as torch keeps 32 bits of a seed.
        """
        self.draws += 1
        return torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, self.epoch, self.draws]).generate_state(1)[0]))

    def begin_step(self, progress: float) -> None:
        """Schedules by step; ``progress`` runs from 0 to 1 over the whole training."""

    def track_average(self, networks: nn.Module, decay: float) -> None:
        """Keep an exponential moving average (EMA) of networks from now on; none if ``decay`` is 0."""
        self.moving, self.averaged = networks, averaged_copy(networks, decay)

    @property
    def ema_networks(self) -> Any:
        """The EMA copy of the networks given to ``track_average``, or the networks themselves if there is none."""
        return self.moving if self.averaged is None else self.averaged.module

    @contextmanager
    def guessing(self) -> Iterator[Any]:
        """The ``ema_networks`` for pseudo-labels: in evaluation mode and without gradient.

        Without an EMA copy these are the trained networks, whose dropout is off here and whose batch-norm statistics stay as they are.
        """
        networks, mode = self.ema_networks, self.ema_networks.training
        networks.eval()
        with torch.no_grad():
            yield networks
        networks.train(mode)

    def end_step(self) -> None:
        """Work after the optimisers' steps; here, the update of the EMA copy."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.moving)

    def failure(self, terms: dict[str, float]) -> str:
        """A message if an epoch's mean terms show a failure, such as a collapsed discriminator; "" otherwise."""
        return ""

    def encode(self, x: Tensor) -> Tensor:
        """Relaxed codes (batch, bits) in [-1, 1]; the binary code is their sign."""
        return self.encoder()(x)

    def encoder(self) -> nn.Module:
        """The module that maps raw input to relaxed codes, in evaluation mode."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """L2-normalised real features (batch, width) that the codes are made of, if the method has them."""
        raise NotImplementedError

    @property
    def can_classify(self) -> bool:
        """Whether the method implements ``classify`` or ``classify_codes``."""
        return type(self).classify is not Method.classify or self.classifies_codes

    @property
    def classifies_codes(self) -> bool:
        """Whether the method implements ``classify_codes``: its codes are enough to classify."""
        return type(self).classify_codes is not Method.classify_codes

    @property
    def can_translate(self) -> bool:
        """Whether the method implements ``translate``."""
        return False

    def translate(self, x: Tensor) -> Tensor:
        """Translate source images into the target domain.

        Args:
            x: (batch, channels, h, w) uint8, or (batch, features) float32.

        Returns:
            Same shape and type.
        """
        raise NotImplementedError

    def set_references(self, codes: Tensor, labels: Tensor) -> None:
        """Store labelled source codes, for methods that classify by comparing codes."""

    def classify(self, x: Tensor) -> Tensor:
        """Class log-probabilities (batch, classes), if the method defines classes; here, of the codes."""
        return self.classify_codes(self.encode(x))

    def classify_codes(self, codes: Tensor) -> Tensor:
        """Class log-probabilities (batch, classes) of relaxed codes (batch, bits), if they are enough to classify."""
        raise NotImplementedError

    def state_modules(self) -> nn.ModuleDict:
        """All modules that a checkpoint saves, besides the optimisers."""
        kept: dict[str, nn.Module] = {name: player.networks for name, player in self.players.items()}
        return nn.ModuleDict(kept if self.averaged is None else kept | {"averaged": self.averaged})

    def whole_state(self) -> dict[str, Tensor]:
        """The state of ``state_modules``. On rank 0, what is divided among the ranks is whole; all ranks call it together."""
        return dict(self.state_modules().state_dict())

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        modules = self.state_modules()
        return next((each.device for each in chain(modules.parameters(), modules.buffers())), torch.device("cpu"))

    def to(self, device: torch.device | torch.dtype) -> Self:
        """Move all networks and optimiser states, also to a dtype."""
        self.state_modules().to(device)
        for player in self.players.values():
            player.optimizer.load_state_dict(player.optimizer.state_dict())  # casts the state to the parameters' device and dtype
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode of every player."""
        for player in self.players.values():
            player.networks.train(mode)
        return self


def classify_encoded(method: Method, x: Tensor, codes: Tensor) -> Tensor:
    """Class log-probabilities (batch, classes) of rows whose relaxed codes (batch, bits) are known; of these alone if they are enough."""
    return method.classify_codes(codes) if method.classifies_codes else method.classify(x)
