"""Write a tagger, an aesthetic classifier and a quality head with random weights, in the real file formats.

    wd-tagger/          model.onnx and selected_tags.csv, as a WD tagger v3
    aesthetic-shadow/   a transformers ViT image classifier with the labels hq and lq
    clip/               a transformers CLIP model with a 512-d projection
    aes-b32.pth         the head on its image embeddings

What they say about a picture means nothing, but it differs from picture to picture: last layers are scaled on made-up
pictures so that every tier can occur. Same seed, same files.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning.torch_models import quiet_transformers

TAGGER_SIDE = 64
_GRID = 8
_RATINGS = ("general", "sensitive", "questionable", "explicit")
_GENERAL = """
1girl solo long_hair looking_at_viewer blush smile short_hair open_mouth multiple_girls simple_background blue_eyes
shirt blonde_hair skirt brown_hair black_hair hair_ornament red_eyes gloves 1boy long_sleeves white_background hat
dress thighhighs holding bow ribbon animal_ears 2girls hair_between_eyes bare_shoulders twintails brown_eyes sitting
jewelry very_long_hair closed_mouth school_uniform green_eyes blue_hair standing purple_eyes collarbone monochrome
tail jacket full_body swimsuit closed_eyes hair_ribbon white_shirt yellow_eyes ponytail upper_body pink_hair weapon
purple_hair braid flower comic white_hair ahoge hair_bow greyscale male_focus :d heart sidelocks short_sleeves bikini
multiple_boys sky hairband boots pantyhose sweat bangs pleated_skirt red_hair grey_hair parted_lips multicolored_hair
hood earrings day lying open_clothes japanese_clothes detached_sleeves cowboy_shot frills tears glasses shoes outdoors
sword 2boys dark_skin blurry necktie horns fang cloud serafuku signature shorts wings apron pants choker black_gloves
puffy_sleeves wet belt socks water elbow_gloves black_skirt hairclip fingerless_gloves miniskirt teeth tongue
pointy_ears hand_up one_eye_closed two-tone_hair tree indoors rabbit_ears from_behind black_footwear night kimono bed
scarf grin sleeveless armor grass cape midriff leaf chibi :o dated table sparkle from_above blunt_bangs tongue_out
sunlight book star_(sky) window crop_top one-piece_swimsuit bag hoodie petals looking_back ocean off_shoulder
black_dress food 3girls blurry_background no_humans gradient_background cat_ears depth_of_field wind building rose
mask beach moon ^_^ o_o @_@ >_< ;_; |_| dutch_angle border white_dress fox_ears headphones scenery mountain cityscape
starry_sky feathers snow fire umbrella flower_field pillow cup cellphone guitar microphone bridge train_station rain
lantern butterfly bird dog cat wolf
"""
_CHARACTERS = """
hatsune_miku hakurei_reimu kirisame_marisa remilia_scarlet flandre_scarlet izayoi_sakuya konpaku_youmu cirno
artoria_pendragon_(fate) saber_(fate) rin_tohsaka jeanne_d'arc_alter_(fate) nero_claudius_(fate) kagamine_rin
megurine_luka kaname_madoka akemi_homura souryuu_asuka_langley ayanami_rei suzumiya_haruhi nagato_yuki
shimakaze_(kancolle) kongou_(kancolle) hibiki_(kancolle) 2b_(nier:automata) link princess_zelda
lumine_(genshin_impact) ganyu_(genshin_impact) raiden_shogun_(genshin_impact) tamamo_no_mae_(swimsuit_lancer)_(fate)
d.va_(overwatch)
"""


def make_captioning_models(folder: Path, *, seed: int) -> dict[str, Path]:
    """Write the models into `folder` and return where they are: wd, aesthetic, clip, head.

    A few seconds, less than 5 MB. Needs torch, transformers and onnx.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clip = make_clip(folder / "clip", seed=seed)
    return {
        "wd": make_tagger(folder / "wd-tagger", seed=seed),
        "aesthetic": make_aesthetic(folder / "aesthetic-shadow", seed=seed),
        "clip": clip,
        "head": make_head(folder / "aes-b32.pth", clip, seed=seed),
    }


def make_tagger(folder: Path, *, seed: int) -> Path:
    """Write model.onnx (input N x 64 x 64 x 3 float32 BGR 0 … 255, output probabilities) and selected_tags.csv.

    The network averages the picture on an 8 x 8 grid and projects the colours; a bias keeps most tags away.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    names = [
        *((name, 9, 4.0, 0.0) for name in _RATINGS),
        *((name, 0, 6.0, -9.0) for name in _GENERAL.split()),
        *((name, 4, 6.0, -10.0) for name in _CHARACTERS.split()),
    ]
    generator = np.random.default_rng(seed)
    num_features = 3 * _GRID * _GRID
    gains = np.array([gain for _, _, gain, _ in names])
    # Neighbouring cells look alike, so a random projection adds up to more than its independent parts.
    weights = generator.standard_normal((num_features, len(names))) * gains / np.sqrt(num_features) * 1.5
    biases = np.array([bias for *_, bias in names])
    side = TAGGER_SIDE // _GRID
    constants = {
        "scale": np.float32(1 / 127.5),
        "one": np.float32(1),
        "flat": np.array([0, num_features], dtype=np.int64),
        "weights": weights.astype(np.float32),
        "biases": biases.astype(np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["input"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["nchw", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["centred"]),
        helper.make_node("AveragePool", ["centred"], ["grid"], kernel_shape=[side, side], strides=[side, side]),
        helper.make_node("Reshape", ["grid", "flat"], ["features"]),
        helper.make_node("MatMul", ["features", "weights"], ["products"]),
        helper.make_node("Add", ["products", "biases"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "wd_tagger_demo",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch_size", TAGGER_SIDE, TAGGER_SIDE, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch_size", len(names)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["tag_id", "name", "category", "count"])
        writer.writerows(
            [number, name, category, 1_000_000 - number] for number, (name, category, *_) in enumerate(names)
        )
    return folder


def make_aesthetic(folder: Path, *, seed: int) -> Path:
    """Write a tiny ViTForImageClassification and its preprocessor_config.json (mean and std of aesthetic-shadow-v2)."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16,
        id2label={0: "hq", 1: "lq"}, label2id={"hq": 0, "lq": 1}, initializer_range=0.2,
    )  # fmt: skip
    mean, std = [0.65463551, 0.60715182, 0.61108185], [0.32903292, 0.32726001, 0.31909652]
    processor = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_processor_type": "ViTImageProcessor",
        "image_mean": mean, "image_std": std, "resample": 2, "rescale_factor": 1 / 255,
        "size": {"height": 64, "width": 64},
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = ViTForImageClassification(config).eval()
        pixels = _pictures(64, mean=mean, std=std, seed=seed)
        logits = model(pixel_values=pixels).logits
        _spread(model.classifier, logits[:, :1] - logits[:, 1:], width=1.5, columns=(0, 1))
    with quiet_transformers():
        model.save_pretrained(folder)
    _write_processor(folder, processor)
    return folder


def make_clip(folder: Path, *, seed: int) -> Path:
    """Write a tiny CLIPModel with projection_dim 512 and CLIP's own preprocessor_config.json."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shared, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**shared, "image_size": 224, "patch_size": 32},
        projection_dim=512,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in model.vision_model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
    with quiet_transformers():
        model.save_pretrained(folder)
    _write_processor(
        folder,
        {
            "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD,
            "resample": 3, "size": 224,
        },
    )  # fmt: skip
    return folder


def make_head(path: Path, clip: Path, *, seed: int) -> Path:
    """Write the head's state dict (fc1, fc2, fc3), its last layer scaled so that scores spread over 0 … 1."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 1)
        layers = [torch.nn.Linear(512, 256), torch.nn.Linear(256, 128), torch.nn.Linear(128, 1)]
        with quiet_transformers() as transformers:
            vision = transformers.CLIPVisionModelWithProjection.from_pretrained(clip).eval()
        embeds = vision(pixel_values=_pictures(224, mean=_CLIP_MEAN, std=_CLIP_STD, seed=seed)).image_embeds
        hidden = embeds / embeds.norm(dim=-1, keepdim=True)
        hidden = layers[1](layers[0](hidden).relu()).relu()
        _spread(layers[2], layers[2](hidden), width=3.0, columns=(0,))
    state = {f"fc{n}.{name}": value for n, layer in enumerate(layers, 1) for name, value in layer.state_dict().items()}
    torch.save(state, path)
    return path


_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def _spread(layer: Any, outputs: Any, *, width: float, columns: tuple[int, ...]) -> None:
    """Scale a last layer so that `outputs`, which it gave (or the difference of two), get mean 0 and std `width`."""
    factor = width / float(outputs.std())
    shift = float(outputs.mean()) * factor
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)
    layer.bias[columns[0]] -= shift


def _pictures(side: int, *, mean: list[float], std: list[float], seed: int) -> Any:
    """Return (24, 3, side, side) float32 normalised pictures: smooth patches of colour with some grain."""
    import torch

    generator = np.random.default_rng(seed)
    batch = []
    for _ in range(24):
        cells = int(generator.integers(2, 9))
        colours = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
        level, contrast = generator.uniform(60, 200), generator.uniform(0.2, 1.0)
        grain = generator.normal(0, generator.uniform(0, 20), smooth.shape)
        batch.append(np.clip((smooth - 128) * contrast + level + grain, 0, 255) / 255)
    return torch.from_numpy(((np.stack(batch) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))


def _write_processor(folder: Path, values: dict[str, Any]) -> None:
    import json

    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
