"""The contract of a method: what the training loop may ask of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models.codes import check_bits
from models.optimisers import averaged_copy


class DomainView(Protocol):
    """One domain's part of a step, this worker's share of the global batch."""

    @property
    def x(self) -> Tensor:
        """(batch, channels, h, w) uint8, or (batch, features) float32."""

    @property
    def views(self) -> tuple[Tensor, ...]:
        """Augmented copies of ``x``: float32 in its range."""

    @property
    def label(self) -> Tensor | None:
        """(batch,) int64, or None where the method may not see it."""

    @property
    def row(self) -> Tensor:
        """(batch,) int64, the rows of the Parquet contract."""


class RowSource(Protocol):
    """The training rows of one domain, as this worker may read them."""

    @property
    def total(self) -> int:
        """Number of the domain's training rows, those of other workers among them."""

    def rows(self, size: int = 512) -> Iterator[DomainView]:
        """This worker's rows once, in their (shuffled) order, ``size`` at a time, without views and, for a target, without labels."""


class Batch(NamedTuple):
    """What a step sees: a batch of the source and one of the target, either None where the method wants none."""

    source: DomainView | None
    target: DomainView | None


@dataclass(frozen=True)
class Wants:
    """What a method needs from its data.

    Attributes:
        source_labels: it trains on the source's labels.
        target: it trains on target images (never on their labels).
        per_class: source images per class in a global batch; 0 for batches of ``batch_size`` without regard to class.
        batch_size: size of the target's global batch, and of the source's where ``per_class`` is 0; 0 for the size
            that ``per_class`` gives.
        views: augmented views per image.
        view: how a view of an image differs from it: options of ``data.transforms.random_view``.
    """

    source_labels: bool
    target: bool
    per_class: int
    batch_size: int
    views: int
    view: dict[str, Any] = field(default_factory=dict)


class AblationRow(NamedTuple):
    """A row of a paper's ablation table.

    Attributes:
        name: the terms, as the paper writes them.
        changes: the fields that differ from the method's setting, and their values.
        figures: the paper's figures in percent, by "source -> target" or what they were measured on.
    """

    name: str
    changes: dict[str, Any]
    figures: dict[str, float]


def hyperparameter(
    default: Any, help: str, low: Any = None, high: Any = None, log: bool = False, choices: Any = None, when: dict[str, tuple[Any, ...]] | None = None
) -> Any:
    """A hyper-parameter's field: its default, meaning and search range in one place.

    Args:
        low, high: bounds of the search, None where it is not searched.
        log: search on a logarithmic scale.
        choices: the values it may take, where these are few.
        when: the values of other fields with which it means anything; none for always.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "log": log, "choices": choices, "when": when or {}})


def check_fields(config: Any) -> None:
    """Check a config's values against its fields' choices and signs.

    Raises:
        ValueError: names the field, its value and what it may be.
    """
    for each in fields(config):
        value, choices = getattr(config, each.name), each.metadata.get("choices")
        if choices is not None and value not in choices:
            raise ValueError(f"{each.name} is {value!r}, but must be one of {', '.join(map(str, choices))}")
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{each.name} is {value}, but must not be negative")


@dataclass
class Player:
    """A named group of networks that is optimised on its own; one DDP module in training.

    Attributes:
        partial: whether some steps, such as those of a pretraining, leave some of its parameters without gradient.
    """

    networks: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    partial: bool = False


class Method:
    """Base of the methods. A method owns its networks, its losses and its schedules, and knows nothing of data sets.

    Subclasses set ``reference`` (the citation), ``Config`` (their dataclass), build ``players`` in their constructor, and
    implement ``wants``, ``losses``, ``weights`` and ``encoder``.

    Attributes:
        ablation: the rows of the paper's ablation table.
        table: the metrics that a table of ours shows; the paper's figures are of the first.
        fitted: it has no player, and learns all in :meth:`begin`, in one process.
        one_domain: it needs no source; with one, it learns from both domains.
        embeds: it has :meth:`features`, which are ranked by their cosine beside the codes.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    Config: ClassVar[Any]
    ablation: ClassVar[tuple[AblationRow, ...]] = ()
    table: ClassVar[tuple[str, ...]] = ("accuracy", "cross/map", "target/map")
    fitted: ClassVar[bool] = False
    source_optional: ClassVar[bool] = False
    has_features: ClassVar[bool] = False
    players: dict[str, Player]
    averaged: AveragedModel | None = None

    def __init__(self, config: Any, shape: tuple[int, ...], classes: int, bits: int) -> None:
        """Args:
        config: the method's hyper-parameters.
        shape: (features,) or (channels, height, width).
        classes: number of classes of the source.
        bits: code length.
        """
        check_fields(config)
        self.config, self.shape, self.classes, self.bits = config, shape, classes, check_bits(bits)

    @property
    def wants(self) -> Wants:
        """What it needs of its data, by its configuration."""
        raise NotImplementedError

    def is_active(self, player: str) -> bool:
        """Whether a player takes this step: a discriminator does not while an encoder is pretrained."""
        return True

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """The paper's named terms for a player, unweighted scalars of the global batch."""
        raise NotImplementedError

    def weights(self, player: str) -> dict[str, float]:
        """The weight of each named term."""
        raise NotImplementedError

    def loss(self, player: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum that the player minimises, and its terms."""
        terms, weights = self.losses(player, batch), self.weights(player)
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms

    def begin(self, source: RowSource | None, target: RowSource | None) -> None:
        """What comes before the first epoch and sees the training rows: the whole of a fitted method, the slots of a memory.

        It is not called again when a training resumes.
        """

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Schedules by epoch, staged re-initialisation, re-clustering. Epochs count from 0."""

    def begin_step(self, progress: float) -> None:
        """Schedules by step; ``progress`` runs from 0 to 1 over the whole training."""

    def track_average(self, networks: nn.Module, decay: float) -> None:
        """Keep an averaged copy of networks from now on; none where ``decay`` is 0."""
        self.moving, self.averaged = networks, averaged_copy(networks, decay)

    @property
    def ema_networks(self) -> Any:
        """The averaged copy of the networks given to :meth:`average`, or these themselves where there is none."""
        return self.moving if self.averaged is None else self.averaged.module

    def end_step(self) -> None:
        """What follows the optimisers' steps: here, the averaged copy."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.moving)

    def failure(self, terms: dict[str, float]) -> str:
        """What an epoch's mean terms say has gone wrong, such as a discriminator's collapse; "" where nothing has."""
        return ""

    def encode(self, x: Tensor) -> Tensor:
        """Relaxed codes (batch, bits) in [-1, 1]; the code is their sign."""
        return self.encoder()(x)

    def encoder(self) -> nn.Module:
        """The module that :meth:`encode` evaluates: raw input to relaxed codes, in evaluation mode."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """L2-normalised real features (batch, width) of which the codes are made, where the method has such."""
        raise NotImplementedError

    @property
    def can_classify(self) -> bool:
        """Whether :meth:`classify` names classes."""
        return type(self).classify is not Method.classify

    @property
    def can_translate(self) -> bool:
        """Whether :meth:`translate` makes target images."""
        return False

    def translate(self, x: Tensor) -> Tensor:
        """Images of the target domain made of source images.

        Args:
            x: (batch, channels, h, w) uint8, or (batch, features) float32.

        Returns:
            The same shape and type.
        """
        raise NotImplementedError

    def set_references(self, codes: Tensor, labels: Tensor) -> None:
        """Take labelled source codes that recognition compares with, where the method does so."""

    def classify(self, x: Tensor) -> Tensor:
        """Class log-probabilities (batch, classes), where the method defines classes."""
        raise NotImplementedError

    def state_modules(self) -> nn.ModuleDict:
        """Everything that a checkpoint keeps beside the optimisers."""
        kept: dict[str, nn.Module] = {name: player.networks for name, player in self.players.items()}
        return nn.ModuleDict(kept if self.averaged is None else kept | {"averaged": self.averaged})

    def to(self, device: torch.device) -> Self:
        """Move every network and optimiser state."""
        self.state_modules().to(device)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode of every player."""
        for player in self.players.values():
            player.networks.train(mode)
        return self

