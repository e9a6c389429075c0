"""From a file's bytes to what each network is shown, against arithmetic written out here: no code of ours, no Pillow
filter, no OpenCV, no torchvision. Files: half transparent, palette, grey with alpha, wide, tall, one pixel, huge.

Pillow rounds the weights of a filter to 8 bits after the point and the picture after each of its two passes: a level
of 255 may be another one.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning.decode import ImageTask, prepare_image
from captioning.registry import PLUGINS
from captioning.scorers import open_nsfw

LINEAR_HEAD = Path(__file__).parent / "data" / "laion" / "sa_0_4_vit_l_14_linear.pth"
SIDE = 32
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHADOW_MEAN, SHADOW_STD = (0.65463551, 0.60715182, 0.61108185), (0.32903292, 0.32726001, 0.31909652)


# --- the files, and their colours on white by hand ---


def colours(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(x / 5), np.cos((x + 2 * y) / 9), np.sin(y / 4) * np.cos(x / 7)]
    return np.stack([127.5 + 127 * wave for wave in waves], axis=-1).round().astype(np.uint8)


def on_white(rgb, alpha):
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def half_transparent():
    rgb = colours(75, 52)
    alpha = np.linspace(0, 255, 75).round().astype(np.uint8)[None].repeat(52, axis=0)
    return Image.fromarray(np.dstack([rgb, alpha])), on_white(rgb, alpha), {}


def grey_with_alpha():
    grey = colours(40, 61)[..., 0]
    alpha = np.linspace(255, 10, 61).round().astype(np.uint8)[:, None].repeat(40, axis=1)
    return Image.fromarray(np.dstack([grey, alpha])), on_white(np.dstack([grey] * 3), alpha), {}


def palette():
    places = (np.arange(50 * 44).reshape(44, 50) // 7 % 4).astype(np.uint8)
    table = np.array([[250, 10, 30], [0, 0, 0], [10, 200, 90], [20, 40, 240]], dtype=np.uint8)
    image = Image.fromarray(places)
    image.putpalette(table.tobytes())
    table[1] = 255  # the transparent one
    return image, table[places].astype(float), {"transparency": 1}


def opaque(width, height):
    return Image.fromarray(colours(width, height)), colours(width, height).astype(float), {}


FILES = {
    "half_transparent": half_transparent,
    "grey_with_alpha": grey_with_alpha,
    "palette": palette,
    "wide": lambda: opaque(301, 37),
    "tall": lambda: opaque(21, 160),
    "tiny": lambda: opaque(1, 1),
    "small": lambda: opaque(13, 9),
    "huge": lambda: opaque(1600, 1201),
}


@pytest.fixture(scope="module", params=FILES)
def picture_file(request, tmp_path_factory):
    """A file and its pixels on white, (H, W, 3) float64."""
    image, pixels, options = FILES[request.param]()
    path = tmp_path_factory.mktemp("files") / f"{request.param}.png"
    image.save(path, compress_level=0, **options)
    return path, pixels.round()


# --- resizing by hand ---


def triangle(x):
    return np.clip(1 - np.abs(x), 0, None)


def cubic(x, a=-0.5):
    """Keys, 1981."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def lanczos(x):
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def weights(size, length, kernel):
    """(length, size): the kernel, widened by how much the picture shrinks, around each new pixel's centre."""
    shrink = max(size / length, 1)
    centres = (np.arange(length) + 0.5) * size / length
    values = kernel((np.arange(size) + 0.5 - centres[:, None]) / shrink)
    return values / values.sum(axis=1, keepdims=True)


def resized(pixels, width, height, kernel):
    for axis, length in ((1, width), (0, height)):
        lines = np.tensordot(weights(pixels.shape[axis], length, kernel), pixels, axes=(1, axis))
        pixels = np.clip(np.round(np.moveaxis(lines, 0, axis)), 0, 255)
    return pixels


def area(pixels, length):
    """Means over equal stretches: differences of the integral of the picture."""
    for axis in (0, 1):
        lines = np.moveaxis(pixels, axis, 0)
        integral = np.concatenate([np.zeros_like(lines[:1]), np.cumsum(lines, axis=0)]).reshape(len(lines) + 1, -1)
        edges = np.linspace(0, len(lines), length + 1)
        sums = np.stack([np.interp(edges, np.arange(len(lines) + 1), column) for column in integral.T], axis=1)
        means = np.diff(sums, axis=0) * length / len(lines)
        pixels = np.moveaxis(means.reshape(length, *lines.shape[1:]), 0, axis)
    return np.round(pixels)


def white_square(pixels):
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.full((side, side, 3), 255.0)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def wd_demo(pixels):
    return resized(white_square(pixels), SIDE, SIDE, cubic)[..., ::-1]


def wd_kohya(pixels):
    square = white_square(pixels)
    return (area(square, SIDE) if len(square) > SIDE else resized(square, SIDE, SIDE, lanczos))[..., ::-1]


def wd_tag_editor(pixels):
    height, width, _ = pixels.shape
    longest = max(width, height)
    inner = resized(pixels, max(width * SIDE // longest, 1), max(height * SIDE // longest, 1), lanczos)
    top, left = (SIDE - inner.shape[0]) // 2, (SIDE - inner.shape[1]) // 2
    rows = np.clip(np.arange(SIDE) - top, 0, inner.shape[0] - 1)
    columns = np.clip(np.arange(SIDE) - left, 0, inner.shape[1] - 1)
    return inner[rows][:, columns][..., ::-1]


def pixai(pixels):
    return resized(pixels, SIDE, SIDE, triangle).transpose(2, 0, 1) / 127.5 - 1


def tag_mapping(pixels):
    return wd_demo(pixels).transpose(2, 0, 1) / 127.5 - 1


def deepdanbooru_on_black(pixels):
    height, width, _ = pixels.shape
    scale = SIDE / max(width, height)
    inner = resized(pixels, max(int(width * scale), 1), max(int(height * scale), 1), cubic)
    square = np.zeros((SIDE, SIDE, 3))
    top, left = (SIDE - inner.shape[0]) // 2, (SIDE - inner.shape[1]) // 2
    square[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return square / 255


def deepghs(pixels):
    return (resized(pixels, SIDE, SIDE, cubic).transpose(2, 0, 1) / 255 - 0.5) / 0.5


def aesthetic_shadow(pixels):
    squashed = resized(pixels, 64, 64, triangle) / 255
    return ((squashed - SHADOW_MEAN) / SHADOW_STD).transpose(2, 0, 1)


def clip(pixels, *, side=SIDE, is_openai=False):
    height, width, _ = pixels.shape
    shorter = min(width, height)
    sides = [side if it == shorter else int(side * it / shorter) for it in (width, height)]
    image = resized(pixels, *sides, cubic)
    rests = (image.shape[1] - side, image.shape[0] - side)
    left, top = (round(rest / 2) if is_openai else rest // 2 for rest in rests)
    image = image[top : top + side, left : left + side] / 255
    return ((image - OPENAI_MEAN) / OPENAI_STD).transpose(2, 0, 1)


def clip_224(pixels):
    return clip(pixels, side=224)


def clip_of_openai(pixels):
    return clip(pixels, is_openai=True)


def nsfw(pixels):
    """RGB before the JPEG in between."""
    return resized(pixels, 256, 256, triangle)[16:240, 16:240].astype(np.uint8)


# --- what our plug-ins show their networks ---

LABELS = ["worst", "low", "normal", "good", "great", "best", "masterpiece"]
LEVEL, HALVES, OF_1 = 1.01, 1.01 / 127.5, 1.01 / 255
"""A level of 255 in the numbers that a network sees."""
CASES = {
    "wd demo": ("wd_tagger", {"preprocessing": "demo"}, wd_demo, LEVEL),
    "wd kohya": ("wd_tagger", {"preprocessing": "kohya"}, wd_kohya, LEVEL),
    "wd tag_editor": ("wd_tagger", {"preprocessing": "tag_editor"}, wd_tag_editor, LEVEL),
    "pixai": ("channel_first_tagger", {"preprocessing": "pixai"}, pixai, HALVES),
    "tag_mapping": ("channel_first_tagger", {"preprocessing": "tag_mapping"}, tag_mapping, HALVES),
    "deepdanbooru imgutils": ("deepdanbooru", {"preprocessing": "imgutils"}, deepdanbooru_on_black, OF_1),
    "anime_aesthetic": ("anime_aesthetic", {"score": "mean"}, deepghs, HALVES),
    "style_age": ("style_age", {}, deepghs, HALVES),
    "aesthetic_shadow": ("aesthetic_shadow", {}, aesthetic_shadow, OF_1 / min(SHADOW_STD)),
    "aes_b32": ("aes_b32", {}, clip_224, OF_1 / min(OPENAI_STD)),
    "laion_aesthetic": ("laion_aesthetic", {"clip_crop": "openai"}, clip_of_openai, OF_1 / min(OPENAI_STD)),
}


def write_model(kind, folder, make_onnx):
    """Write an ONNX model of 32 pixels in the files of its kind."""
    layout = "nhwc" if kind in ("wd_tagger", "deepdanbooru") else "nchw"
    make_onnx(folder / "model.onnx", np.full((3, 7), 1e-4), side=SIDE, layout=layout, is_sigmoid=layout == "nchw")
    rows = ["tag_id,name,category,count", *(f"{n},tag_{n},0,5" for n in range(7))]
    (folder / "selected_tags.csv").write_text("\n".join(rows))
    (folder / "tags.txt").write_text("\n".join(rows[1:]))
    labels = [f"19{n}0s" for n in range(3, 10)] if kind == "style_age" else LABELS
    (folder / "meta.json").write_text(json.dumps({"labels": labels}))
    return {"model": str(folder)}


def prepared(path, preparer):
    prepared = prepare_image(ImageTask("k", path, path.stat().st_size, {"m": preparer}))
    assert prepared.status == "ok"
    return prepared.pixels["m"][None]


def shown_by(model, path):
    """Let the model look at the file and return what its network was shown."""
    if hasattr(model, "backbone"):
        model = model.backbone.load(device="cpu")
    if hasattr(model, "_processor"):  # a network of torch, which is given just this
        return model._processor.normalise(prepared(path, model.preparer))[0]
    session = model.session if hasattr(model, "session") else model._session
    shown, run = [], session.run
    session.run = lambda batch: (shown.append(batch), run(batch))[1]
    (row,) = model.predict(prepared(path, model.preparer))
    assert row["status"] == "ok" and shown[0].dtype == np.float32
    return shown[0][0]


@pytest.mark.parametrize("case", CASES)
def test_a_network_is_shown_the_files_pixels_as_worked_out_by_hand(
    tmp_path, make_onnx, demo_models, clip_768, picture_file, case
):
    path, pixels = picture_file
    kind, values, by_hand, level = CASES[case]
    tables = {
        "aesthetic_shadow": {"model": demo_models["aesthetic"]},
        "aes_b32": {"clip": demo_models["clip"], "head": demo_models["head"]},
        "laion_aesthetic": {"clip": clip_768, "head": LINEAR_HEAD},
    }
    files = tables.get(kind) or write_model(kind, tmp_path, make_onnx)
    plugin = PLUGINS[kind]
    settings = plugin.Settings(kind=kind, **{key: str(value) for key, value in files.items()}, **values)

    shown = shown_by(plugin.load(settings, device="cpu"), path)

    expected = by_hand(pixels)
    assert shown.shape == expected.shape
    np.testing.assert_allclose(shown, expected, atol=level)
    assert np.abs(shown - expected).mean() < level / 4


def test_open_nsfw_is_shown_the_files_pixels_but_for_its_jpeg(tmp_path, make_onnx, picture_file):
    path, pixels = picture_file
    make_onnx(tmp_path / "nsfw.onnx", np.full((3, 2), 1e-3), side=224, names=("input:0", "outputs"))
    model = open_nsfw.load(open_nsfw.Settings(kind="open_nsfw", model=str(tmp_path / "nsfw.onnx")), device="cpu")

    shown = shown_by(model, path)

    buffer = io.BytesIO()
    Image.fromarray(nsfw(pixels)).save(buffer, "JPEG", quality=75, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer)).astype(float)[..., ::-1] - [104, 117, 123]
    assert np.abs(shown - expected).mean() < 0.5
    np.testing.assert_allclose(shown.mean(axis=(0, 1)), expected.mean(axis=(0, 1)), atol=0.2)
