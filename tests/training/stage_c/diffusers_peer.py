"""What diffusers makes of an export, as tensors: loads its folders as a user would, and runs them on fixed inputs.

Imports nothing of ours, so that an interpreter with another diffusers can run it:
python diffusers_peer.py EXPORT OUT.safetensors
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

PROMPT, NEGATIVE = "1girl, solo, looking at viewer, very aesthetic", "worst quality, sketch"
STEPS, GUIDANCE, SIZE = 3, 8.0, 256


def fixed(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fixed_inputs(config: dict[str, int]) -> dict[str, Tensor]:
    """Return inputs of a StableCascadeUNet. config: its widths."""
    return {
        "sample": fixed(2, config["in_channels"], 6, 5, seed=1),
        "timestep_ratio": torch.tensor([0.25, 0.9]),
        "clip_text_pooled": fixed(2, 1, config["clip_text_pooled_in_channels"], seed=2),
        "clip_text": fixed(2, 77, config["clip_text_in_channels"], seed=3),
        "clip_img": fixed(2, 1, config["clip_image_in_channels"], seed=4),
    }


def make_decoder(folder: Path, tokenizer: Path, *, pooled_width: int) -> None:
    """Write a tiny decoder pipeline with diffusers' own classes, laid out as the published one."""
    import json
    import shutil

    from diffusers import DDPMWuerstchenScheduler, StableCascadeUNet
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(5)
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=32, block_out_channels=(16, 32), num_attention_heads=(-1, 4),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1), block_types_per_layer=(blocks, (*blocks, "SDCascadeAttnBlock")),
        clip_text_pooled_in_channels=pooled_width, effnet_in_channels=16, pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",), switch_level=None,
    ).save_pretrained(folder / "decoder")  # fmt: skip
    # Not the class's default scale, 0.3764: a folder that is built anew instead of copied would have that.
    PaellaVQModel(
        levels=2, bottleneck_blocks=1, embed_dim=16, latent_channels=4, num_vq_embeddings=32, scale_factor=0.43
    ).save_pretrained(folder / "vqgan")
    DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, projection_dim=pooled_width,
        vocab_size=49_408, bos_token_id=49_406, eos_token_id=49_407, pad_token_id=49_407,
    )  # fmt: skip
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder")
    shutil.copytree(tokenizer, folder / "tokenizer")
    index = {
        "_class_name": "StableCascadeDecoderPipeline",
        "_diffusers_version": "0.27.0.dev0",
        "decoder": ["diffusers", "StableCascadeUNet"],
        "latent_dim_scale": 10.67,
        "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
        "vqgan": ["wuerstchen", "PaellaVQModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: other\nprior:\n- somebody/else\n---\n# Base\n")


@torch.no_grad()
def outputs(export: Path, *, decoder: str = "diffusers-decoder") -> dict[str, Tensor]:
    """Return what the exported network, prior and whole cascade give."""
    from diffusers import StableCascadeCombinedPipeline, StableCascadePriorPipeline, StableCascadeUNet

    result = {}
    unet, info = StableCascadeUNet.from_pretrained(export / "diffusers", subfolder="prior", output_loading_info=True)
    assert not any(info.values()), info
    single = StableCascadeUNet.from_single_file(
        str(export / "stage_c.safetensors"), config=str(export / "stage_c_config")
    )
    for name, one in (("from_pretrained", unet), ("from_single_file", single)):
        result[name] = one.eval()(**fixed_inputs(dict(one.config)), return_dict=False)[0]

    prior = StableCascadePriorPipeline.from_pretrained(export / "diffusers")
    prior.set_progress_bar_config(disable=True)
    made = prior(
        PROMPT, negative_prompt=NEGATIVE, width=SIZE, height=SIZE, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(6),
    )  # fmt: skip
    result["prior"] = made.image_embeddings
    result["text"], result["pooled"] = made.prompt_embeds, made.prompt_embeds_pooled

    # The published example, word for word but for sizes and steps.
    pipe = StableCascadeCombinedPipeline.from_pretrained(str(export / decoder), torch_dtype=torch.float32)
    pipe = pipe.to("cpu", dtype=torch.float32)
    pipe.prior_pipe = pipe.prior_pipe.to("cpu", dtype=torch.float32)
    for part in (pipe.prior_pipe, pipe.decoder_pipe):
        part.set_progress_bar_config(disable=True)
    image = pipe(
        width=SIZE, height=SIZE, prompt=PROMPT, negative_prompt=NEGATIVE, decoder_guidance_scale=1.0,
        prior_guidance_scale=GUIDANCE, prior_num_inference_steps=STEPS, output_type="np", num_inference_steps=10,
        generator=torch.Generator().manual_seed(6),
    ).images[0]  # fmt: skip
    result["image"] = torch.from_numpy(image)
    return result


if __name__ == "__main__":
    from safetensors.torch import save_file

    made = outputs(Path(sys.argv[1]))
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, sys.argv[2])
