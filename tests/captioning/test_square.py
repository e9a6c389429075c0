"""Squares for the WD taggers as other programs make them: golden values made by OpenCV, not by this code.

The values come from OpenCV 5.0 and numpy, for the picture of conftest.draw:

    image = np.pad(image[:, :, ::-1], ((top, rest_y - top), (left, rest_x - left), (0, 0)), constant_values=255)
    cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA if size > 16 else cv2.INTER_LANCZOS4)
    hashlib.sha256(image.tobytes()).hexdigest()[:16], image[8, 8].tolist()
"""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from captioning.decode import ImageTask, prepare_image
from captioning.taggers import wd
from captioning.taggers.square import OpaquePreparer, SquarePreparer, pad

KOHYA_087 = {
    (97, 61): ("1ce01319775bf550", [133, 144, 90]),
    (61, 97): ("bc717d9ae1cc0835", [118, 115, 127]),
    (640, 480): ("b996689a94f2d224", [135, 128, 128]),
    (3, 900): ("15a3443a7f540269", [253, 253, 253]),
    (2000, 37): ("47a0f819e958c517", [237, 237, 237]),
    (7, 5): ("3d019ad0d5b5f2e4", [23, 19, 52]),
    (16, 16): ("f097fae7f88dd399", [104, 88, 160]),
    (15, 16): ("df33222cdf77db0e", [104, 88, 160]),
    (1, 1): ("ef115a0e0c15cdc4", [0, 0, 0]),
}


@pytest.mark.parametrize("size", KOHYA_087)
def test_kohyas_square_is_opencvs_to_the_last_bit(picture, size):
    pixels = SquarePreparer(16, "kohya_087").prepare(picture(*size))

    assert (hashlib.sha256(pixels.tobytes()).hexdigest()[:16], pixels[8, 8].tolist()) == KOHYA_087[size]


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (15, 16)])
def test_newer_kohya_enlarges_with_pillows_lanczos(picture, size):
    image, longest = np.asarray(picture(*size)), max(size)
    top, left = (longest - size[1]) // 2, (longest - size[0]) // 2
    ends = ((top, longest - size[1] - top), (left, longest - size[0] - left), (0, 0))
    padded = Image.fromarray(np.pad(image, ends, constant_values=255))

    pixels = SquarePreparer(16, "kohya").prepare(picture(*size))

    np.testing.assert_array_equal(pixels, np.asarray(padded.resize((16, 16), Image.LANCZOS))[..., ::-1])


def test_newer_kohya_shrinks_as_the_old_one(picture):
    image = picture(97, 61)

    old, new = (SquarePreparer(16, name).prepare(image) for name in ("kohya_087", "kohya"))

    np.testing.assert_array_equal(old, new)


def test_the_tag_editor_repeats_the_edges_of_the_resized_picture(picture):
    inner = np.asarray(picture(97, 61).resize((16, 10), Image.LANCZOS))[..., ::-1]  # 61 * 16 // 97 = 10

    pixels = SquarePreparer(16, "tag_editor").prepare(picture(97, 61))

    np.testing.assert_array_equal(pixels[3:13], inner)
    assert (pixels[:3] == inner[0]).all() and (pixels[13:] == inner[-1]).all()


@pytest.mark.parametrize("geometry", ["demo", "kohya", "kohya_087", "tag_editor"])
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (4000, 3), (16, 16), (33, 16)])
def test_every_size_becomes_a_square(picture, geometry, size):
    pixels = SquarePreparer(16, geometry).prepare(picture(*size))

    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous


def prepared(path, data, preparer):
    path.write_bytes(data)
    return prepare_image(ImageTask("k", path, len(data), {"wd": preparer})).pixels["wd"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_hidden_colours_show_where_alpha_is_dropped_and_only_there(tmp_path, mode):
    image = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    hidden = np.asarray(image.convert("RGB"))[0, 0, ::-1]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    square = SquarePreparer(16, "kohya_087")

    on_white = prepared(tmp_path / "a.png", buffer.getvalue(), square)
    dropped = prepared(tmp_path / "a.png", buffer.getvalue(), OpaquePreparer(square))

    assert (on_white == 255).all()
    assert (dropped == hidden).all() and not (dropped == 255).all()


def test_dropping_alpha_also_leaves_a_rotated_photo_lying(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture(32, 16).save(buffer, "PNG", exif=exif)
    square = SquarePreparer(32)

    upright = prepared(tmp_path / "a.png", buffer.getvalue(), square)
    lying = prepared(tmp_path / "a.png", buffer.getvalue(), OpaquePreparer(square))

    np.testing.assert_array_equal(lying, square.prepare(picture(32, 16)))
    np.testing.assert_array_equal(upright, square.prepare(picture(32, 16).transpose(Image.Transpose.ROTATE_270)))


def test_an_ordinary_picture_is_not_decoded_twice(tmp_path, lab, monkeypatch):
    preparer = OpaquePreparer(SquarePreparer(16))
    monkeypatch.setattr(Image.Image, "convert", None)

    pixels = preparer.prepare_file(lab.png(20, 20), Image.new("RGB", (20, 20), (1, 2, 3)))

    assert (pixels == (3, 2, 1)).all()


def test_every_way_of_preparing_is_an_identity_of_its_own(demo_models):
    settings = [
        wd.Settings(kind="wd_tagger", model=str(demo_models["wd"]), preprocessing=geometry, alpha=alpha)
        for geometry in ("demo", "kohya", "kohya_087", "tag_editor")
        for alpha in ("white", "dropped")
    ]

    assert len({wd.identify(it).digest for it in settings}) == 8


@pytest.mark.parametrize(("width", "height"), [(17, 4_500), (4_200, 4_300)])
def test_a_tall_picture_in_bands_is_the_same_as_in_one_piece(width, height):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    whole = np.asarray(pad(image).resize((64, 64), Image.Resampling.BICUBIC))[:, :, ::-1]

    assert np.array_equal(SquarePreparer(64).prepare(image), whole)
