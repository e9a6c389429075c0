import colorsys

import numpy as np
import pytest

from training.loading.colour import ColourJitter, jittered
from training.randomness import SampleIdentity

WHO = SampleIdentity(seed=1, epoch=0, chunk="c", key="k")
PIXELS = np.random.default_rng(0).integers(30, 200, (8, 10, 3), dtype=np.uint8)


def drawn():
    return WHO.generator("colour").uniform(-1, 1, 4)


def test_brightness_multiplies_all_colours():
    factor = 1 + 0.3 * drawn()[0]

    result = jittered(PIXELS, ColourJitter(brightness=0.3), identity=WHO)

    assert np.abs(result - np.clip(PIXELS * factor, 0, 255)).max() <= 1


def test_contrast_moves_colours_from_or_to_the_mean_grey():
    factor = 1 + 0.5 * drawn()[1]
    grey = round(float((PIXELS @ [0.299, 0.587, 0.114]).mean()))

    result = jittered(PIXELS, ColourJitter(contrast=0.5), identity=WHO)

    assert np.abs(result - np.clip(grey + (PIXELS.astype(float) - grey) * factor, 0, 255)).max() <= 2


def test_saturation_moves_colours_from_or_to_their_own_grey():
    factor = 1 + 0.5 * drawn()[2]
    grey = (PIXELS @ [0.299, 0.587, 0.114])[..., None]

    result = jittered(PIXELS, ColourJitter(saturation=0.5), identity=WHO)

    assert np.abs(result - np.clip(grey + (PIXELS - grey) * factor, 0, 255)).max() <= 2


def test_hue_turns_colours_around_the_circle():
    turn = 0.4 * drawn()[3]

    result = jittered(PIXELS, ColourJitter(hue=0.4), identity=WHO)

    for before, after in zip(PIXELS.reshape(-1, 3) / 255, result.reshape(-1, 3) / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert np.abs(np.array(expected) - after).max() < 0.05


def test_a_showing_is_jittered_the_same_every_time_and_another_one_differently():
    jitter = ColourJitter(0.2, 0.2, 0.2, 0.1)
    other = SampleIdentity(seed=1, epoch=0, chunk="c", key="k", occurrence=1)

    assert np.array_equal(jittered(PIXELS, jitter, identity=WHO), jittered(PIXELS, jitter, identity=WHO))
    assert not np.array_equal(jittered(PIXELS, jitter, identity=WHO), jittered(PIXELS, jitter, identity=other))
    assert not ColourJitter().is_on


@pytest.mark.parametrize("name, value", [("brightness", 1.1), ("contrast", -0.1), ("hue", 0.6)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"colour_jitter.{name}"):
        ColourJitter(**{name: value})
