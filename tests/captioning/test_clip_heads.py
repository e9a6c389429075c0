"""Heads on CLIP: against torch modules by the published definitions, and LAION's real head on real embeddings.

The linear head and the ten embeddings (mean ViT-L/14 embedding of the pictures that people rated 0 … 9) are LAION's,
see data/laion/LICENSE. The improved predictor is 3.7 MB: give its folder in CHUNKLINE_LAION_HEADS to test it.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from captioning.annotate import annotate
from captioning.plugin import ModelError
from captioning.preparers import CentreCrop
from captioning.registry import PLUGINS
from captioning.scorers import aes_b32, laion_aesthetic
from captioning.scorers.clip import Clip, ClipSpec, sigmoid, unit_length
from captioning.torch_models import read_tensors

torch = pytest.importorskip("torch")
nn = torch.nn
LAION = Path(__file__).parent / "data" / "laion"
# Made with torch alone: nn.Linear (and for the MLP nn.Sequential) .load_state_dict(file), applied to the embeddings.
LINEAR_SCORES = [-2.45791, -0.13786, 1.89511, 3.58493, 5.09973, 6.4701, 7.78699, 9.048, 10.22641, 11.30443]
MLP_SCORES = [1.65548, 2.35927, 3.06982, 3.67245, 4.23801, 4.70102, 5.07305, 5.36536, 5.57666, 5.74676]


class Normalization(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(768))
        self.register_buffer("variance", torch.ones(768))

    def forward(self, x):
        return (x - self.mean) / self.variance.sqrt()


class Nsfw(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Normalization()
        self.linear_1, self.linear_2 = nn.Linear(768, 64), nn.Linear(64, 512)
        self.linear_3, self.linear_4 = nn.Linear(512, 256), nn.Linear(256, 1)

    def forward(self, x):
        x = self.norm(x)
        for layer in (self.linear_1, self.linear_2, self.linear_3):
            x = layer(x).relu()
        return self.linear_4(x).sigmoid()


class Layers(nn.Module):
    """A network whose tensors are named layers.N, as LAION's and the waifu-scorer's."""

    def __init__(self, *layers, after=lambda x: x):
        super().__init__()
        self.layers, self.after = nn.Sequential(*layers), after

    def forward(self, x):
        return self.after(self.layers(x))


def waifu_layers():
    layers, last = [], 768
    for width, dropout in ((2048, 0.3), (512, 0.3), (256, 0.2), (128, 0.1)):
        layers += [nn.Linear(last, width), nn.ReLU(), nn.BatchNorm1d(width), nn.Dropout(dropout)]
        last = width
    return [*layers, nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 1)]


def laion_layers():
    return [
        *(nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)),
        *(nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    ]


def make_head(kind, path):
    """Save a head with random weights in its published format and return the module."""
    torch.manual_seed(1)
    module = {
        "laion_aesthetic": lambda: Layers(*laion_layers()),
        "waifu_scorer": lambda: Layers(*waifu_layers(), after=lambda x: x.clamp(0, 10) / 10),
        "clip_nsfw": Nsfw,
    }[kind]()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith(("running_var", "variance")):
                tensor.uniform_(0.0005, 0.002)
            elif tensor.ndim and name.endswith((".mean", "running_mean")):
                tensor.normal_(0, 0.01)
            elif tensor.ndim == 2:
                tensor.mul_(3)
        if kind == "waifu_scorer":
            module.layers[-1].weight.mul_(0.02)
            module.layers[-1].bias.fill_(5)
    torch.save(module.state_dict(), path)
    return module.eval()


def settings_of(kind, head, clip, **values):
    return PLUGINS[kind].Settings(kind=kind, head=str(head), clip=str(clip), **values)


@pytest.mark.parametrize("kind", ["laion_aesthetic", "waifu_scorer", "clip_nsfw"])
def test_a_head_is_the_published_network_on_transformers_embedding(lab, tmp_path, clip_768, picture, kind):
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    module = make_head(kind, tmp_path / "head.pth")
    images = [picture(*size) for size in ((64, 64), (300, 40), (40, 301), (1, 1), (900, 700), (33, 32))]
    clip = CLIPVisionModelWithProjection.from_pretrained(clip_768).eval()
    with torch.no_grad():
        pixels = CLIPImageProcessor.from_pretrained(clip_768)(images, return_tensors="pt")["pixel_values"]
        embeds = clip(pixel_values=pixels).image_embeds
        expected = module(embeds / embeds.norm(dim=-1, keepdim=True)).ravel().numpy()
    head = PLUGINS[kind].load(settings_of(kind, tmp_path / "head.pth", clip_768), device="cpu")
    eye = head.backbone.load(device="cpu")

    rows = head.score(eye.embed(np.stack([eye.preparer.prepare(image) for image in images])))

    np.testing.assert_allclose([row["score"] for row in rows], expected, atol=2e-5)
    assert np.ptp(expected) > 0.02


def test_safetensors_and_pth_give_the_same_scores(tmp_path, clip_768):
    from safetensors.torch import save_file

    make_head("waifu_scorer", tmp_path / "head.pth")
    state = torch.load(tmp_path / "head.pth", weights_only=True)
    save_file(state, tmp_path / "head.safetensors")
    features = np.random.default_rng(0).standard_normal((4, 768), dtype=np.float32)

    rows = [
        PLUGINS["waifu_scorer"].load(settings_of("waifu_scorer", path, clip_768), device="cpu").score(features)
        for path in (tmp_path / "head.pth", tmp_path / "head.safetensors")
    ]

    assert rows[0] == rows[1]


def test_laions_linear_head_scores_real_embeddings_as_published(clip_768):
    head = settings_of("laion_aesthetic", LAION / "sa_0_4_vit_l_14_linear.pth", clip_768)
    embeddings = np.load(LAION / "vit_l_14_embeddings.npy")

    rows = laion_aesthetic.load(head, device="cpu").score(embeddings * 9)  # any length: it is divided by its own

    scores = [row["score"] for row in rows]
    assert scores == sorted(scores)
    np.testing.assert_allclose(scores, LINEAR_SCORES, atol=1e-4)


@pytest.mark.skipif("CHUNKLINE_LAION_HEADS" not in os.environ, reason="CHUNKLINE_LAION_HEADS names no folder")
def test_laions_improved_predictor_scores_real_embeddings_as_published(clip_768):
    path = Path(os.environ["CHUNKLINE_LAION_HEADS"], "sac+logos+ava1-l14-linearMSE.pth")

    head = laion_aesthetic.load(settings_of("laion_aesthetic", path, clip_768), device="cpu")
    scores = [row["score"] for row in head.score(np.load(LAION / "vit_l_14_embeddings.npy"))]

    assert scores == sorted(scores)
    np.testing.assert_allclose(scores, MLP_SCORES, atol=1e-4)


def test_an_embedding_of_zeros_is_not_divided_by_zero():
    assert unit_length(np.zeros((1, 4), dtype=np.float32)).tolist() == [[0, 0, 0, 0]]
    assert sigmoid(np.array([-1000.0, 0, 1000.0])).tolist() == [0, 0.5, 1]


def test_a_norm_over_a_batch_of_equally_long_embeddings_is_norm_over_its_size(demo_models):
    """Older dataset-helpers: embeds / torch.linalg.norm(embeds) over the whole batch."""
    rows = np.random.default_rng(0).standard_normal((32, 512), dtype=np.float32)
    equally_long = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True) * 10.5)
    state = torch.load(demo_models["head"], weights_only=True)
    hidden = equally_long / torch.linalg.norm(equally_long)
    for name in ("fc1", "fc2"):
        hidden = (hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"]).relu()
    expected = (hidden @ state["fc3.weight"].T + state["fc3.bias"]).sigmoid().ravel()

    def scores(**values):
        settings = settings_of("aes_b32", demo_models["head"], demo_models["clip"], **values)
        return [row["score"] for row in aes_b32.load(settings, device="cpu").score(equally_long.numpy())]

    np.testing.assert_allclose(scores(norm_over=32), expected, atol=1e-6)
    assert np.abs(np.array(scores()) - expected.numpy()).max() > 0.01


@pytest.mark.parametrize(("size", "left"), [((35, 32), 2), ((37, 32), 2), ((33, 32), 0), ((36, 32), 2)])
def test_openais_crop_rounds_the_centre_to_even(picture, size, left):
    """torchvision's CenterCrop: int(round((side - crop) / 2.0))."""
    image = picture(*size)

    ours = CentreCrop(32, 32, "openai").prepare(image)
    floor = CentreCrop(32, 32).prepare(image)

    np.testing.assert_array_equal(ours, np.asarray(image)[:, left : left + 32])
    np.testing.assert_array_equal(floor, np.asarray(image)[:, (size[0] - 32) // 2 :][:, :32])


# --- sharing ---


@pytest.fixture
def l14_models(tmp_path, clip_768):
    """Three heads on one CLIP."""
    tables = {}
    for kind in ("laion_aesthetic", "waifu_scorer", "clip_nsfw"):
        make_head(kind, tmp_path / f"{kind}.pth")
        tables[kind.replace("_", "-")] = {"kind": kind, "clip": str(clip_768), "head": str(tmp_path / f"{kind}.pth")}
    return tables


@pytest.fixture
def embeds(monkeypatch):
    """Count loads of a CLIP, and its calls by the number of images."""
    loads, calls = [], []
    load, embed = ClipSpec.load, Clip.embed
    monkeypatch.setattr(ClipSpec, "load", lambda self, **options: (loads.append(self), load(self, **options))[1])
    monkeypatch.setattr(Clip, "embed", lambda self, batch: (calls.append(len(batch)), embed(self, batch))[1])
    return loads, calls


def test_heads_of_one_clip_share_its_embedding_and_score_as_alone(lab, l14_models, embeds):
    loads, calls = embeds
    lab.keep(lab.save(*(lab.png(40 + n, 50, seed=n) for n in range(5))))
    annotate(lab.annotate_config(l14_models), lab.workspace)
    together = {name: lab.rows(name) for name in l14_models}

    assert (len(loads), calls) == (1, [3, 3])
    for path in lab.workspace.root.glob("annotations/*/part-*"):
        path.unlink()
    for name in l14_models:
        annotate(lab.annotate_config(l14_models), lab.workspace, models=[name])
    assert {name: lab.rows(name) for name in l14_models} == together
    assert len(loads) == 4


def test_another_crop_or_other_files_are_another_backbone(lab, l14_models, embeds, demo_models):
    loads, calls = embeds
    l14_models["waifu-scorer"]["clip_crop"] = "openai"
    l14_models["quality"] = {"kind": "aes_b32", "clip": str(demo_models["clip"]), "head": str(demo_models["head"])}
    lab.keep(lab.save(lab.png(40, 50)))

    report = annotate(lab.annotate_config(l14_models), lab.workspace)

    assert (len(loads), len(calls)) == (3, 3) and report.num_decodes == 1


def test_the_same_clip_in_another_folder_is_the_same_backbone(lab, l14_models, embeds, clip_768, tmp_path):
    shutil.copytree(clip_768, tmp_path / "copy")
    l14_models["clip-nsfw"]["clip"] = str(tmp_path / "copy")
    lab.keep(lab.save(lab.png(40, 50)))

    annotate(lab.annotate_config(l14_models), lab.workspace)

    assert len(embeds[0]) == 1


def test_a_head_added_later_touches_only_itself(lab, l14_models, embeds):
    old = lab.save(lab.png(40, 50, seed=1), lab.png(41, 50, seed=2))
    lab.keep(old)
    annotate(lab.annotate_config(l14_models), lab.workspace, models=["laion-aesthetic"])
    before = lab.rows("laion-aesthetic")
    new = lab.save(lab.png(42, 50, seed=3))

    lab.keep([*old, *new])
    report = annotate(lab.annotate_config(l14_models), lab.workspace)

    assert report.num_rows == {"laion-aesthetic": 1, "waifu-scorer": 3, "clip-nsfw": 3}
    assert report.num_rows_reused == {"laion-aesthetic": 2}
    rows = lab.rows("laion-aesthetic")
    assert {key: rows[key] for key in before} == before and len(rows) == 3


# --- mistakes ---


def test_a_head_on_the_wrong_clip_is_an_error_before_it_is_loaded(lab, tmp_path, demo_models):
    make_head("clip_nsfw", tmp_path / "head.pth")
    tables = {"nsfw": {"kind": "clip_nsfw", "clip": str(demo_models["clip"]), "head": str(tmp_path / "head.pth")}}
    lab.keep(lab.save(lab.png(40, 50)))

    with pytest.raises(ModelError, match=r"annotate\.models\.nsfw: .*projection_dim is 512, the head takes 768"):
        annotate(lab.annotate_config(tables), lab.workspace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 2}, "expected a bicubic resize and a centre crop"),
        ({"do_center_crop": False}, "expected a bicubic resize and a centre crop"),
        ({"do_normalize": False}, "do_normalize is off"),
    ],
)
def test_a_processor_that_is_not_clips_is_an_error(tmp_path, clip_768, change, message):
    shutil.copytree(clip_768, tmp_path / "clip")
    path = tmp_path / "clip" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    head = settings_of("laion_aesthetic", LAION / "sa_0_4_vit_l_14_linear.pth", tmp_path / "clip")

    with pytest.raises(ModelError, match=message):
        laion_aesthetic.load(head, device="cpu").backbone.load(device="cpu")


def test_a_pth_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Evil()}, tmp_path / "head.pth")

    with pytest.raises(ModelError, match="not readable as plain weights"):
        read_tensors(tmp_path / "head.pth", {"weight": (1, 768)})
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_no_tensors_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")

    with pytest.raises(ModelError, match="holds no table of named tensors"):
        read_tensors(tmp_path / "list.pth", {})
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(ModelError, match=f"{name}: not readable"):
            read_tensors(tmp_path / name, {})
