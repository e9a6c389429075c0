import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.config import ConfigError, parse_config
from sharding.schema import TAG_GROUP
from training.caption_parts import known_groups
from training.caption_text import CaptionSettings, training_caption
from training.config.captions import CaptionConfig
from training.randomness import SampleIdentity

TEXT = "newest, very aesthetic, 1girl, hatsune miku, vocaloid, long hair, smile"
GROUPS = [
    {"group": "period", "tags": ["newest"]},
    {"group": "aesthetic", "tags": ["very aesthetic"]},
    {"group": "character", "tags": ["hatsune miku"]},
    {"group": "general", "tags": ["1girl", "long hair", "smile"]},
]

SENTENCE = "A girl with long hair smiles, looking away."
WITH_SENTENCE = {"text": f"{TEXT}, {SENTENCE}", "groups": [*GROUPS, {"group": "sentence", "tags": [SENTENCE]}]}


def caption(text=TEXT, groups=None, *, key="k", epoch=0, global_step=0, **settings):
    identity = SampleIdentity(0, epoch, "newest/0000", key)
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
    assert caption("a, b, c, d, e, f", shuffle=True) == "d, f, a, c, e, b"


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


def test_all_captions_are_empty_every_so_many_epochs_counted_from_1():
    captions = [caption("a, b", epoch=epoch, caption_dropout_every_epochs=3) for epoch in range(7)]

    assert captions == ["a, b", "a, b", "", "a, b", "a, b", "", "a, b"]


def test_a_group_has_its_own_dropout_for_kept_tags_too():
    settings = {
        "shuffle": True, "keep_groups": ("period", "aesthetic"), "tag_dropout_fraction": 0.5,
        "tag_dropout_groups": {"period": 0.1, "character": 0.0},
    }  # fmt: skip

    kept = Counter(tag for key in range(1000) for tag in caption(groups=GROUPS, key=str(key), **settings).split(", "))

    assert kept["hatsune miku"] == kept["very aesthetic"] == 1000
    assert 870 < kept["newest"] < 930
    assert all(440 < kept[tag] < 560 for tag in ("1girl", "vocaloid", "long hair", "smile"))


def test_a_tags_dropout_does_not_depend_on_shuffle_or_on_others_dropout():
    for key in "abcdefgh":
        alone = caption(key=key, tag_dropout_fraction=0.5).split(", ")

        assert sorted(caption(key=key, tag_dropout_fraction=0.5, shuffle=True).split(", ")) == sorted(alone)
        assert set(caption(key=key, tag_dropout_fraction=0.3).split(", ")) >= set(alone)


# --- warm-up by a fraction, marks, lines, wildcards ---


def test_warm_up_by_a_fraction_of_the_run():
    by_fraction = [caption(global_step=it, token_warmup_fraction=0.25, total_steps=403) for it in range(120)]

    assert by_fraction == [caption(global_step=it, token_warmup_steps=100) for it in range(120)]
    with pytest.raises(ValueError, match=r"token_warmup_fraction 0.25 needs schedule.total_steps"):
        CaptionSettings(token_warmup_fraction=0.25)


def test_no_rounding_takes_a_tag_away_in_a_warm_up():
    text = ", ".join(f"tag{number}" for number in range(30))

    for step in range(100):
        assert len(caption(text, global_step=step, token_warmup_steps=100).split(", ")) == 1 + step * 29 // 100


def test_a_warm_up_that_is_over_still_writes_tags_in_the_same_way():
    assert caption("a,b ,c", token_warmup_steps=5, global_step=100) == "a, b, c"


def test_what_stands_before_and_behind_the_marks_stays_there():
    text = "1girl, miku ||| stage, smile, white shirt, ||| best quality, rating: general"
    found = {caption(text, key=str(key), shuffle=True, keep_separator="|||") for key in range(80)}

    assert len(found) == 6
    for one in found:
        assert one.startswith("1girl, miku, ")
        assert one.endswith(", best quality, rating: general")
        assert sorted(one.split(", ")[2:5]) == ["smile", "stage", "white shirt"]


def test_marks_are_never_trained_and_what_they_keep_is_never_dropped():
    settings = {"keep_separator": "|||", "keep_first_tags": 3}

    assert caption("a ||| b, c", **settings) == "a, b, c"
    assert caption("a ||| b, c ||| d ||| e", tag_dropout_fraction=1.0, **settings) == "a, d, e"
    assert caption("||| b, c", tag_dropout_fraction=1.0, **settings) == ""
    assert caption("a ||| b, c, d, e ||| f", token_warmup_steps=9, **settings) == "a, b, f"
    assert caption("a, b, c, d", tag_dropout_fraction=1.0, **settings) == "a, b, c"


def test_tags_joined_by_the_secondary_separator_stay_together():
    text = "1girl, sky;;;cloud ;;; day, outdoors, smile"
    found = {
        caption(text, key=str(key), shuffle=True, tag_dropout_fraction=0.3, secondary_separator=";;;")
        for key in range(300)
    }

    assert {"sky, cloud, day" in one for one in found} == {True, False}
    assert all(("sky" in one) == ("sky, cloud, day" in one) for one in found)
    assert caption(text, secondary_separator=";;;") == "1girl, sky, cloud, day, outdoors, smile"
    assert caption("a;;;b|c", separator="|", secondary_separator=";;;") == "a|b|c"


def test_one_line_is_chosen_by_weight():
    text = " first, line\n\nsecond\nthird \n"

    counts = Counter(
        caption(text, key=str(key), lines="random", line_weights=(2, 1, 1), prefix="p") for key in range(1000)
    )

    assert set(counts) == {"p first, line", "p second", "p third"}
    assert 450 < counts["p first, line"] < 550
    assert caption(text, lines="first") == "first, line"
    assert caption(text) == text
    assert {caption(text, key=str(key), lines="random", line_weights=(0, 1)) for key in range(50)} == {
        "second", "third",
    }  # fmt: skip
    assert caption("\n \n", lines="random") == ""


def test_wildcards_are_drawn_per_showing_and_before_tags_are_split():
    text = "1girl, {red|blue} hat, {sky, cloud|{night|dusk}}"

    found = Counter(caption(text, key=str(key), wildcards=True) for key in range(800))

    assert set(found) == {
        f"1girl, {colour} hat, {sky}" for colour in ("red", "blue") for sky in ("sky, cloud", "night", "dusk")
    }
    assert 150 < found["1girl, red hat, sky, cloud"] < 250
    assert 60 < found["1girl, red hat, dusk"] < 140
    orders = {caption(text, key=str(key), wildcards=True, shuffle=True) for key in range(500)}
    assert any("cloud, 1girl" in one or "sky, 1girl" in one for one in orders)
    assert caption(text) == text


def test_wildcards_in_prefix_and_suffix_do_not_change_those_of_the_caption():
    for key in "abcdef":
        plain = caption("{a|b|c|d|e}", key=key, wildcards=True)

        assert caption("{a|b|c|d|e}", key=key, wildcards=True, prefix="{p|q}", suffix="{{s}}") in (
            f"p {plain} {{s}}",
            f"q {plain} {{s}}",
        )


def test_a_tag_with_wildcards_keeps_its_group_and_stays_whole():
    groups = [
        {"group": "quality", "tags": ["{best|high} quality", "{a, b|c}"]},
        {"group": "general", "tags": ["x, {y, z|w}", "hat"]},
    ]
    text = "hat, x, {y, z|w}, {best|high} quality, {a, b|c}"

    for key in range(60):
        one = caption(text, groups, key=str(key), wildcards=True, shuffle=True, keep_groups=("quality",))

        front = [f"{how} quality, {which}" for how in ("best", "high") for which in ("a, b", "c")]
        assert any(one.startswith(f"{it}, ") for it in front)
        assert "x, y, z" in one or "x, w" in one


# --- sentences ---


def test_sentences_stay_whole_behind_the_tags_unless_a_mix_says_otherwise():
    for key in "abcdef":
        one = caption(**WITH_SENTENCE, key=key, shuffle=True, tag_dropout_fraction=0.5)

        assert one.endswith(SENTENCE)
    dropped = [
        caption(**WITH_SENTENCE, key=str(key), tag_dropout_groups={"sentence": 0.3}).endswith(SENTENCE)
        for key in range(1000)
    ]
    assert 640 < sum(dropped) < 760


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("tags", TEXT),
        ("sentences", SENTENCE),
        ("kept_sentences", f"newest, very aesthetic, {SENTENCE}"),
        ("sentences_tags", f"{SENTENCE}, {TEXT}"),
        ("tags_sentences", f"{TEXT}, {SENTENCE}"),
    ],
)
def test_forms_of_tags_and_sentences(form, expected):
    assert caption(**WITH_SENTENCE, mix={form: 1.0}, keep_first_tags=2) == expected


def test_forms_come_by_weight_whatever_their_order_in_the_file():
    mix = {"tags": 6.0, "sentences": 3.0, "sentences_tags": 1.0}

    captions = [caption(**WITH_SENTENCE, key=str(key), mix=mix) for key in range(1000)]
    counts = Counter(captions)

    assert 550 < counts[TEXT] < 650
    assert 250 < counts[SENTENCE] < 350
    assert 60 < counts[f"{SENTENCE}, {TEXT}"] < 140
    assert counts.total() == 1000
    turned = dict(reversed(mix.items()))
    assert [caption(**WITH_SENTENCE, key=str(key), mix=turned) for key in range(1000)] == captions


def test_a_caption_with_tags_or_sentences_alone_is_never_emptied_by_the_mix():
    assert caption(TEXT, GROUPS, mix={"sentences": 1.0}) == TEXT
    alone = [{"group": "sentence", "tags": [SENTENCE]}]
    assert caption(SENTENCE, alone, mix={"tags": 1.0}) == SENTENCE


def test_of_several_descriptions_one_is_drawn():
    descriptions = ["A girl.", "She smiles, of course.", "A portrait."]
    text = ", ".join(["1girl", *descriptions])
    groups = [{"group": "general", "tags": ["1girl"]}, {"group": "sentence", "tags": descriptions}]

    counts = Counter(caption(text, groups, key=str(key), mix={"sentences": 1}) for key in range(600))

    assert set(counts) == set(descriptions)
    assert min(counts.values()) > 150


# --- properties ---

WORDS = st.text("abc' {}|;,", min_size=1, max_size=8).map(str.strip).filter(lambda text: text.strip(" ,"))
GROUP_LISTS = st.lists(
    st.tuples(st.sampled_from(["period", "character", "general", "sentence"]), st.lists(WORDS, min_size=1, max_size=4)),
    max_size=4,
).map(lambda found: [{"group": name, "tags": tags} for name, tags in found])


@given(
    groups=GROUP_LISTS, keep_first_tags=st.integers(0, 3), keep_groups=st.permutations(["period", "character"]),
    key=st.text(max_size=3),
)  # fmt: skip
def test_shuffling_loses_and_invents_nothing_and_cuts_no_tag(groups, keep_first_tags, keep_groups, key):
    text = ", ".join(tag for entry in groups for tag in entry["tags"])

    found = caption(
        text, groups, key=key, shuffle=True, keep_first_tags=keep_first_tags, keep_groups=tuple(keep_groups)
    )

    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    assert sorted(piece.strip() for piece in found.split(",") if piece.strip()) == sorted(pieces)
    assert all(tag in found for entry in groups for tag in entry["tags"])


@given(
    tags=st.lists(st.text("abcdef", min_size=1, max_size=3), unique=True, max_size=8), step=st.integers(0, 12),
    fraction=st.sampled_from([0.0, 0.3, 0.9]), keep_first_tags=st.integers(0, 3), key=st.text(max_size=3),
)  # fmt: skip
def test_dropout_and_warm_up_invent_nothing_and_spare_what_is_kept(tags, step, fraction, keep_first_tags, key):
    found = caption(
        ", ".join(tags), key=key, global_step=step, token_warmup_steps=10, tag_dropout_fraction=fraction,
        keep_first_tags=keep_first_tags,
    )  # fmt: skip

    parts = found.split(", ") if found else []
    assert parts == [tag for tag in tags if tag in parts]
    assert parts[:keep_first_tags] == tags[:keep_first_tags]


def test_a_showing_has_its_caption_whoever_asks_and_in_which_order():
    settings = CaptionSettings(
        shuffle=True, tag_dropout_fraction=0.2, caption_dropout_fraction=0.1, wildcards=True, lines="random",
        mix={"tags": 1, "sentences_tags": 1},
    )  # fmt: skip
    text, groups = WITH_SENTENCE["text"] + ", {a|b}\nanother line", WITH_SENTENCE["groups"]
    first = SampleIdentity(3, 0, "newest/0000", "k")
    showings = [
        first, replace(first, epoch=1), replace(first, occurrence=1), replace(first, concept="miku"),
        replace(first, chunk="newest/0001"), replace(first, seed=4), *(replace(first, key=str(it)) for it in range(60)),
    ]  # fmt: skip

    def made(identities):
        return [training_caption(text, groups, settings=settings, identity=it, global_step=0) for it in identities]

    assert made(reversed(showings)) == made(showings)[::-1]
    assert made(showings[1::2]) == made(showings)[1::2]
    assert len(set(made(showings))) > 20


# --- prefix, suffix, kohya's way ---


def test_prefix_and_suffix_are_joined_by_a_space_and_never_move():
    assert caption("a, b", prefix="masterpiece,", suffix="end") == "masterpiece, a, b end"
    assert caption("", prefix="p", suffix="s", shuffle=True) == "p s"
    for key in "abcdef":
        one = caption("a, b, c", key=key, prefix="p, q,", suffix=", s", shuffle=True, tag_dropout_fraction=0.5)

        assert one.startswith("p, q, ") or one == "p, q, , s"
        assert one.endswith(", s")


def test_kohya_shuffles_prefix_and_suffix_and_ignores_groups():
    groups = [{"group": "general", "tags": ["hey, listen"]}]
    found = {
        caption("hey, listen", groups, key=str(key), prefix="p, q", suffix="s", shuffle=True, compat="kohya")
        for key in range(100)
    }

    assert len(found) == 6
    assert all(sorted(one.split(", ")) == ["listen s", "p", "q hey"] for one in found)


def test_kohya_keeps_marks_and_empty_parts_where_nothing_is_shuffled_by_them():
    marks = {"keep_separator": "|||", "secondary_separator": ";;;", "separator": ",", "compat": "kohya"}

    assert caption("a ||| b;;;c,d", **marks) == "a ||| b,c,d"
    assert caption("a,,b", token_warmup_steps=1, global_step=1, **marks) == "a, , b"
    assert caption("a,,b ||| c", token_warmup_steps=1, global_step=1, **marks) == "a, b, c"
    assert caption("a\nb", prefix="p", suffix="s", lines="first", **marks) == "p a"


def test_other_separators_and_empty_parts():
    assert caption("a,,b , c", separator=",", shuffle=True, keep_first_tags=9) == "a, b, c"
    assert caption("a | b", separator=" | ", shuffle=True, keep_first_tags=9) == "a | b"


# --- bad settings ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tag_dropout_fraction": 1.1}, "^tag_dropout_fraction: must be between 0 and 1, got 1.1"),
        ({"tag_dropout_groups": {"period": -1}}, r"^tag_dropout_groups\.period: must be between 0 and 1, got -1"),
        ({"caption_dropout_fraction": -0.1}, "^caption_dropout_fraction"),
        ({"caption_dropout_every_epochs": 1}, "^caption_dropout_every_epochs: 1 would empty every caption"),
        ({"keep_first_tags": -1}, "^keep_first_tags: must not be negative"),
        ({"separator": " "}, "^separator: must be more than spaces"),
        ({"keep_separator": ","}, "must not be part of each other, got ', ', ','"),
        ({"secondary_separator": ";;;", "separator": ";"}, "must not be part of each other"),
        ({"secondary_separator": " ;; "}, "^secondary_separator: spaces around it"),
        ({"separator": "{", "wildcards": True}, "^separator: must hold no braces"),
        ({"prefix": "{a|b", "wildcards": True}, "^prefix: the brace at position 0 has no partner"),
        ({"suffix": "a {}", "wildcards": True}, "^suffix: the brace at position 2"),
        ({"prefix": "1girl |||", "keep_separator": "|||"}, r"^prefix: it is never shuffled, so it needs no '\|\|\|'"),
        ({"token_warmup_steps": 5, "token_warmup_fraction": 0.1}, "both set; keep one"),
        ({"line_weights": (1, 2)}, "^line_weights needs lines"),
        ({"line_weights": (0, 0), "lines": "random"}, "^line_weights: weights must not be negative and not all be 0"),
        ({"mix": {"tags": -1, "sentences": 2}}, "^mix: weights"),
        ({"mix": {"text": 1}}, r"^mix\.text: unknown; known: tags, sentences"),
        ({"compat": "kohya", "keep_groups": ("period",)}, 'compat = "kohya" does not look at groups'),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CaptionSettings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mix": {"sentence": 1}}, r"^run\.toml: mix\.sentence.*: input should be 'tags', 'sentences'"),
        ({"tag_dropout_groups": {"period": 2}}, r"^run\.toml: tag_dropout_groups\.period: must be between 0 and 1"),
        ({"keep_separator": "{", "wildcards": True}, r"^run\.toml: keep_separator: must hold no braces"),
        ({"token_warmup_steps": -1}, r"^run\.toml: token_warmup_steps: "),
    ],
)
def test_a_config_says_so_before_anything_is_loaded(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(values, CaptionConfig, name="run.toml")


def test_every_setting_of_the_config_is_one_of_captions():
    assert CaptionSettings(**CaptionConfig(token_warmup_fraction=0.5).model_dump(), total_steps=10).warmup_steps == 5


def test_groups_that_no_caption_has_are_told():
    index = pa.table({"groups": pa.array([GROUPS, None, [], [{"group": "artist", "tags": []}]], pa.list_(TAG_GROUP))})
    known = known_groups(index)

    assert known == {"period", "aesthetic", "character", "general"}
    CaptionSettings(keep_groups=("period",), tag_dropout_groups={"general": 0.1}, mix={"tags": 1}).check_groups(known)
    for values, message in [
        ({"keep_groups": ("charcter",)}, r"caption\.keep_groups: 'charcter': no caption has .* aesthetic, character"),
        ({"tag_dropout_groups": {"artist": 0.1}}, r"caption\.tag_dropout_groups: 'artist'"),
        ({"mix": {"sentences": 1}}, r"caption\.mix: 'sentence'"),
    ]:
        with pytest.raises(ValueError, match=message):
            CaptionSettings(**values).check_groups(known)


def test_captions_need_no_torch():
    code = "import sys, training.caption_text, training.config.captions; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True)
