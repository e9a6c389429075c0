"""Thresholds and their edges."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from captioning.tiers import NO_TIER, passes, tier_numbers

THRESHOLDS = [0.98, 0.9, 0.35, 0.1]


def numbers(*scores: float, comparison: str) -> list[int]:
    return tier_numbers(np.array(scores, dtype=np.float32), THRESHOLDS, comparison=comparison).tolist()


def test_a_score_equal_to_a_threshold_passes_only_when_not_strict():
    assert numbers(0.98, 0.9, 0.35, 0.1, comparison=">") == [1, 2, 3, 4]
    assert numbers(0.98, 0.9, 0.35, 0.1, comparison=">=") == [0, 1, 2, 3]


def test_the_next_float_above_and_below_a_threshold_fall_on_their_sides():
    for number, threshold in enumerate(THRESHOLDS):
        exact = np.float32(threshold)
        above, below = np.nextafter(exact, np.float32(2)), np.nextafter(exact, np.float32(-2))
        for comparison in (">", ">="):
            assert numbers(above, below, comparison=comparison) == [number, number + 1]


def test_a_missing_score_has_no_tier_and_never_the_worst():
    assert numbers(float("nan"), float("inf"), -1.0, comparison=">") == [NO_TIER, NO_TIER, 4]


def test_probabilities_are_compared_in_the_precision_they_are_stored_in():
    values, limits = np.array([0.35, 0.98], dtype=np.float32), np.array([0.35, 0.98], dtype=np.float32)

    assert passes(values, limits, comparison=">=").tolist() == [True, True]
    assert passes(values, limits, comparison=">").tolist() == [False, False]


@given(
    score=st.floats(-1, 2, width=32),
    thresholds=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9, unique=True),
    comparison=st.sampled_from([">", ">="]),
)
def test_a_tier_is_the_first_threshold_passed_in_a_ladder_of_ifs(score, thresholds, comparison):
    descending = sorted(thresholds, reverse=True)
    expected = len(descending)
    for number, threshold in enumerate(descending):
        if score > threshold or (comparison == ">=" and score == threshold):
            expected = number
            break

    found = tier_numbers(np.array([score], dtype=np.float32), descending, comparison=comparison)

    assert found.tolist() == [expected]
