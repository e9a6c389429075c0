"""Moments of kohya's optimizer under our names: what stacked matrices would have held, exactly."""

import pytest
import torch

from tests.training.kohya.fake_state import make_optimizer, split_attention
from training.kohya.moments import MomentsError, kohya_moments, kohya_order
from training.stage_c.network import StageCConfig, StageCNetwork

TINY = StageCConfig(
    c_cond=8, c_hidden=(8, 8), num_heads=(2, 2), blocks_down=(1, 1), blocks_up=(1, 1), c_clip_text=6,
    c_clip_text_pooled=5, c_clip_img=4,
)  # fmt: skip


def network() -> StageCNetwork:
    torch.manual_seed(0)
    return StageCNetwork(TINY)


def gradients(step: int, ours: StageCNetwork) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) * 1e-3 for name, p in ours.named_parameters()}


def trained_both(optimizer: str, *, num_steps: int = 4):
    """Train our network and its split twin on the same gradients; return both and their optimizers."""
    ours, theirs = network(), split_attention(network())
    own = make_optimizer(optimizer, [{"params": list(ours.parameters())}])
    other = make_optimizer(optimizer, [{"params": list(theirs.parameters())}])
    for step in range(num_steps):
        for name, gradient in gradients(step, ours).items():
            ours.get_parameter(name).grad = gradient.clone()
            block, packed, kind = name.partition("in_proj_")
            if packed:
                for letter, part in zip("qkv", gradient.chunk(3), strict=True):
                    theirs.get_parameter(f"{block}to_{letter}.{kind}").grad = part.clone()
            else:
                theirs.get_parameter(name).grad = gradient.clone()
        own.step()
        other.step()
    return ours, own, theirs, other


def test_the_order_is_that_of_a_network_with_q_k_and_v_apart():
    names = [name for name, _ in network().named_parameters()]
    split = [name for name, _ in split_attention(network()).named_parameters()]
    letters = {1: "to_q", 2: "to_k", 3: "to_v"}

    order = [
        name if not share else name.replace("in_proj_", f"{letters[share]}.") for name, share in kohya_order(names)
    ]

    assert order == split


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_joined_moments_are_those_of_an_optimizer_that_saw_the_stacked_matrix(optimizer):
    ours, own, _, other = trained_both(optimizer)

    found = kohya_moments(other.state_dict(), [dict(ours.named_parameters())], optimizer=optimizer)

    assert found.num_joined == 8  # weight and bias of four blocks
    assert found.step == 4
    assert set(found.slots) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = own.state[parameter]
        assert set(found.slots[name]) == set(expected)
        for slot, value in expected.items():
            # RMS is of the parameter itself, and Adafactor's bound of an update looks at the three together.
            tolerance = {"rtol": 0.1, "atol": 0.0} if slot == "RMS" else {"rtol": 1e-5, "atol": 1e-12}
            torch.testing.assert_close(torch.as_tensor(found.slots[name][slot]), torch.as_tensor(value), **tolerance)


def test_half_precision_moments_become_fp32():
    ours, _, _, other = trained_both("adamw")
    state = other.state_dict()
    for slots in state["state"].values():
        slots["exp_avg"] = slots["exp_avg"].half()

    found = kohya_moments(state, [dict(ours.named_parameters())], optimizer="adamw")

    assert {one["exp_avg"].dtype for one in found.slots.values()} == {torch.float32}


def test_moments_that_a_resume_in_fp16_has_wiped_are_left_behind():
    ours, _, theirs, other = trained_both("adafactor")
    state = other.state_dict()
    number = [name for name, _ in theirs.named_parameters()].index("clip_txt_mapper.weight")
    state["state"][number]["exp_avg_sq_row"].zero_()
    state["state"][number + 1]["exp_avg_sq"].fill_(float("nan"))

    found = kohya_moments(state, [dict(ours.named_parameters())], optimizer="adafactor")

    assert found.wiped == ["clip_txt_mapper.weight", "clip_txt_mapper.bias"]
    assert "clip_txt_mapper.weight" not in found.slots


@pytest.mark.parametrize(
    "wanted, expected",
    [("adamw", "the run's optimizer is 'adamw', but it is adafactor's"), ("prodigy", "'prodigy' are not taken over")],
)
def test_another_optimizer_is_refused(wanted, expected):
    ours, _, _, other = trained_both("adafactor", num_steps=1)

    with pytest.raises(MomentsError, match=expected):
        kohya_moments(other.state_dict(), [dict(ours.named_parameters())], optimizer=wanted)


def test_another_network_is_refused():
    ours, _, _, other = trained_both("adamw", num_steps=1)
    parameters = dict(ours.named_parameters())
    fewer = dict(list(parameters.items())[:-1])
    misshapen = {**parameters, "clf.1.bias": torch.zeros(99)}

    with pytest.raises(MomentsError, match="are expected: another network"):
        kohya_moments(other.state_dict(), [fewer], optimizer="adamw")
    with pytest.raises(MomentsError, match=r"clf.1.bias: exp_avg has shape \[16\], \[99\] is expected"):
        kohya_moments(other.state_dict(), [misshapen], optimizer="adamw")
