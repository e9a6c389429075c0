"""How often what is shown, against brute force."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.dreambooth.packing.turns import balanced_repeats, class_turns


@settings(max_examples=300, deadline=None)
@given(num_images=st.integers(1, 200), num_showings=st.integers(1, 60))
def test_every_epoch_has_exactly_as_many_class_images_as_pictures(num_images, num_showings):
    turns = class_turns(num_images, num_showings)

    every = turns[0].every
    shown = Counter()
    for epoch in range(every):
        of_epoch = {n: turn.repeats for n, turn in enumerate(turns) if epoch % turn.every == turn.offset}
        assert sum(of_epoch.values()) == num_showings
        assert max(of_epoch.values()) - min(of_epoch.values()) <= 1
        shown.update(of_epoch)
    assert len(turns) == len(shown) == num_images
    assert {turn.every for turn in turns} == {every} and (every - 1) * num_showings < num_images
    assert max(shown.values()) - min(shown.values()) <= 1


@pytest.mark.parametrize(("per_image", "pictures", "repeats"), product((1, 2, 5, 10), (1, 7, 20), (1,)))
def test_so_many_for_each_picture_take_so_many_epochs(per_image, pictures, repeats):
    turns = class_turns(per_image * pictures, pictures * repeats)

    assert {(turn.every, turn.repeats) for turn in turns} == {(per_image, 1)}
    assert [turn.offset for turn in turns] == [n // pictures for n in range(per_image * pictures)]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.integers(1, 60), min_size=1, max_size=5))
def test_balanced_concepts_are_as_near_to_the_largest_as_whole_repeats_allow(num_pictures):
    repeats = balanced_repeats(num_pictures)

    most = max(num_pictures.values())
    for name, number in num_pictures.items():

        def apart(times, number=number):
            return max(times * number / most, most / (times * number))

        assert apart(repeats[name]) == min(apart(times) for times in range(1, 2 * most + 2))
        assert apart(repeats[name]) <= 2**0.5 + 1e-9
        assert repeats[name] == 1 or number < most
