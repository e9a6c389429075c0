"""How many pictures a concept has, and whether they all show the same face."""

import pytest

from tests.training.dreambooth.doctor.test_captions import concept, rules_found


@pytest.mark.parametrize(
    ("number", "rules"),
    [(1, {"few_images"}), (9, {"few_images"}), (10, set()), (30, set()), (31, {"many_images"})],
)
def test_the_wikis_numbers_of_pictures_are_held(tmp_path, number, rules):
    found = rules_found(concept(tmp_path, [f"gotou hitori, {one}".encode() for one in range(number)]))

    assert {"few_images", "many_images"} & set(found) == rules


def test_one_expression_everywhere_is_told(tmp_path):
    always = concept(tmp_path, [f"gotou hitori, smile, {one}".encode() for one in range(10)], name="a")
    often = concept(
        tmp_path, [f"gotou hitori, {'smile' if one % 2 else 'frown'}".encode() for one in range(10)], name="b"
    )

    found = rules_found(always, often)["one_expression"]

    assert (found.concept, found.number) == ("a", 1.0) and "10 of 10 are 'smile'" in found.text
