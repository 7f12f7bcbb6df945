"""SIGAN, semantic invariant GAN (Mao et al., Neurocomputing 2018): a translation keeps its original's label and attention maps.

Symbols and pretraining as in ``models.methods.translator``.

Vectors have no places and no neighbours: for them the attention and total-variation terms are left out.

Extensions beyond the paper and those of the base class: the source's classification after pretraining; a semantic term that trains G with
the pretrained E and F; attention maps scaled by their width. Each has a field that switches it off.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, mse_loss

from models.distributed import rank_slice, world_size
from models.hyperparameters import AblationRow, Preset, hyperparameter
from models.losses.adversarial import critic_loss, generator_loss, gradient_penalty
from models.methods.translator import Translator, TranslatorConfig
from models.networks.translation import Activations, attention_map, total_variation

S_M = "svhn -> mnist"


@dataclass(frozen=True)
class SIGANConfig(TranslatorConfig):
    """Hyper-parameters of SIGAN. The defaults work best here."""

    adversarial_objective: str = hyperparameter("wasserstein", "adversarial objective", choices=("wasserstein", "gan"))
    label_weight: float = hyperparameter(1.0, "weight of the label consistency", 0.1, 10.0, log=True)
    label_interval: int = hyperparameter(1, "t, steps from one update by label consistency to the next; 20 in the paper")
    semantic_weight: float = hyperparameter(1.0, "weight of the label as E and F when pretrained see it, which moves G; 0 in the paper", 0.1, 10.0, log=True)
    attention_weight: float = hyperparameter(0.01, "alpha, weight of the attention term", 1e-3, 1.0, log=True)
    attention_scaled: bool = hyperparameter(True, "attention maps divided by their number of channels; off in the paper")
    source_weight: float = hyperparameter(1.0, "weight of the source's classification after pretraining; 0 in the paper", 0.1, 3.0, log=True)
    lipschitz: str = hyperparameter(
        "penalty", "what bounds a Wasserstein critic's slope", choices=("penalty", "clip"), when={"adversarial_objective": ("wasserstein",)}
    )
    penalty_weight: float = hyperparameter(
        10.0, "weight of the gradient penalty", 1.0, 30.0, log=True, when={"adversarial_objective": ("wasserstein",), "lipschitz": ("penalty",)}
    )
    clip: float = hyperparameter(0.01, "bound of the critic's weights under clipping")


class SIGAN(Translator):
    """Translates source images into the target's style with their labels (Algorithm 1), and trains a hash layer on both."""

    name: ClassVar[str] = "sigan"
    reference: ClassVar[str] = "Mao et al., Semantic Invariant Cross-domain Image Generation with Generative Adversarial Networks, Neurocomputing 2018"
    Config: ClassVar[Any] = SIGANConfig
    presets: ClassVar[dict[str, Preset]] = {  # the paper names no learning rate and no Lipschitz constraint: 3e-4 and clipping are our readings
        "paper": Preset("Table 1, SVHN -> MNIST, batches of 200", 0, {
            "label_interval": 20, "semantic_weight": 0.0, "pretrain_epochs": 2, "reconstruction_weight": 1.0, "attention_scaled": False,
            "source_weight": 0.0, "pseudo_weight": 0.0, "balance_weight": 0.0, "lipschitz": "clip", "average": 0.0, "augment": False, "per_class": 20,
            "width": 64, "extractor": "none", "optimizer": "rmsprop", "learning_rate": 3e-4, "final_rate": 1.0,
        }),
    }  # fmt: skip
    ablation: ClassVar[tuple[AblationRow, ...]] = (  # Table 1
        AblationRow("SIGAN without TV", {"variation_weight": 0.0}, {S_M: 83.63}),
        AblationRow("SIGAN", {}, {S_M: 83.41}),
        AblationRow("without attention", {"attention_weight": 0.0}, {S_M: 78.56}),
        AblationRow("without label consistency", {"label_weight": 0.0, "semantic_weight": 0.0}, {S_M: 51.77}),
        AblationRow("without GAN", {"adversarial_weight": 0.0}, {S_M: 32.60}),
        AblationRow("without attention and label", {"attention_weight": 0.0, "label_weight": 0.0, "semantic_weight": 0.0}, {S_M: 10.39}),
        AblationRow("DTN", {}, {S_M: 80.23}, method="dtn"),
        AblationRow("source only", {"pretrain_epochs": 1_000_000, "pseudo_weight": 0.0}, {S_M: 60.21}),
    )
    config: SIGANConfig

    @property
    def _clipped(self) -> bool:
        """Whether the critic's weights are clipped."""
        c = self.config
        return "critic" in self.players and c.adversarial_objective == "wasserstein" and c.lipschitz == "clip"

    def end_step(self) -> None:
        if self._clipped:
            with torch.no_grad():
                for parameter in self.critic.parameters():
                    parameter.clamp_(-self.config.clip, self.config.clip)
        super().end_step()

    def translation(self, x_s: Tensor, labels: Tensor, x_t: Tensor, view: list[Tensor]) -> dict[str, Tensor]:
        """The terms of Algorithm 1. The classifier F stays fixed, as it receives no gradient."""
        c = self.config
        s, t = slice(None, len(x_s)), slice(len(x_s), len(x_s) + len(x_t))
        seen = self.encode_part(torch.cat([x_s, x_t, *view]))
        made = self.generator(seen.out[: t.stop])
        again = self.encode_part(made.out[s].detach())  # translations serve as labelled images
        self.made = (x_t, made.out[s].detach())
        terms = self._keep_meaning(Activations(*(each[s] for each in seen)), Activations(*(each[s] for each in made)), labels)
        if c.label_weight and self.steps % max(c.label_interval, 1) == 0:
            terms["label"] = cross_entropy(self._fixed_classifier(again.out), labels)
        if view:
            terms |= self.guess(self._fixed_classifier(seen.out[t.stop :]), x_t)
        if c.adversarial_weight:
            terms["adversarial"] = generator_loss(self.critic(made.out[s]), c.adversarial_objective)
        if c.reconstruction_weight:
            terms["reconstruction"] = mse_loss(made.out[t], x_t)
        if c.variation_weight and self.translates_pixels:
            terms["variation"] = total_variation(made.out[s])
        return terms | self.hashed(torch.cat([seen.out[s], again.out]), torch.cat([labels, labels]))

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        return super().weights(player) | {
            "source": 1.0 if self.pretraining else c.source_weight, "label": c.label_weight, "semantic": c.semantic_weight,
            "attention": c.attention_weight, "penalty": c.penalty_weight,
        }  # fmt: skip

    def _fixed_classifier(self, h: Tensor) -> Tensor:
        """F without gradient, for the time after pretraining."""
        return linear(h, self.classifier.weight.detach(), self.classifier.bias.detach())

    def _keep_meaning(self, seen: Activations, made: Activations, labels: Tensor) -> dict[str, Tensor]:
        """Terms that preserve a source image's meaning in its translation: semantic, attention (eq. 9-10).

        Args:
            seen: output of E for the source images.
            made: output of G for ``seen``.
        """
        c, terms = self.config, {}
        if c.source_weight:
            terms["source"] = cross_entropy(self._fixed_classifier(seen.out), labels)
        if c.semantic_weight:
            terms["semantic"] = cross_entropy(self.pretrained["classifier"](self.pretrained["encoder"](made.out).out), labels)
        if c.attention_weight and self.translates_pixels:
            of_made, of_seen = ([attention_map(layer, c.attention_scaled) for layer in (each.at_8, each.at_4)] for each in (made, seen))
            terms["attention"] = torch.stack([mse_loss(*pair) for pair in zip(of_made, of_seen, strict=True)]).sum()
        return terms

    def judgement(self) -> dict[str, Tensor]:
        """The critic's objective on target images and translations, and its gradient penalty between them."""
        assert self.made is not None
        c, (real, made) = self.config, self.made
        scores = self.critic(torch.cat([real, made]))
        terms = {"critic": critic_loss(scores[: len(real)], scores[len(real) :], c.adversarial_objective)}
        if c.adversarial_objective == "wasserstein" and c.lipschitz == "penalty":
            share = rank_slice(torch.rand(len(real) * world_size(), generator=self.draw())).to(real.device)
            terms["penalty"] = gradient_penalty(self.critic, real, made, share)
        return terms

    def failure(self, terms: dict[str, float]) -> str:
        """A critic without errors, or with unbounded scores, gives the generator no useful signal."""
        if "critic" not in terms:
            return ""
        if self.config.adversarial_objective == "gan" and terms["critic"] < 1e-4:
            return "the critic tells every translated image: lower --critic-rate"
        if self.config.adversarial_objective == "wasserstein" and abs(terms["critic"]) > 1e4:
            return f"the critic's scores run away ({terms['critic']:.3g}): raise --penalty-weight, or lower --critic-rate"
        return ""
