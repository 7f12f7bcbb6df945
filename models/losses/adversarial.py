"""Losses of discriminators and critics, and of the generators that train against them."""

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy, softplus


def real_class_loss(logits: Tensor, labels: Tensor, unlabelled: bool) -> Tensor:
    """Cross-entropy of real samples with their class (IGAN eq. 10, first two terms).

    Args:
        logits: (n, N + 1), the last one for "generated".
        labels: (n,) int64, -1 if unknown.
        unlabelled: whether samples without label are trained to be real, of any class: -log(1 - p("generated")); otherwise they
            contribute nothing.

    Returns:
        Scalar, mean over all n samples.
    """
    loss = cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    if unlabelled:
        loss = loss.where(labels >= 0, logits.logsumexp(1) - logits[:, :-1].logsumexp(1))
    return loss.mean()


def generated_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of generated samples with "generated" (IGAN eq. 10, last two terms).

    Args:
        logits: (n, N + 1).
    """
    return (logits.logsumexp(1) - logits[:, -1]).mean()


def deceiving_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of generated samples with the class of their originals: the generators' loss.

    Args:
        logits: (n, N + 1), of generated samples.
        labels: (n,) int64, classes of the originals; those of -1 (unknown) contribute nothing.

    Returns:
        Scalar, mean over all n samples.
    """
    return cross_entropy(logits, labels, ignore_index=-1, reduction="none").mean()


def generator_loss(scores: Tensor, objective: str) -> Tensor:
    """Generator loss: the negative score of its images, or their cross-entropy with "real".

    Args:
        scores: (n,), the critic's, of generated images.
        objective: ``wasserstein`` (SIGAN eq. 11) or ``gan`` (eq. 1, in its non-saturating form).
    """
    return -scores.mean() if objective == "wasserstein" else softplus(-scores).mean()


def critic_loss(real: Tensor, generated: Tensor, objective: str) -> Tensor:
    """Critic loss: generated minus real scores, or the cross-entropies with "generated" and "real".

    Args:
        real, generated: (n,) scores.
        objective: ``wasserstein`` (SIGAN eq. 11) or ``gan`` (eq. 1).
    """
    if objective == "wasserstein":
        return generated.mean() - real.mean()
    return softplus(generated).mean() + softplus(-real).mean()


def gradient_penalty(critic: nn.Module, real: Tensor, made: Tensor, share: Tensor) -> Tensor:
    """Mean squared distance of the critic's gradient norm to 1, on lines between generated and real samples (Gulrajani et al. 2017, eq. 3).

    Args:
        critic: (n, ...) -> (n,); each score depends only on its own sample.
        real, made: (n, ...).
        share: (n,) in [0, 1], the weight of the real sample in each interpolated point.
    """
    points = torch.lerp(made, real, share.view(-1, *[1] * (real.dim() - 1))).detach().requires_grad_()
    slope = grad(critic(points).sum(), points, create_graph=True)[0]
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()
