"""The stage C network: shapes and counts of the published models, equality with diffusers, dropout, checkpointing."""

import dataclasses

import pytest
import torch

from training.stage_c.blocks import timestep_embedding
from training.stage_c.layouts import from_original
from training.stage_c.network import StageCConfig, StageCNetwork, config_from_state_dict
from training.stage_c.network_config import config_to_diffusers

TINY = StageCConfig(
    c_cond=24,
    c_hidden=(32, 32),
    num_heads=(4, 2),
    blocks_down=(1, 2),
    blocks_up=(2, 1),
    c_clip_text=20,
    c_clip_text_pooled=12,
    c_clip_img=8,
)
CONFIGS = {
    "tiny": TINY,
    "three levels, unequal widths, one switch": StageCConfig(
        c_cond=16,
        c_hidden=(16, 24, 32),
        num_heads=(2, 3, 4),
        blocks_down=(1, 1, 2),
        blocks_up=(2, 1, 1),
        c_clip_text=20,
        c_clip_text_pooled=12,
        c_clip_img=8,
        dropout=(0.1, 0.1, 0.1),
        switch_level=(True, False),
    ),
    "patches of 2, no self attention": dataclasses.replace(TINY, patch_size=2, self_attn=False, c_clip_seq=2),
}


def random_network(config: StageCConfig, *, seed: int = 0) -> StageCNetwork:
    """Return a network in evaluation mode without zero weights: the published start predicts 0 for everything."""
    torch.manual_seed(seed)
    network = StageCNetwork(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def random_inputs(config: StageCConfig, *, height: int = 6, width: int = 10) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": normal(2, config.c_in, height, width),
        "r": torch.tensor([0.13, 0.87]),
        "clip_text": normal(2, 7, config.c_clip_text),
        "clip_text_pooled": normal(2, 1, config.c_clip_text_pooled),
        "clip_img": normal(2, 1, config.c_clip_img),
    }


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [(StageCConfig.large(), 3_589_103_632), (StageCConfig.lite(), 1_030_785_040)],
    ids=["large", "lite"],
)
def test_the_published_models_have_their_published_size(config, num_parameters):
    with torch.device("meta"):
        network = StageCNetwork(config)

    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters
    assert config_from_state_dict(network.state_dict()) == config


def test_keys_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in StageCNetwork(StageCConfig.large()).state_dict().items()}

    assert shapes["clip_txt_pooled_mapper.weight"] == (8192, 1280)
    assert shapes["embedding.1.weight"] == (2048, 16, 1, 1)
    assert shapes["down_blocks.1.69.depthwise.weight"] == (2048, 1, 3, 3)
    assert shapes["down_blocks.0.0.channelwise.2.gamma"] == (1, 1, 1, 8192)
    assert shapes["down_blocks.0.1.mapper_crp.weight"] == (4096, 64)
    assert shapes["down_blocks.0.2.attention.attn.in_proj_weight"] == (6144, 2048)
    assert shapes["down_blocks.0.2.attention.attn.out_proj.bias"] == (2048,)
    assert shapes["down_blocks.0.2.kv_mapper.1.weight"] == (2048, 2048)
    assert shapes["down_downscalers.1.1.blocks.0.weight"] == (2048, 2048, 1, 1)
    assert shapes["up_upscalers.0.1.blocks.1.weight"] == (2048, 2048, 1, 1)
    assert shapes["up_blocks.1.0.channelwise.0.weight"] == (8192, 4096)
    assert shapes["up_blocks.0.0.channelwise.0.weight"] == (8192, 2048)
    assert shapes["clf.1.weight"] == (16, 2048, 1, 1)
    assert sum("depthwise.weight" in key for key in shapes) == 64


@pytest.mark.parametrize("name", CONFIGS)
def test_prediction_and_all_gradients_equal_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    ours, inputs = random_network(config), random_inputs(config, height=8, width=12)
    kwargs = {key: value for key, value in config_to_diffusers(config).items() if key != "_class_name"}
    theirs = diffusers.models.StableCascadeUNet(**kwargs).eval()
    theirs.load_state_dict(from_original(ours.state_dict(), "diffusers"))
    mine, others = ({key: value.clone().requires_grad_() for key, value in inputs.items()} for _ in range(2))

    prediction = ours(**mine)
    prediction.square().sum().backward()
    other = theirs(
        others["x"],
        others["r"],
        clip_text_pooled=others["clip_text_pooled"],
        clip_text=others["clip_text"],
        clip_img=others["clip_img"],
        return_dict=False,
    )[0]
    other.square().sum().backward()

    assert other.std() > 0.05
    torch.testing.assert_close(prediction, other, rtol=0, atol=1e-5)
    # A gradient has its parameter's shape: what renames and cuts weights for diffusers does the same to gradients.
    gradients = from_original({key: value.grad for key, value in ours.named_parameters()}, "diffusers")
    expected = {key: value.grad for key, value in theirs.named_parameters()}
    assert gradients.keys() == expected.keys() and all(gradient.any() for gradient in gradients.values())
    gradients |= {key: mine[key].grad for key in ("x", "clip_text", "clip_text_pooled", "clip_img")}
    expected |= {key: others[key].grad for key in ("x", "clip_text", "clip_text_pooled", "clip_img")}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in gradients.items():  # those of a key's bias are 0 but for rounding: softmax ignores it
        scale = torch.maximum(expected[key].abs().max(), 0.01 * largest)
        torch.testing.assert_close(gradient / scale, expected[key] / scale, rtol=0, atol=2e-5, msg=key)


def test_attention_equals_torch_multihead_attention_with_the_same_keys():
    network = random_network(TINY)
    attention = network.down_blocks[0][2].attention.attn
    reference = torch.nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True).eval()
    reference.load_state_dict(attention.state_dict())
    tokens, context = torch.randn(2, 5, 32), torch.randn(2, 9, 32)

    torch.testing.assert_close(attention(tokens, context), reference(tokens, context, context)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("place", ["probabilities", "output", "none"])
def test_dropout_of_attention_acts_where_it_is_named(place):
    network = random_network(TINY)
    network.set_dropout(0.5, attention=place)
    attention = network.down_blocks[0][2].attention.attn
    tokens, context = torch.randn(2, 6, 32), torch.randn(2, 9, 32)
    plain = attention(tokens, context)

    torch.manual_seed(0)
    dropped = attention.train()(tokens, context)

    if place == "none":
        assert torch.equal(dropped, plain)
    elif place == "output":  # zeros, and the rest twice
        kept = dropped != 0
        assert 0.3 < kept.float().mean() < 0.7
        torch.testing.assert_close(dropped[kept], 2 * plain[kept])
    else:
        assert (dropped != 0).all() and not torch.allclose(dropped, plain)


def test_dropout_acts_in_training_mode_only():
    network, inputs = random_network(TINY), random_inputs(TINY)

    assert torch.equal(network(**inputs), network(**inputs))
    network.train()
    assert not torch.equal(network(**inputs), network(**inputs))
    for block in network.modules():
        if isinstance(block, torch.nn.Dropout):
            block.p = 0.0
    assert not torch.equal(network(**inputs), network(**inputs))  # the attention probabilities are dropped as well


def test_gradient_checkpointing_changes_no_gradient_even_with_dropout():
    gradients = []
    for is_checkpointed in (False, True):
        network, inputs = random_network(TINY).train(), random_inputs(TINY)
        if is_checkpointed:
            network.enable_gradient_checkpointing()
        torch.manual_seed(5)
        network(**inputs).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})

    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_without_image_input_the_image_mapper_weight_gets_an_exact_zero_gradient():
    network, inputs = random_network(TINY), random_inputs(TINY)

    network(**{**inputs, "clip_img": None}).square().mean().backward()

    assert torch.count_nonzero(network.clip_img_mapper.weight.grad) == 0
    assert torch.count_nonzero(network.clip_img_mapper.bias.grad) > 0


def test_the_fresh_network_predicts_zero_and_its_mappers_do_nothing():
    torch.manual_seed(0)
    network = StageCNetwork(TINY).eval()

    assert torch.count_nonzero(network(**random_inputs(TINY))) == 0
    assert torch.count_nonzero(network.down_blocks[0][1].mapper_sca.weight) == 0
    assert network.clip_txt_mapper.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_the_embedding_of_zero_is_zeros_then_ones():
    embedding = timestep_embedding(torch.tensor([0.0, 0.5]), 64)

    assert torch.equal(embedding[0], torch.cat([torch.zeros(32), torch.ones(32)]))
    assert embedding[1, 0] == pytest.approx(torch.sin(torch.tensor(5000.0)).item(), abs=1e-4)
    assert embedding[1, 31] == pytest.approx(torch.sin(torch.tensor(0.5)).item(), abs=1e-5)


def relative_error(values, exact):
    return ((values.float() - exact).square().sum() / exact.square().sum()).sqrt().item()


def test_under_autocast_what_runs_between_blocks_is_fp32_and_so_more_exact():
    config = dataclasses.replace(TINY, c_hidden=(64, 64), num_heads=(4, 4), blocks_down=(3, 9), blocks_up=(9, 3))
    network, inputs = random_network(config), random_inputs(config)
    formats = set()
    for block in network.iter_blocks():
        block.register_forward_hook(lambda _module, _inputs, output: formats.add(output.dtype))

    def run(residual_dtype, *, autocast=True):
        network.residual_dtype = residual_dtype
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            prediction = network(**inputs)
        prediction.float().square().sum().backward()
        return prediction.detach(), torch.cat([each.grad.flatten() for each in network.parameters()])

    exact, exact_gradient = run(None, autocast=False)
    formats.clear()
    ours, our_gradient = run(None)
    assert formats == {torch.float32}
    rounded, rounded_gradient = run(torch.bfloat16)

    assert relative_error(ours, exact) < 0.75 * relative_error(rounded, exact)
    assert relative_error(our_gradient, exact_gradient) < 0.75 * relative_error(rounded_gradient, exact_gradient)


def test_without_autocast_the_format_between_blocks_is_that_of_the_weights():
    network, inputs = random_network(TINY).to(torch.bfloat16), random_inputs(TINY)
    formats = set()
    for block in network.iter_blocks():
        block.register_forward_hook(lambda _module, _inputs, output: formats.add(output.dtype))

    network(**inputs)

    assert formats == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_network_runs_in_bfloat16_weights_and_under_autocast(dtype):
    inputs = random_inputs(TINY)
    exact = random_network(TINY)(**inputs)
    network = random_network(TINY).to(dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        prediction = network(**inputs)

    assert (prediction.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_narrow_noise_level_is_refused():
    network, inputs = random_network(TINY), random_inputs(TINY)

    with pytest.raises(ValueError, match=r"r must be float32, got torch\.bfloat16"):
        network(**{**inputs, "r": inputs["r"].bfloat16()})


def test_a_config_whose_parts_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_heads has 1 entries but c_hidden has 2"):
        StageCConfig(num_heads=(32,))
    with pytest.raises(ValueError, match="2048 is not divisible by num_heads 30"):
        StageCConfig(num_heads=(32, 30))
    with pytest.raises(ValueError, match="32 is not a multiple of 64"):
        config_from_state_dict(random_network(TINY).state_dict())
