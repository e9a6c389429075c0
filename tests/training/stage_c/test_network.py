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
def test_prediction_and_input_gradients_equal_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    ours, inputs = random_network(config), random_inputs(config, height=8, width=12)
    kwargs = {key: value for key, value in config_to_diffusers(config).items() if key != "_class_name"}
    theirs = diffusers.models.StableCascadeUNet(**kwargs).eval()
    theirs.load_state_dict(from_original(ours.state_dict(), "diffusers"))
    for value in inputs.values():
        value.requires_grad_()
    wanted = ("x", "clip_text", "clip_text_pooled", "clip_img")

    mine = ours(**inputs)
    my_gradients = torch.autograd.grad(mine.square().sum(), [inputs[key] for key in wanted])
    other = theirs(
        inputs["x"],
        inputs["r"],
        clip_text_pooled=inputs["clip_text_pooled"],
        clip_text=inputs["clip_text"],
        clip_img=inputs["clip_img"],
        return_dict=False,
    )[0]
    other_gradients = torch.autograd.grad(other.square().sum(), [inputs[key] for key in wanted])

    assert other.std() > 0.05
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    for gradient, other_gradient in zip(my_gradients, other_gradients, strict=True):
        assert other_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, other_gradient, rtol=1e-5, atol=1e-5)


def test_attention_equals_torch_multihead_attention_with_the_same_keys():
    network = random_network(TINY)
    attention = network.down_blocks[0][2].attention.attn
    reference = torch.nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True).eval()
    reference.load_state_dict(attention.state_dict())
    tokens, context = torch.randn(2, 5, 32), torch.randn(2, 9, 32)

    torch.testing.assert_close(attention(tokens, context), reference(tokens, context, context)[0], atol=1e-6, rtol=1e-5)


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
