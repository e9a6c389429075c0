import pytest
import torch
from torch import nn

from training.config.precision import EmaConfig
from training.ema import Ema, ema_decay, make_ema, weights_to_show
from training.tensor_parts import whole


def make_module():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def drift(module, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


WARMUPS = {
    "simple": ({}, {}),
    "power": ({"gamma": 2.0, "power": 0.75}, {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75}),
}


@pytest.mark.slow  # importing diffusers.training_utils takes 10 seconds
@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("start", [0, 4])
def test_averages_are_those_of_diffusers(warmup, start):
    training_utils = pytest.importorskip("diffusers.training_utils")
    module = make_module()
    ours, theirs = WARMUPS[warmup]
    ema = Ema(dict(module.named_parameters()), decay=0.9, min_decay=0.3, start_step=start, **ours)
    expected = training_utils.EMAModel(module.parameters(), decay=0.9, min_decay=0.3, update_after_step=start, **theirs)

    for step in range(1, 31):
        drift(module, step)
        ema.update(step)
        expected.step(module.parameters())
        assert ema.decay_at(step) == expected.cur_decay_value

    for average, shadow in zip(ema.tensors().values(), expected.shadow_params, strict=True):
        torch.testing.assert_close(average, shadow, rtol=1e-6, atol=1e-7)


def test_the_decay_is_a_function_of_the_step_alone():
    assert [ema_decay(step, decay=0.999) for step in (1, 2, 11)] == [0.0, 2 / 11, 11 / 20]
    assert ema_decay(10**9, decay=0.999) == 0.999


def test_updating_rarely_reaches_as_far_back():
    module = make_module()
    parameters = dict(module.named_parameters())
    often, rarely = Ema(parameters, decay=0.99), Ema(parameters, decay=0.99, update_every=4)
    with torch.no_grad():
        module.weight.zero_()

    for step in range(1001, 1041):
        before = {name: tensor.clone() for name, tensor in rarely.tensors().items()}
        often.update(step)
        rarely.update(step)
        assert (step % 4 == 0) != torch.equal(before["weight"], rarely.tensors()["weight"])

    torch.testing.assert_close(rarely.tensors()["weight"], often.tensors()["weight"], rtol=1e-4, atol=0)


def test_a_saved_average_goes_on_bit_for_bit():
    module = make_module()
    ema = Ema(dict(module.named_parameters()), decay=0.99)
    for step in range(1, 5):
        drift(module, step)
        ema.update(step)
    saved = {name: tensor.clone() for name, tensor in ema.tensors().items()}

    other = Ema(dict(make_module().named_parameters()), decay=0.99)
    other.load(saved)
    other._parameters = ema._parameters
    for step in range(5, 9):
        drift(module, step)
        ema.update(step)
        other.update(step)

    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in ema.tensors().items())


@pytest.mark.parametrize("change", [lambda t: t.pop("bias"), lambda t: t.update(bias=torch.zeros(4))])
def test_an_average_of_other_parameters_is_refused_and_changes_nothing(change):
    ema = Ema(dict(make_module().named_parameters()), decay=0.99)
    tensors = {name: tensor + 1 for name, tensor in ema.tensors().items()}
    change(tensors)
    before = ema.tensors()["weight"].clone()

    with pytest.raises(ValueError, match=r"does not fit the trained parameters: bias \(1\)"):
        ema.load(tensors)

    assert torch.equal(ema.tensors()["weight"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_in_shows_the_average_and_gives_the_weights_back_even_after_an_error(dtype):
    module = make_module().to(dtype)
    module.bias.requires_grad_(False)
    ema = Ema(dict(module.named_parameters()), decay=0.99, device="cpu")
    for step in range(1, 5):
        drift(module, step)
        ema.update(step)
    trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    with pytest.raises(KeyError), ema.swapped_in():
        assert torch.equal(module.weight, ema.tensors()["weight"].to(dtype))
        assert not torch.equal(module.weight, trained["weight"])
        raise KeyError

    assert all(torch.equal(tensor, trained[name]) for name, tensor in module.state_dict().items())
    assert list(ema.tensors()) == ["weight"]
    assert ema.tensors()["weight"].dtype == torch.float32


def test_the_average_of_bf16_weights_moves():
    module = make_module().bfloat16()
    ema = Ema(dict(module.named_parameters()), decay=0.999)
    before = ema.tensors()["weight"].clone()
    with torch.no_grad():
        module.weight += 0.01

    for step in range(10**6, 10**6 + 50):
        ema.update(step)

    assert bool((ema.tensors()["weight"] > before).all())


def test_what_the_config_asks_for_is_made():
    parameters = dict(make_module().named_parameters())

    ema = make_ema(EmaConfig(enabled=True, decay=0.5, warmup="power", update_every=3, device="cpu"), parameters)

    assert make_ema(EmaConfig(), parameters) is None
    assert ema.decay_at(9) == ema_decay(9, decay=0.5, gamma=1.0) ** 3


def test_without_an_average_the_trained_weights_are_shown():
    module = make_module()
    before = module.weight.detach().clone()

    with weights_to_show(torch.optim.SGD(module.parameters()), None):
        assert torch.equal(module.weight, before)


def test_averages_of_sharded_parameters_are_whole_when_saved(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = nn.Parameter(torch.rand(6, 2))
        sharded = nn.Parameter(distribute_tensor(plain.detach(), mesh, [Shard(0)]))
        one, other = Ema({"w": plain}, decay=0.9), Ema({"w": sharded}, decay=0.9)
        one.load({"w": torch.ones(6, 2)})
        other.load({"w": torch.ones(6, 2)})
        one.update(20)
        other.update(20)

        with other.swapped_in():
            assert torch.equal(sharded.full_tensor(), one.tensors()["w"])
        assert torch.equal(whole(other.tensors()["w"]), one.tensors()["w"])
        assert torch.equal(sharded.full_tensor(), plain)
    finally:
        dist.destroy_process_group()
