"""Losses from logits, so that they stay stable where a probability would round to 0 or 1."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Soft Dice loss, ``1 - (2 |P∩T| + s) / (|P| + |T| + s)``, per image, then the mean (scalar, 0..1).

    ``logits`` and ``target``: (B, C, H, W) or (B, H, W), target 0..1. ``smooth`` makes the loss of an
    empty image 0 if nothing is predicted (Milletari et al. 2016, with the usual smoothing). ``valid``: bool, in a shape
    that broadcasts; pixels where it is False count neither for nor against.
    """
    probability, truth = torch.sigmoid(logits), target.to(logits.dtype)
    if valid is not None:
        probability, truth = probability * valid, truth * valid
    probability, truth = probability.flatten(1), truth.flatten(1)
    overlap = (probability * truth).sum(1)
    return (1 - (2 * overlap + smooth) / (probability.sum(1) + truth.sum(1) + smooth)).mean()


def focal_loss(
    logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0, weights: Tensor | None = None
) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 5), ``-alpha_t (1 - p_t)^gamma log p_t``, mean over pixels (scalar).

    Shapes as in ``dice_loss``. ``alpha`` weights the foreground, ``1 - alpha`` the background; ``weights``, in a shape
    that broadcasts, weight the pixels (`weighted_mean`).
    """
    truth = target.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")  # -log p_t
    # 1 - p_t = sigmoid(-z) on foreground, sigmoid(z) on background: exact where exp(-cross_entropy) rounds
    miss = torch.sigmoid(torch.where(truth > 0.5, -logits, logits))
    weight = torch.where(truth > 0.5, alpha, 1 - alpha)
    return weighted_mean(weight * miss**gamma * cross_entropy, weights)


def dice_focal_loss(
    logits: Tensor,
    target: Tensor,
    dice_weight: float = 0.5,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weights: Tensor | None = None,
) -> Tensor:
    """``dice_weight * dice + (1 - dice_weight) * focal``; 0.5 each is the report's loss (scalar).

    ``weights`` of the pixels count in the focal loss; in Dice they would bias the predicted area, so that there only
    pixels of weight 0 are left out.
    """
    logits = logits.float()  # half precision would overflow in the sums over pixels
    dice = dice_loss(logits, target, valid=None if weights is None else weights > 0)
    return dice_weight * dice + (1 - dice_weight) * focal_loss(logits, target, alpha, gamma, weights)


def distance_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy with a soft target 0..1, least where the sigmoid equals it; mean over pixels (scalar)."""
    return weighted_mean(F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none"), weights)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of ``values``, each counted by its weight, so that equal weights change nothing; None: the plain mean.

    0 where all weights are 0.
    """
    if weights is None:
        return values.mean()
    return (values * weights).sum() / weights.expand_as(values).sum().clamp(min=1e-6)
