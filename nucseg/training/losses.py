"""Losses from logits, so that they stay stable where a probability would round to 0 or 1."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss, ``1 - (2 |P∩T| + s) / (|P| + |T| + s)``, per image, then the mean (scalar, 0..1).

    ``logits`` and ``target``: (B, C, H, W) or (B, H, W), target 0..1. ``smooth`` makes the loss of an
    empty image 0 if nothing is predicted (Milletari et al. 2016, with the usual smoothing).
    """
    probability = torch.sigmoid(logits).flatten(1)
    truth = target.to(probability.dtype).flatten(1)
    overlap = (probability * truth).sum(1)
    return (1 - (2 * overlap + smooth) / (probability.sum(1) + truth.sum(1) + smooth)).mean()


def focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 5), ``-alpha_t (1 - p_t)^gamma log p_t``, mean over pixels (scalar).

    Shapes as in ``dice_loss``. ``alpha`` weights the foreground, ``1 - alpha`` the background.
    """
    truth = target.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")  # -log p_t
    # 1 - p_t = sigmoid(-z) on foreground, sigmoid(z) on background: exact where exp(-cross_entropy) rounds
    miss = torch.sigmoid(torch.where(truth > 0.5, -logits, logits))
    weight = torch.where(truth > 0.5, alpha, 1 - alpha)
    return (weight * miss**gamma * cross_entropy).mean()


def dice_focal_loss(
    logits: Tensor, target: Tensor, dice_weight: float = 0.5, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """``dice_weight * dice + (1 - dice_weight) * focal``; 0.5 each is the report's loss (scalar)."""
    logits = logits.float()  # half precision would overflow in the sums over pixels
    return dice_weight * dice_loss(logits, target) + (1 - dice_weight) * focal_loss(logits, target, alpha, gamma)
