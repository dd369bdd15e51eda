"""Losses computed from logits, which is stable even if a probability would round to 0 or 1."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Soft Dice loss, ``1 - (2 |P∩T| + s) / (|P| + |T| + s)``, per image, then the mean (scalar, 0..1).

    ``logits`` and ``target``: (B, C, H, W) or (B, H, W), target 0..1. ``smooth``: makes the loss of an empty image 0 if
    nothing is predicted (Milletari et al. 2016, with the usual smoothing). ``valid``: bool, broadcast to the same
    shape; pixels where it is False are ignored.
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

    Shapes as in ``dice_loss``. ``alpha``: weight of the foreground; the background gets ``1 - alpha``. ``weights``: of
    the pixels, broadcast to the same shape (`weighted_mean`).
    """
    truth = target.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")  # -log p_t
    # 1 - p_t = sigmoid(-z) on foreground, sigmoid(z) on background; 1 - exp(-cross_entropy) would lose precision
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
    """Weighted sum ``dice_weight * dice + (1 - dice_weight) * focal``; the report's loss has 0.5 each (scalar).

    Pixel ``weights`` apply to the focal loss. In Dice they would bias the predicted area, so only pixels of weight 0
    are left out.
    """
    logits = logits.float()  # sums over pixels would overflow in half precision
    dice = dice_loss(logits, target, valid=None if weights is None else weights > 0)
    return dice_weight * dice + (1 - dice_weight) * focal_loss(logits, target, alpha, gamma, weights)


def distance_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy with a soft target 0..1, minimal if the sigmoid equals the target; mean over pixels (scalar)."""
    return weighted_mean(F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none"), weights)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted mean of ``values``; the plain mean if ``weights`` is None.

    Equal weights give the plain mean. If all weights are 0, so is the result.
    """
    if weights is None:
        return values.mean()
    return (values * weights).sum() / weights.expand_as(values).sum().clamp(min=1e-6)
