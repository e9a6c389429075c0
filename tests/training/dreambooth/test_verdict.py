"""The verdict's measures and rule, on made pictures and made curves."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from tests.training.toy import toy_config
from training.config import Prompt, RunConfig
from training.dreambooth.verdict.curves import ConceptCurves, Curve, Curves, read_curves
from training.dreambooth.verdict.likeness import drift, likeness, structure, windows
from training.dreambooth.verdict.limits import builtin_limits
from training.dreambooth.verdict.prompts import sanity_prompt, shown_concepts
from training.dreambooth.verdict.remedies import remedies
from training.dreambooth.verdict.report import Nearest, Preview, Verdict, bleed, read_verdict, verdict_lines
from training.dreambooth.verdict.rule import best_step, judge, judge_concept
from training.dreambooth.verdict.selection import base_plans, fixed_plan, group_of, means, timestep_of

RULE = builtin_limits().rule
STEPS = range(0, 1001, 100)


def painting(seed, size=(192, 256)):
    """Soft blots of colour, which stand for a picture's composition."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 5, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def dreambooth_config(**recipe):
    values = toy_config().model_dump(mode="json")
    values["stage_c"] = None
    values["preview"] = {}
    values["dreambooth"] = {"model": "none", "concepts": "concepts.toml", **recipe}
    values["data"] = {"workspace": "none", "epochs": 80}
    return RunConfig.model_validate({name: value for name, value in values.items() if value is not None})


# --- pictures ---


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.filter(ImageFilter.GaussianBlur(3)),
        lambda one: ImageEnhance.Brightness(one).enhance(1.2),
        lambda one: one.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda one: one.crop((0, 32, 192, 224)),
        lambda one: one.crop((5, 5, 182, 240)).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_a_picture_is_found_again_when_it_is_altered(change):
    for seed in range(5):
        altered = change(painting(seed))
        ratio = altered.width / altered.height

        same = likeness(structure(altered), windows(painting(seed), ratio=ratio))
        others = [likeness(structure(altered), windows(painting(other), ratio=ratio)) for other in range(100, 110)]

        assert same > RULE.nearest > max(others)


def test_a_flat_picture_is_like_nothing():
    flat = Image.new("RGB", (64, 64), "grey")

    assert likeness(structure(flat), windows(painting(1), ratio=1.0)) == 0
    assert likeness(structure(painting(1)), windows(flat, ratio=1.0)) == 0


def test_drift_grows_from_nothing_to_another_picture():
    base = painting(1)
    softer = base.filter(ImageFilter.GaussianBlur(4))

    assert drift(base, base) == pytest.approx(0, abs=1e-5)
    assert 0 < drift(softer, base) < drift(painting(2), base)
    assert drift(painting(2), base) > RULE.drift


# --- the rule ---


def curve(function):
    return Curve(tuple((step, function(step / 1000)) for step in STEPS))


def falling(to, *, speed=5.0):
    """From 0.12 towards a value."""
    return curve(lambda part: to + (0.12 - to) * 2.718 ** (-speed * part))


def u_shaped(lowest=0.4, depth=0.006, rise=0.02):
    return curve(lambda part: 0.12 - depth + (depth / lowest**2 if part < lowest else rise) * (part - lowest) ** 2)


FLAT = curve(lambda part: 0.12)
CALM = curve(lambda part: 0.3 * part)


NONE = Curve()


def word(trained, held_out=NONE, nearest=NONE, sanity=CALM):
    return judge_concept(ConceptCurves(trained, held_out, nearest), sanity, RULE).word


def test_curves_are_read_as_a_person_would():
    assert word(FLAT, FLAT) == "under"
    assert word(falling(0.08, speed=1), falling(0.10, speed=1)) == "under"
    assert word(falling(0.11), falling(0.112)) == "good"
    assert word(falling(0.08, speed=2), u_shaped()) == "over"
    assert word(falling(0.06, speed=3), FLAT) == "over"  # the gap
    assert word(falling(0.11), falling(0.112), nearest=curve(lambda part: 0.5 + 0.4 * part)) == "over"
    assert word(falling(0.11), falling(0.112), sanity=curve(lambda part: 0.9 * part)) == "over"


def test_a_drift_is_no_sign_while_held_out_pictures_get_better():
    assert word(falling(0.08, speed=1), falling(0.10, speed=1), sanity=curve(lambda part: 0.9 * part)) == "under"


def test_previews_that_were_alike_from_the_start_say_nothing():
    assert word(falling(0.11), falling(0.112), nearest=curve(lambda part: 0.85)) == "good"


def test_without_held_out_pictures_it_is_said_what_is_not_known():
    still, done = falling(0.08, speed=1), falling(0.11)

    assert (word(still), word(done)) == ("under", "good")
    unknown = judge_concept(ConceptCurves(done), Curve(), RULE).unknown
    assert [one.split(":")[0] for one in unknown] == [
        "whether it is learned or memorised",
        "whether it repeats training pictures",
        "whether other pictures suffer",
    ]


def test_too_few_measurements_give_no_word():
    few = Curve(FLAT.points[:2])

    assert judge_concept(ConceptCurves(few, few), few, RULE).word == "unknown"


def test_ups_and_downs_are_no_fall_and_one_high_point_is_no_rise():
    up_and_down = Curve(tuple((step, 0.1 + 0.004 * (step // 100 % 2)) for step in STEPS))
    one_high = Curve((*falling(0.112).points[:-1], (1000, 0.12)))

    assert up_and_down.fallen(since_share=0.34) <= 0
    assert word(falling(0.11), up_and_down) == "good"
    assert word(falling(0.11, speed=3), one_high) == "good"
    assert word(falling(0.11, speed=3), Curve((*one_high.points[:-2], (900, 0.12), (1000, 0.12)))) == "over"


def test_noise_below_the_limits_changes_no_word():
    noise = np.random.default_rng(0).normal(0, 0.0002, len(STEPS))
    for trained, held_out, expected in ((falling(0.11), falling(0.112), "good"), (falling(0.08), u_shaped(), "over")):
        noisy = Curve(tuple((step, value + float(n)) for (step, value), n in zip(held_out.points, noise, strict=True)))
        assert word(trained, noisy) == expected


def rows(**curves):
    by_step = {}
    for name, points in curves.items():
        kind, _, concept = name.partition("__")
        for step, value in points.points:
            by_step.setdefault(step, {"global_step": step, "chunk": "c"})[f"verdict/{kind}/{concept}"] = value
    return [*by_step.values(), {"global_step": 5, "train/loss": 0.1}]


def test_curves_come_from_the_rows_of_metrics():
    curves = read_curves(
        [
            *rows(trained__rin=falling(0.08), held_out__rin=u_shaped(), held_out__aoi=FLAT),
            {"global_step": 1, "verdict/sanity_drift": float("nan")},
        ]
    )

    assert list(curves.concepts) == ["aoi", "rin"]
    assert curves.concepts["rin"].trained == falling(0.08)
    assert not curves.drift
    assert curves.steps == tuple(STEPS)
    assert {name: reading.word for name, reading in judge(curves, RULE).items()} == {"aoi": "good", "rin": "over"}


def test_the_best_state_is_the_one_with_the_lowest_held_out_loss():
    curves = read_curves(rows(trained__rin=falling(0.08), held_out__rin=u_shaped(lowest=0.4)))

    assert best_step(curves, RULE, candidates=set(STEPS)) == 400
    assert best_step(curves, RULE, candidates={200, 700, 1000}) == 200
    assert best_step(curves, RULE, candidates={5}) is None


def test_the_best_state_is_the_last_that_is_not_over_when_nothing_is_held_out():
    repeated = curve(lambda part: 0.9 if part > 0.65 else 0.4)
    curves = read_curves(rows(trained__rin=falling(0.11), nearest__rin=repeated))

    assert best_step(curves, RULE, candidates=set(STEPS)) == 600


# --- remedies ---


def settings(found):
    return [one.setting for one in found if one.setting]


def test_remedies_against_over_training():
    config = dreambooth_config(train=["unet", "text_encoder"], prior_weight=0.3)

    found = remedies("over", config=config, best_epochs=45, has_class_images=True)

    assert settings(found) == [
        "data.epochs=45", "dreambooth.prior_weight=0.75", "dreambooth.text_encoder_ratio=0.5",
    ]  # fmt: skip
    assert any(
        "2 to 10 per picture" in one.text
        for one in remedies("over", config=config, best_epochs=None, has_class_images=False)
    )


def test_remedies_against_under_training_can_be_set():
    found = remedies("under", config=dreambooth_config(), best_epochs=None, has_class_images=False)

    assert settings(found) == ["data.epochs=100", 'dreambooth.train=["unet", "text_encoder"]']
    assert "--set 'data.epochs=100' (this run goes on)" in str(found[0])


@pytest.mark.parametrize("word", ["over", "under"])
def test_where_the_wiki_contradicts_common_practice_nothing_is_set(word):
    found = remedies(word, config=dreambooth_config(), best_epochs=None, has_class_images=False)

    assert any("the wiki says" in one.text and "learning rate" in one.text and not one.setting for one in found)
    assert not any("learning_rate" in one.setting for one in found)


def test_stages_have_no_single_setting_of_epochs():
    config = dreambooth_config(stages=[{"name": "a", "epochs": 3}])

    for word in ("over", "under"):
        found = remedies(word, config=config, best_epochs=2, has_class_images=False)
        assert not any(one.setting.startswith("data.epochs") for one in found)
        assert any("[[dreambooth.stages]]" in one.text for one in found)


def test_a_good_concept_needs_nothing():
    assert remedies("good", config=dreambooth_config(), best_epochs=None, has_class_images=False) == ()


# --- what is measured ---


def index(num, *, classes=0):
    names = ["rin"] * num + ["rin/class"] * classes
    return pa.table(
        {
            "key": [f"{row:04d}" for row in range(len(names))],
            "width": [256 if row % 3 else 384 for row in range(len(names))],
            "height": [256] * len(names),
            "repeats": [2] * len(names),
            "loss_weight": pa.array([3.0] * len(names), pa.float32()),
            "dataset": ["rin"] * len(names),
            "concept": names,
            "every_epochs": pa.array([1] * num + [2] * classes, pa.int32()),
            "epoch_offset": pa.array([0] * num + [1] * classes, pa.int32()),
        }
    )


def plan_of(table, chunk="concepts/01-all", *, pictures=4, config=None):
    config = config or toy_config(buckets={"resolution": [256, 256], "step": 32})
    return fixed_plan(
        base_plans(table, chunk, config=config), group_of(table), seed=3, pictures_per_group=pictures, num_timesteps=3,
        micro_batch_size=4,
    )  # fmt: skip


def samples(plan):
    return [sample for micro_batch in plan.micro_batches() for sample in micro_batch.samples]


def test_every_chosen_picture_comes_once_per_timestep():
    plan = plan_of(index(10, classes=6))

    by_concept = {name: [s for s in samples(plan) if s.concept == name] for name in ("rin", "rin/class")}
    assert {name: len(found) for name, found in by_concept.items()} == {"rin": 12, "rin/class": 12}
    assert {s.occurrence for s in samples(plan)} == {0, 1, 2}
    assert all(index(10, classes=6)["key"][s.row].as_py() == s.key for s in samples(plan))
    assert all(len(micro_batch.samples) <= 4 for micro_batch in plan.micro_batches())


def test_pictures_and_noise_are_the_same_in_every_stage():
    first, second = plan_of(index(10)), plan_of(index(11), "concepts/02-more")

    def identities(plan):
        return {s.identity(seed=plan.seed, epoch=plan.epoch, chunk=plan.chunk) for s in samples(plan)}

    assert len(identities(first) & identities(second)) >= 9


def test_timesteps_lie_inside_the_range_that_is_trained():
    timestep = timestep_of([0.0, 0.5, 1.0], between=(0.2, 0.6))
    identity = samples(plan_of(index(3)))[0].identity(seed=0, epoch=0, chunk="c")

    assert [timestep(replace(identity, occurrence=number)) for number in range(3)] == pytest.approx([0.2, 0.4, 0.6])


def test_means_do_not_depend_on_the_order():
    losses = [("a", 0.1), ("b", 1e16), ("b", 1.0), ("b", -1e16), ("a", 0.2)]

    assert means(losses) == means(losses[::-1]) == {"a": pytest.approx(0.15), "b": pytest.approx(1 / 3)}


# --- prompts and words ---


def test_the_sanity_prompt_is_drawn_as_the_first_preview_is():
    config = dreambooth_config(sanity_prompt="a castle", sanity_negative="blurry", sanity_seed=7)
    own = {"text": "rin", "width": 512, "height": 768, "steps": 9, "guidance": 6.0, "sampler": "ddim"}

    drawn = sanity_prompt(config, [Prompt(**own), Prompt(text="aoi")])

    assert drawn == Prompt(**{**own, "text": "a castle", "negative": "blurry", "seed": 7})
    assert sanity_prompt(config, []).width == config.buckets.resolution[0]
    assert sanity_prompt(dreambooth_config(), [Prompt(**own)]) is None


CONCEPTS = """
[[concepts]]
name = "shirakiin_rin"
folder = "a"
token = "srrin"
[[concepts]]
name = "aoi"
folder = "b"
[concepts.sample]
prompt = "a girl, standing"
images = 2
"""


def test_a_preview_shows_the_concept_that_asks_for_it_or_that_its_prompt_names(tmp_path):
    path = tmp_path / "concepts.toml"
    path.write_text(CONCEPTS)
    config = dreambooth_config(concepts=str(path))
    texts = {
        "1girl, SRRIN, smile": "shirakiin_rin",
        "shirakiin rin": "shirakiin_rin",
        "aoi, standing": "aoi",
        "aoisora, a castle": None,
    }
    previews = [Prompt(text=text) for text in texts] + [Prompt(text="a girl, standing")] * 2

    assert shown_concepts(previews, ["aoi", "shirakiin_rin"], config) == (*texts.values(), "aoi", "aoi")


def test_verdict_json_is_told_in_words(tmp_path):
    curves = Curves({"rin": ConceptCurves(falling(0.08, speed=2), u_shaped())}, CALM, tuple(STEPS))
    previews = [
        Preview("chunks/a/previews/x.png", "rin", {"rin": Nearest("k1", 0.5), "aoi": Nearest("k2", 0.3)}),
        Preview("chunks/a/previews/y.png", "aoi", {"rin": Nearest("k3", 0.7), "aoi": Nearest("k4", 0.6)}),
    ]
    found = remedies("over", config=dreambooth_config(), best_epochs=30, has_class_images=False)
    Verdict(
        "c/01", 1000, judge(curves, RULE), {"rin": found}, previews, 0.2, 0, ("chunks/c/01/state-00000400", 400)
    ).write(tmp_path)

    told = read_verdict(tmp_path)
    text = "\n".join(verdict_lines(told))

    assert told["bleed"] == bleed(previews) == {"rin": {"rin": 0.5, "aoi": 0.3}, "aoi": {"rin": 0.7, "aoi": 0.6}}
    assert told["previews"][0]["nearest"]["rin"] == {"key": "k1", "likeness": 0.5}
    assert "rin: over: the held-out loss has risen" in text
    assert "try: fewer epochs (wiki: less than 100): --set 'data.epochs=30' (in a new run)" in text
    assert "best state: chunks/c/01/state-00000400 (global step 400)" in text
    assert "0.70" in text
    assert read_verdict(tmp_path / "none") is None


def test_a_damaged_verdict_is_named(tmp_path):
    (tmp_path / "verdict.json").write_text("{")

    with pytest.raises(ValueError, match="not valid JSON"):
        read_verdict(tmp_path)
