from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.caption_text import CaptionSettings, training_caption
from training.randomness import SampleIdentity

TEXT = "newest, very aesthetic, 1girl, hatsune miku, vocaloid, long hair, smile"
GROUPS = [
    {"group": "period", "tags": ["newest"]},
    {"group": "aesthetic", "tags": ["very aesthetic"]},
    {"group": "character", "tags": ["hatsune miku"]},
    {"group": "general", "tags": ["1girl", "long hair", "smile"]},
]


def caption(text=TEXT, groups=None, *, key="k", global_step=0, **settings):
    identity = SampleIdentity(0, 0, "newest/0000", key)
    return training_caption(
        text, groups, settings=CaptionSettings(**settings), identity=identity, global_step=global_step
    )


@given(text=st.text())
def test_with_everything_off_the_text_passes_verbatim(text):
    assert caption(text) == text


def test_shuffling_keeps_the_tags_and_depends_on_the_sample_only():
    first = caption(shuffle=True, key="a")

    assert sorted(first.split(", ")) == sorted(TEXT.split(", "))
    assert caption(shuffle=True, key="a") == first
    assert len({caption(shuffle=True, key=str(number)) for number in range(30)}) > 25


def test_a_golden_shuffle():
    assert caption("a, b, c, d, e, f", shuffle=True) == "d, a, b, f, e, c"


def test_kept_tags_stand_in_front_in_the_order_of_the_settings():
    for key in "abcdef":
        parts = caption(
            groups=GROUPS, key=key, shuffle=True, keep_first_tags=1, keep_groups=("character", "aesthetic"),
            never_shuffled=("smile",),
        ).split(", ")  # fmt: skip

        assert parts[:4] == ["newest", "hatsune miku", "very aesthetic", "smile"]
        assert sorted(parts) == sorted(TEXT.split(", "))


def test_a_tag_with_a_comma_stays_whole_when_the_groups_know_it():
    groups = [{"group": "general", "tags": ["smile", "hey, listen", "hat"]}]

    for key in "abcdef":
        assert "hey, listen" in caption("smile, hey, listen, hat", groups, key=key, shuffle=True)


def test_tag_dropout_drops_its_share_and_spares_what_is_kept():
    text = ", ".join(f"tag{number}" for number in range(20))

    kept = Counter(
        tag
        for key in range(200)
        for tag in caption(text, key=str(key), tag_dropout_fraction=0.25, keep_first_tags=2).split(", ")
    )

    assert kept["tag0"] == kept["tag1"] == 200
    rest = sum(number for tag, number in kept.items() if tag not in ("tag0", "tag1"))
    assert 0.72 < rest / (200 * 18) < 0.78
    assert caption(text, tag_dropout_fraction=1.0) == ""


def test_caption_dropout_empties_its_share_prefix_included():
    captions = [caption(key=str(key), caption_dropout_fraction=0.1, prefix="photo") for key in range(1000)]

    assert 70 < captions.count("") < 130
    assert set(captions) == {"", f"photo {TEXT}"}


@pytest.mark.parametrize(("global_step", "num_tags"), [(0, 1), (49, 3), (50, 4), (99, 6), (100, 7), (5000, 7)])
def test_warm_up_grows_with_the_global_step(global_step, num_tags):
    text = caption(global_step=global_step, token_warmup_steps=100)

    assert text == ", ".join(TEXT.split(", ")[:num_tags])


def test_warm_up_counts_tags_after_those_kept_and_leaves_short_captions_alone():
    assert caption(token_warmup_steps=100, keep_first_tags=2) == "newest, very aesthetic, 1girl"
    assert caption("a, b", token_warmup_steps=100, token_warmup_min=5) == "a, b"


def test_prefix_and_suffix_are_joined_by_a_space():
    assert caption("a, b", prefix="masterpiece,", suffix="end") == "masterpiece, a, b end"
    assert caption("a, b", prefix="p", suffix="s", shuffle=True, keep_first_tags=2) == "p a, b s"
    assert caption("", prefix="p", suffix="s", shuffle=True) == "p s"


def test_other_separators_and_empty_parts():
    assert caption("a,,b , c", separator=",", shuffle=True, keep_first_tags=9) == "a, b, c"
    assert caption("a | b", separator=" | ", shuffle=True, keep_first_tags=9) == "a | b"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tag_dropout_fraction": 1.1}, "captions.tag_dropout_fraction"),
        ({"caption_dropout_fraction": -0.1}, "captions.caption_dropout_fraction"),
        ({"keep_first_tags": -1}, "captions.keep_first_tags"),
        ({"separator": " "}, "captions.separator"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CaptionSettings(**values)
