"""Toy Stable Diffusion models that can be taught something, pictures of two concepts, and a staged run on them.

The VAE is made by hand: a latent is the mean colour of its 8x8 pixels, and decoding paints it. Text encoders are CLIP
of toy size with words far apart. The UNet is random until `teach_colours` has taught it, in seconds, to draw real
pictures in the colour that the prompt names. All of it has the true classes and layouts. For tests and benches.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from scripts.tiny_run import PICTURES, TinyRun
from sharding.images import decode_rgb

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

Family = Literal["sd1", "sdxl"]
SIDE = 64
"""Pixels of a picture's side."""
COLOURS = {"grey": (1.0, 1.0, 1.0), "red": (1.0, 0.25, 0.25), "green": (0.25, 1.0, 0.25), "blue": (0.25, 0.25, 1.0)}
"""What a picture's brightness is multiplied by in each channel."""
CONCEPTS = {"ada": "red", "bob": "blue"}
"""Names that the models do not know, and the colour of their pictures."""
CLASS = "person"
WORDS = ("tree", "house", "river", "street", "garden", "window", "mountain", "table")
"""Of captions, one for each picture. To the models they mean nothing, as names do."""
_SCALES: dict[Family, float] = {"sd1": 0.18215, "sdxl": 0.13025}
_NUM_TAUGHT = 64
"""Pictures that the model knows before it is trained; concepts have others."""
_WIDTH = 64
"""Of text states."""
_LARGE = 50.0
"""A group norm over (c, -c, _LARGE, -_LARGE) divides c by a number that hardly depends on it."""
_TEXT = {
    "vocab_size": 49408, "hidden_size": _WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 1, "max_position_embeddings": 77, "projection_dim": _WIDTH, "bos_token_id": 49406,
    "eos_token_id": 49407,
}  # fmt: skip
_UNETS: dict[Family, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 8, "cross_attention_dim": _WIDTH},
    "sdxl": {
        "attention_head_dim": [1, 1], "cross_attention_dim": 3 * _WIDTH, "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2], "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": _WIDTH + 6 * 8,
    },
}  # fmt: skip


# --- the models ---


def make_sd(folder: Path, family: Family, *, num_steps: int = 0, seed: int = 0) -> Path:
    """Write a diffusers folder and return it. num_steps: of `teach_colours`; 0 leaves the UNet random."""
    from diffusers import DDPMScheduler

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, unet, texts = _vae(family), _unet(family), _texts(family)
        if num_steps:
            teach_colours(unet, texts[0], num_steps=num_steps)
    parts = {"vae": vae, "unet": unet, **dict(zip(("text_encoder", "text_encoder_2"), texts, strict=False))}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDPMScheduler(**schedule, prediction_type="v_prediction" if num_steps else "epsilon").save_pretrained(
        folder / "scheduler"
    )
    return folder


def _unet(family: Family) -> "UNet2DConditionModel":
    from diffusers import UNet2DConditionModel

    attended = [family == "sd1", family == "sdxl"]
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)),
        **_UNETS[family],
    )


@torch.no_grad()
def _texts(family: Family) -> "list[CLIPTextModel]":
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    texts = [CLIPTextModel(CLIPTextConfig(**_TEXT, hidden_act="quick_gelu"))]
    if family == "sdxl":
        wider = {"hidden_size": 2 * _WIDTH, "num_attention_heads": 2, "hidden_act": "gelu"}  # diffusers goes by width
        texts.append(CLIPTextModelWithProjection(CLIPTextConfig(**_TEXT | wider)))
    for text in texts:
        words = text.get_input_embeddings().weight
        nn.init.normal_(words)
        # With these at zero, the states of all that follows the words hold the words: one of 77 would be hard to find.
        nn.init.zeros_(words[_TEXT["bos_token_id"] :])
        nn.init.zeros_(next(tensor for name, tensor in text.named_parameters() if "position_embedding" in name))
    return texts


@torch.no_grad()
def _vae(family: Family) -> "AutoencoderKL":
    """Return a VAE whose layers hand the colours on: a latent's first three channels are twice its cell's mean."""
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    scale = _SCALES[family]
    vae = AutoencoderKL(
        block_out_channels=(128, 32, 32, 128), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=1, scaling_factor=scale,
    )  # fmt: skip
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            _set(module.conv2, torch.zeros(0, 0))
            if module.conv_shortcut is not None:
                _set(module.conv_shortcut, torch.eye(4))
        elif isinstance(module, Attention):
            _set(module.to_out[0], torch.zeros(0, 0))
        elif isinstance(module, Upsample2D):
            _set(module.conv, torch.eye(4))
        elif isinstance(module, Downsample2D):
            _set(module.conv, torch.zeros(0, 0))
            for channel in range(4):
                module.conv.weight[channel, channel, :2, :2] = 1 / 4
    signed = torch.zeros(12, 3)
    large = torch.zeros(12)
    for channel in range(3):
        signed[4 * channel, channel], signed[4 * channel + 1, channel] = 1, -1
        large[4 * channel + 2], large[4 * channel + 3] = _LARGE, -_LARGE
    per_latent = 2 / scale
    encoder, decoder = vae.encoder, vae.decoder
    _set(encoder.conv_in, torch.eye(3))
    _set(encoder.down_blocks[3].resnets[0].conv_shortcut, signed, large)
    # silu(c) - silu(-c) is c
    _set(encoder.conv_out, torch.cat([signed.T, signed.T.mean(dim=0, keepdim=True)]) * per_latent)
    encoder.conv_out.bias[4:] = -20.0  # the logarithm of the variance
    _set(vae.quant_conv, torch.eye(8))
    _set(vae.post_quant_conv, torch.eye(4))
    _set(decoder.conv_in, torch.eye(3) / per_latent)
    _set(decoder.up_blocks[3].resnets[0].conv_shortcut, signed, large)
    _set(decoder.conv_out, signed.T)
    for norm in (encoder.conv_norm_out, decoder.conv_norm_out):
        norm.weight.fill_(_LARGE / 2**0.5)
    return vae


def _set(layer: nn.Conv2d | nn.Linear, matrix: Tensor, bias: Tensor | None = None) -> None:
    """Make a layer hand channels on as the matrix says, a convolution by its middle; all else in it is zero."""
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    rows, columns = matrix.shape
    centre = layer.weight.shape[-1] // 2
    middle = layer.weight if layer.weight.dim() == 2 else layer.weight[..., centre, centre]
    middle[:rows, :columns] = matrix
    if bias is not None:
        layer.bias[: len(bias)] = bias


def teach_colours(unet: "UNet2DConditionModel", text: "CLIPTextModel", *, num_steps: int) -> None:
    """Teach SD 1 in a plain loop to draw real pictures in the colour that a prompt names; other words mean nothing."""
    from training.dreambooth.diffusion.schedule import NoiseSchedule
    from training.stage_c.text import load_tokenizer

    schedule, tokenizer = NoiseSchedule.make(zero_terminal_snr=False), load_tokenizer("builtin")
    words = [f"{colour} picture" for colour in COLOURS]
    with torch.no_grad():
        unknown = ["", CLASS, *CONCEPTS, *(f"{CLASS}, {word}" for word in WORDS)]
        ids = tokenizer([*words, *unknown], padding="max_length", max_length=77, return_tensors="pt").input_ids
        states = text.eval()(ids).last_hidden_state
    brightness = torch.stack([_cells(picture) for picture in pictures()[:_NUM_TAUGHT]])
    tints = torch.tensor([*COLOURS.values(), *[COLOURS["grey"]] * len(unknown)])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    for _ in range(num_steps):
        number = torch.randint(len(tints), (16,))
        painted = brightness[torch.randint(len(brightness), (16,))] * tints[number][:, :, None, None]
        latents = 2 * (2 * painted - 1)
        latents = torch.cat([latents, latents.mean(dim=1, keepdim=True)], dim=1)
        t, noise = torch.randint(1000, (16,)), torch.randn_like(latents)
        predicted = unet(schedule.noised(latents, noise, t), t, states[number]).sample
        loss = (predicted - schedule.target("v_prediction", latents, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()


def _cells(picture: Image.Image) -> Tensor:
    """Return the brightness (1, 8, 8) of a picture's cells, 0 to 1."""
    grey = picture.convert("L").resize((SIDE // 8, SIDE // 8), Image.Resampling.BOX)
    return torch.tensor(list(grey.tobytes()), dtype=torch.float32).reshape(1, SIDE // 8, SIDE // 8) / 255


# --- pictures and the run ---


@cache
def pictures() -> tuple[Image.Image, ...]:
    """Return the demo's real pictures, always in the same order, as squares of SIDE pixels."""
    found = []
    for path in sorted(path for path in PICTURES.rglob("*.*") if path.suffix in (".jpg", ".png", ".webp")):
        try:
            picture = decode_rgb(path.read_bytes(), min_side=SIDE)
        except ValueError:
            continue  # the demo brings broken files on purpose
        short = min(picture.size)
        left, top = (picture.width - short) // 2, (picture.height - short) // 2
        found.append(picture.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + short, top + short)))
    return tuple(found)


def tinted(picture: Image.Image, colour: str) -> Image.Image:
    """Return a picture's brightness in a colour."""
    grey = picture.convert("L")
    return Image.merge("RGB", [grey.point([round(value * part) for value in range(256)]) for part in COLOURS[colour]])


def write_pictures(folder: Path, *, num_pictures: int) -> None:
    """Write pictures of each concept in its colour into folders of its name, with a caption beside each."""
    for place, (name, colour) in enumerate(CONCEPTS.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures()[_NUM_TAUGHT + place * num_pictures :][:num_pictures]):
            tinted(picture, colour).save(folder / name / f"{number:02d}.png")
            (folder / name / f"{number:02d}.txt").write_text(f"{CLASS}, {WORDS[number % len(WORDS)]}", encoding="utf-8")


RUN = """\
name = "tiny-dreambooth"
device = "cpu"
[data]
workspace = "{root}/workspace"
chunks = ["concepts/0*"]
workers = 0
[batch]
batch_size = 8
micro_batch_size = 4
[buckets]
resolution = [64, 64]
family = "ratios"
ratios = [1]
min_side = 64
[optimizer]
learning_rate = 1e-3
[schedule]
name = "constant"
[precision]
autocast = "no"
[save]
every_steps = 3
export_dtype = "fp32"
[trackers]
tensorboard = false
trace = true
[dreambooth]
model = "{model}"
concepts = "{root}/concepts.toml"
sanity_prompt = "green picture"
"""
CONCEPT = """\
[[concepts]]
name = "{name}"
folder = "{root}/{name}"
token = "{name}"
[concepts.class_images]
prompt = "[filewords]"
token = "{class_token}"
images_per_image = {num_class_images}
guidance = 1
steps = 4
[concepts.sample]
prompt = "{name}"
seed = 5
guidance = 1
steps = 6
"""
TWO_STAGES = (
    'dreambooth.train=["unet", "text_encoder"]',
    'dreambooth.stages=[{name="with-text", epochs=3, text_encoder_learning_rate=1e-4}, {name="unet-only", epochs=4, '
    'train=["unet"], learning_rate=5e-4, prior_weight=0.5}]',
)
"""Overrides: stages of both parts, then of the UNet alone."""


def make_run(
    root: Path, model: Path, *overrides: str, names: Sequence[str] = tuple(CONCEPTS), num_pictures: int = 6,
    num_class_images: int = 1,
) -> TinyRun:  # fmt: skip
    """Write pictures, concepts.toml and run.toml into `root`; return the run in `root/run`, not yet packed."""
    root.mkdir(parents=True, exist_ok=True)
    write_pictures(root, num_pictures=num_pictures)
    facts = {"root": root, "class_token": CLASS, "num_class_images": num_class_images}
    (root / "concepts.toml").write_text("".join(CONCEPT.format(name=name, **facts) for name in names), encoding="utf-8")
    (root / "run.toml").write_text(RUN.format(root=root, model=model), encoding="utf-8")
    return TinyRun(root / "run", list(overrides), config=root / "run.toml")
