import torch

from training.optim.loss_scale import GROWTH_STEPS, LossScale


def test_the_scale_halves_when_gradients_overflow_and_doubles_after_enough_good_steps():
    scale = LossScale()

    scale.update(is_finite=False)
    assert scale.scale == 32768
    for _ in range(GROWTH_STEPS - 1):
        scale.update(is_finite=True)
    assert scale.scale == 32768
    scale.update(is_finite=True)
    assert scale.scale == 65536


def test_it_follows_torchs_scaler():
    theirs = torch.amp.GradScaler("cpu", growth_interval=GROWTH_STEPS)
    theirs.scale(torch.zeros(1))
    ours = LossScale()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    pattern = [False, True, False, False] + [True] * (GROWTH_STEPS + 3)

    for is_finite in pattern:
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([1.0 if is_finite else float("inf")])
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(is_finite=is_finite)
        assert ours.scale == theirs.get_scale()


def test_it_goes_on_where_it_was_saved():
    scale, other = LossScale(1024.0), LossScale()
    for _ in range(GROWTH_STEPS - 1):
        scale.update(is_finite=True)

    other.load(scale.facts())
    other.update(is_finite=True)

    assert other.scale == 2048


def test_it_never_falls_below_one():
    scale = LossScale(1.0)

    scale.update(is_finite=False)

    assert scale.scale == 1.0
