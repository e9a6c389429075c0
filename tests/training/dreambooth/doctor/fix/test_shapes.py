"""Ratios, pans and the upscaler."""

import numpy as np
import onnx
import pytest
from PIL import Image, ImageChops

from tests.training.dreambooth.doctor.fix.pictures import painting
from training.config.concepts import ConceptConfig
from training.dreambooth.doctor.boxes import Box
from training.dreambooth.doctor.examination import examine
from training.dreambooth.doctor.fix.copies import write_copies
from training.dreambooth.doctor.fix.ratios import crop_to, nearest_ratio
from training.dreambooth.doctor.fix.stitch import find_pans, stitch
from training.dreambooth.doctor.fix.upscale import Upscaler
from training.dreambooth.doctor.rules import load_rules


@pytest.mark.parametrize(
    ("size", "name", "cut"),
    [
        ((1080, 1080), "1:1", (1080, 1080)),
        ((945, 1080), "7:8", (945, 1080)),
        ((810, 1080), "3:4", (810, 1080)),
        ((675, 1080), "5:8", (675, 1080)),
        ((540, 1080), "1:2", (540, 1080)),
        ((1080, 945), "8:7", (1080, 945)),
        ((1920, 1080), "8:5", (1728, 1080)),
        ((1000, 1080), "7:8", (945, 1080)),
        ((300, 1200), "1:2", (300, 600)),
    ],
)
def test_the_wikis_ratios_are_met_exactly(size, name, cut):
    ratio = nearest_ratio(*size)

    assert (ratio.name, (ratio.width, ratio.height)) == (name, cut)
    assert ratio.loss == pytest.approx(1 - cut[0] * cut[1] / (size[0] * size[1]))


def test_a_crop_that_costs_too_much_is_not_made(tmp_path):
    (tmp_path / "set").mkdir()
    painting(200, 800).save(tmp_path / "set" / "tall.png")
    concept = ConceptConfig(name="a", folder=tmp_path / "set", prompt="x")

    report = write_copies(examine([concept], load_rules()), tmp_path / "out")

    assert Image.open(tmp_path / "out" / "a" / "tall.png").size == (200, 800)
    assert "not cropped: 1:2 would cost 50%" in report.text()


def test_the_crop_keeps_detail_and_figures_and_else_the_middle():
    plain = Image.new("RGB", (400, 200), "grey")
    right = plain.copy()
    right.paste(painting(100, 200), (300, 0))
    ratio = nearest_ratio(200, 200)

    assert ImageChops.difference(crop_to(right, ratio), right.crop((200, 0, 400, 200))).getbbox() is None
    both = right.copy()
    both.paste(painting(100, 200, seed=1), (0, 0))
    kept = crop_to(both, ratio, keep=[Box("person", 0.0, 0.0, 0.25, 1.0)])
    assert ImageChops.difference(kept, both.crop((0, 0, 200, 200))).getbbox() is None
    striped = Image.fromarray(np.tile(np.arange(400, dtype=np.uint8), (200, 1))).convert("RGB")
    assert np.asarray(crop_to(striped, ratio))[0, 0, 0] == 100


def pan_of(whole, height, tops, *, noise=4):
    rng = np.random.default_rng(0)
    frames = []
    for top in tops:
        frame = np.asarray(whole.crop((0, top, whole.width, top + height))).astype(int)
        frames.append(
            Image.fromarray((frame + rng.integers(-noise, noise + 1, frame.shape)).clip(0, 255).astype(np.uint8))
        )
    return frames


def test_frames_of_a_pan_become_the_whole_picture():
    whole = painting(480, 900)
    frames = pan_of(whole, 400, [0, 170, 333, 500])
    frames.insert(2, painting(480, 400, seed=9))

    (pan,) = find_pans(frames)

    assert (pan.frames, pan.places) == ((0, 1, 3, 4), ((0, 0), (0, 170), (0, 333), (0, 500)))
    seen = np.abs(np.asarray(stitch(frames, pan)).astype(int) - np.asarray(whole)).mean()
    assert seen < 3


def test_the_seam_is_a_gradient():
    whole = painting(400, 600)
    upper, lower = pan_of(whole, 400, [0, 200], noise=0)
    lighter = lower.point(lambda level: min(255, level + 8))

    (pan,) = find_pans([upper, lighter])
    rows = np.asarray(stitch([upper, lighter], pan)).astype(int).mean(axis=(1, 2)) - np.asarray(whole).mean(axis=(1, 2))

    assert abs(np.diff(rows)).max() < 1.0
    assert rows[100] < 0.5
    assert rows[-50] > 5


def test_frames_that_are_the_same_or_have_nothing_in_common_are_no_pan():
    frame = painting(300, 200)

    assert find_pans([frame, frame.copy(), painting(300, 200, seed=1), Image.new("RGB", (300, 200))]) == []


def test_a_pan_takes_the_place_of_its_frames(tmp_path):
    (tmp_path / "set").mkdir()
    for number, frame in enumerate(pan_of(painting(400, 600), 400, [0, 200])):
        frame.save(tmp_path / "set" / f"{number}.png")
        (tmp_path / "set" / f"{number}.txt").write_text(f"nagisa, frame {number}")
    concept = ConceptConfig(name="a", folder=tmp_path / "set")

    write_copies(examine([concept], load_rules(overrides=["fix.stitch=true"])), tmp_path / "out")

    assert {path.name for path in (tmp_path / "out" / "a").iterdir()} == {"0-stitched.png", "0-stitched.txt"}
    assert (tmp_path / "out" / "a" / "0-stitched.txt").read_text() == "nagisa, frame 0"


def upscaler_file(path, *, times=4, side="side", dtype=onnx.TensorProto.FLOAT, channels=3):
    """A network that repeats pixels, as an R-ESRGAN would take and return them."""
    make = onnx.helper
    shape = [1, channels, side, side if isinstance(side, int) else "side2"]
    graph = make.make_graph(
        [make.make_node("Resize", ["picture", "", "scales"], ["large"], mode="nearest")],
        "repeat",
        [make.make_tensor_value_info("picture", dtype, shape)],
        [make.make_tensor_value_info("large", dtype, None)],
        [make.make_tensor("scales", onnx.TensorProto.FLOAT, [4], [1.0, 1.0, times, times])],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("factor", [1, 1.5, 2])
@pytest.mark.parametrize("side", ["side", 64])
def test_tiles_leave_no_seam(tmp_path, factor, side):
    image = painting(330, 290)

    large = Upscaler(upscaler_file(tmp_path / "x4.onnx", side=side)).enlarge(image, factor)

    repeated = image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)
    expected = repeated.resize((round(330 * factor), round(290 * factor)), Image.Resampling.LANCZOS)
    assert large.size == expected.size
    difference = np.abs(np.asarray(large).astype(int) - np.asarray(expected))
    assert difference[8:-8, 8:-8].max() <= 2


def test_upscaling_comes_first_and_the_result_is_brought_down(tmp_path):
    (tmp_path / "set").mkdir()
    painting(300, 410).save(tmp_path / "set" / "a.png")
    rules = load_rules(overrides=["fix.upscale=2", "fix.long_side=600"])
    concept = ConceptConfig(name="a", folder=tmp_path / "set", prompt="x")

    report = write_copies(
        examine([concept], rules), tmp_path / "out", upscaler=Upscaler(upscaler_file(tmp_path / "x4.onnx"))
    )

    assert Image.open(tmp_path / "out" / "a" / "a.png").size == (450, 600)
    assert report.copied[0].steps == ("upscaled 2 times", "cropped to 3:4 (-2.4%)", "600x800 brought down to 450x600")


def test_a_file_that_is_no_upscaler_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("no network")
    for path, error, said in (
        (tmp_path / "gone.onnx", FileNotFoundError, "no such file"),
        (tmp_path / "text.onnx", ValueError, "not a network"),
        (upscaler_file(tmp_path / "small.onnx", side=16), ValueError, "tiles of 16"),
    ):
        with pytest.raises(error, match=said):
            Upscaler(path)
    shrinks = Upscaler(upscaler_file(tmp_path / "half.onnx", times=0.5, side=64))
    with pytest.raises(ValueError, match="an upscaler returns"):
        shrinks.enlarge(painting(100, 100), 1)
