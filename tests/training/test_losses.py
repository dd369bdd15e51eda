import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import sigmoid_focal_loss

from nucseg.training.losses import dice_focal_loss, dice_loss, distance_loss, focal_loss


def test_dice_by_hand():
    # probabilities 1/2 on four pixels, two of them true: overlap 1, sums 2 + 2 -> 1 - (2 + 1) / (4 + 1)
    loss = dice_loss(torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]]))
    assert math.isclose(loss.item(), 1 - 3 / 5, abs_tol=1e-6)


def test_dice_is_a_mean_over_images_not_over_pixels():
    target = torch.zeros(2, 1, 4, 4)
    target[0] = 1
    logits = torch.full_like(target, 50.0)
    # image 0 is perfect; image 1 predicts 16 px of nothing: 1 - 1 / 17
    assert math.isclose(dice_loss(logits, target).item(), (1 - 1 / 17) / 2, abs_tol=1e-6)


def test_focal_by_hand():
    # p = 1/2 everywhere: alpha_t * 1/4 * log 2
    target = torch.tensor([[[[1.0, 0.0]]]])
    expected = (0.25 + 0.75) / 2 * 0.25 * math.log(2)
    assert math.isclose(focal_loss(torch.zeros(1, 1, 1, 2), target).item(), expected, rel_tol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), alpha=st.floats(0, 1), gamma=st.sampled_from([0.0, 1.0, 2.0, 5.0]))
def test_focal_equals_torchvisions(seed, alpha, gamma):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, 1, 8, 8, generator=generator)
    target = (torch.rand(2, 1, 8, 8, generator=generator) > 0.7).float()
    expected = sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma, reduction="mean")
    torch.testing.assert_close(focal_loss(logits, target, alpha, gamma), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("value", [50.0, -50.0, 1000.0, -1000.0])
@pytest.mark.parametrize("truth", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stable_at_large_logits(value, truth, dtype):
    logits = torch.full((1, 1, 4, 4), value, dtype=dtype, requires_grad=True)
    loss = dice_focal_loss(logits, torch.full((1, 1, 4, 4), truth))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    right = (value > 0) == (truth == 1)
    assert loss.item() < 1e-6 if right else loss.item() > 0.4
    if not right and truth and abs(value) == 50:
        assert logits.grad.abs().sum() > 0  # a confident miss still learns


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_better_predictions_lose_less(seed):
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).float()
    toward = 2 * target - 1
    losses = [dice_focal_loss(scale * toward, target).item() for scale in (-4, -1, 0, 1, 4, 40)]
    assert losses == sorted(losses, reverse=True)
    assert 0 <= losses[-1] < 1e-6


def test_the_sum_is_the_weighted_sum():
    logits, target = torch.randn(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    expected = 0.3 * dice_loss(logits, target) + 0.7 * focal_loss(logits, target)
    torch.testing.assert_close(dice_focal_loss(logits, target, dice_weight=0.3), expected)


def test_pixels_of_weight_0_change_nothing_and_have_no_gradient():
    """Predictions and targets in ignored areas affect none of the losses."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 1, 8, 8, generator=generator)).requires_grad_()
    target = (torch.rand(2, 1, 8, 8, generator=generator) > 0.6).float()
    weights = torch.ones(2, 1, 8, 8)
    weights[0, :, :4] = weights[1, :, :, 6:] = 0
    for loss in (dice_focal_loss, distance_loss):
        value = loss(logits, target, weights=weights)
        (gradient,) = torch.autograd.grad(value, logits)
        assert (gradient[weights == 0] == 0).all() and (gradient[weights > 0] != 0).all()
        other = torch.where(weights > 0, logits.detach(), -7 * logits.detach())
        torch.testing.assert_close(loss(other, torch.where(weights > 0, target, 1 - target), weights=weights), value)
        # as if the image ended there
        alone = loss(logits[:1, :, 4:], target[:1, :, 4:], weights=weights[:1, :, 4:])
        torch.testing.assert_close(loss(logits[:1], target[:1], weights=weights[:1]), alone)
        torch.testing.assert_close(loss(logits, target, weights=torch.ones_like(weights)), loss(logits, target))


def test_an_image_without_any_annotated_pixel_teaches_nothing():
    logits = torch.randn(1, 1, 4, 4).requires_grad_()
    for loss in (dice_focal_loss, distance_loss):
        value = loss(logits, torch.ones(1, 1, 4, 4), weights=torch.zeros(1, 1, 4, 4))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == 0 and (gradient == 0).all()


def test_pixel_weights_by_hand():
    # p = 1/2: the true pixel costs 0.25 * 1/4 * log 2, the other 0.75 * 1/4 * log 2; weights 3 and 1
    target, weights = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[3.0, 1.0]]]])
    expected = (3 * 0.25 + 0.75) / 4 * 0.25 * math.log(2)
    found = focal_loss(torch.zeros(1, 1, 1, 2), target, weights=weights)
    assert math.isclose(found.item(), expected, rel_tol=1e-5)
    # cross-entropy at p = 1/2 is log 2 whatever the target; at p = sigmoid(2) and target 1 it is log(1 + e^-2)
    logits = torch.tensor([[[[0.0, 2.0]]]])
    expected = (3 * math.log(2) + math.log1p(math.exp(-2))) / 4
    assert math.isclose(distance_loss(logits, torch.ones(1, 1, 1, 2), weights).item(), expected, rel_tol=1e-5)


def test_equal_weights_change_nothing():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 1, 8, 8, generator=generator), torch.rand(2, 1, 8, 8, generator=generator).round()
    weights = torch.full((2, 1, 8, 8), 7.0)
    for loss in (dice_focal_loss, focal_loss, distance_loss):
        torch.testing.assert_close(loss(logits, target, weights=weights), loss(logits, target))


def test_the_distance_loss_is_least_where_the_sigmoid_is_the_target():
    target = torch.full((1, 1, 1, 1), 0.3)
    losses = [distance_loss(torch.logit(torch.full((1, 1, 1, 1), p)), target) for p in (0.2, 0.3, 0.4)]
    assert min(losses) == losses[1]
