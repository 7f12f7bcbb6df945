"""DTN, domain transfer network (Taigman et al., ICLR 2017), on which SIGAN builds.

Symbols: E encoder (the paper's f), G generator, D critic. f-constancy, ||f(x) - f(g(f(x)))||^2, keeps the meaning of a
translated image; it takes the place of SIGAN's label consistency and attention terms. Networks and training are SIGAN's.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from models.method import AblationRow, hyperparameter
from models.methods.sigan import DTN_TERMS, SIGAN, SIGANConfig


@dataclass(frozen=True)
class DTNConfig(SIGANConfig):
    """SIGAN with f-constancy in place of label consistency and attention, and the plain GAN objective."""

    adversarial_objective: str = hyperparameter("gan", "adversarial objective", choices=("wasserstein", "gan"))
    label_weight: float = hyperparameter(0.0, "weight of the label consistency; 0 in DTN")
    semantic_weight: float = hyperparameter(0.0, "weight of the label as E and F when pretrained see it; 0 in DTN")
    attention_weight: float = hyperparameter(0.0, "weight of the attention term; 0 in DTN")
    constancy_weight: float = hyperparameter(15.0, "weight of the f-constancy", 1.0, 100.0, log=True)

    @classmethod
    def paper(cls) -> Self:
        switched = replace(SIGANConfig.paper(), optimizer="adam", **DTN_TERMS)
        return cls(**vars(switched))


class DTN(SIGAN):
    """Domain transfer network: f-constancy preserves the content of translated images."""

    name: ClassVar[str] = "dtn"
    reference: ClassVar[str] = "Taigman et al., Unsupervised Cross-domain Image Generation, ICLR 2017"
    Config: ClassVar[Any] = DTNConfig
    ablation: ClassVar[tuple[AblationRow, ...]] = ()  # the table is about SIGAN's terms
