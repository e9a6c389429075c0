"""What `diffusers_peer` asks of diffusers, of our own network, and the prior as a loop that is written out here."""

import torch

from tests.training.stage_c.diffusers_peer import GUIDANCE, NEGATIVE, PROMPT, SIZE, STEPS, fixed_inputs
from training.stage_c.given_weights import GivenWeights
from training.stage_c.network_config import config_to_diffusers
from training.stage_c.text import TextConditioner, load_tokenizer, tokenize


@torch.no_grad()
def our_outputs(given: GivenWeights) -> dict[str, torch.Tensor]:
    """The network, and the prior as a plain loop: DDPM steps of the cosine schedule with guidance, noise from torch."""
    network, text_model = given.network.eval(), given.text_model.eval()
    inputs = fixed_inputs(config_to_diffusers(network.config))
    result = {"from_pretrained": network(inputs["sample"], inputs["timestep_ratio"], *states_of(inputs))}
    result["from_single_file"] = result["from_pretrained"]
    windows = tokenize(load_tokenizer("builtin"), [PROMPT, NEGATIVE], max_tokens=75).windows
    text, pooled = TextConditioner(text_model)(windows, True)
    result["text"], result["pooled"] = text[:1], pooled[:1]

    def signal(t: float) -> float:
        angle = torch.tensor((t + 0.008) / 1.008, dtype=torch.float64) * torch.pi / 2
        start = torch.cos(torch.tensor(0.008 / 1.008, dtype=torch.float64) * torch.pi / 2)
        return float(((torch.cos(angle) / start) ** 2).clamp(0.0001, 0.9999))

    generator = torch.Generator().manual_seed(6)
    side = -(-SIZE * 100 // 4267)  # a latent for every 42.67 pixels, rounded up
    x = torch.randn((1, 16, side, side), generator=generator)
    for step in range(STEPS):
        t, next_t = 1 - step / STEPS, 1 - (step + 1) / STEPS
        both = network(x.repeat(2, 1, 1, 1), torch.full((2,), t), text, pooled)
        epsilon = torch.lerp(both[1:], both[:1], GUIDANCE)
        here, there = signal(t), signal(next_t)
        alpha = here / there
        x = (x - (1 - alpha) * epsilon / (1 - here) ** 0.5) / alpha**0.5
        noise = torch.randn(x.shape, generator=generator)
        if step + 1 < STEPS:
            x = x + ((1 - alpha) * (1 - there) / (1 - here)) ** 0.5 * noise
    return {**result, "prior": x}


def states_of(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return inputs["clip_text"], inputs["clip_text_pooled"], inputs["clip_img"]


def assert_same(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    for name, value in ours.items():
        assert torch.allclose(theirs[name], value, rtol=1e-3, atol=1e-4), (name, theirs[name].sub(value).abs().max())
