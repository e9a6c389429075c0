"""Real pictures, each with one fault planted: the doctor finds it, and says nothing of the pictures as they were."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from sharding.images import decode_rgb, encode_jpeg
from training.config.concepts import ConceptConfig
from training.dreambooth.doctor.examination import examine
from training.dreambooth.doctor.rules import load_rules

DEMO = Path(__file__).parents[4] / "scripts" / "demo_pictures"
CLEAN = (
    "boards/1355910.webp", "boards/205519.jpg", "boards/330845.jpg", "boards/3480994.jpg", "boards/5310007.jpg",
    "boards/7205518.jpg", "boards/4702391.jpg", "photos/IMG_0388.webp", "photos/IMG_0455.jpg",
    "visual-novel/RenPy_Tutorial (rpt)/eileen_happy.webp",
)  # fmt: skip
"""Looked at one by one: sharp, well lit, without text or bars, all different."""


def subtitled(image):
    result = image.copy()
    draw = ImageDraw.Draw(result)
    font = ImageFont.load_default(size=min(image.size) * 0.055)
    text = "I never thought it would end like this."
    place = ((image.width - draw.textlength(text, font=font)) / 2, image.height * 0.88)
    draw.text(place, text, font=font, fill="white", stroke_width=3, stroke_fill="black")
    return result


def letterboxed(image):
    result = Image.new("RGB", (image.width, round(image.height * 1.2)))
    result.paste(image, (0, image.height // 10))
    return result


def tinted(image):
    red, green, blue = image.split()
    return Image.merge("RGB", [red.point(lambda v: int(v * 0.75 + 64)), green, blue.point(lambda v: int(v * 0.6))])


PLANTED = {
    "sharpness": lambda image: image.filter(ImageFilter.GaussianBlur(max(image.size) / 250)),
    "darkness": lambda image: ImageEnhance.Brightness(image).enhance(0.2),
    "over_exposure": lambda image: image.point(lambda v: min(255, int(v * 1.7 + 60))),
    "contrast": lambda image: image.point(lambda v: int(v * 0.3 + 90)),
    "colour_cast": tinted,
    "squeezed": lambda image: image.resize((720, 480)),
    "aspect": lambda image: image.crop((0, 0, image.width, image.width // 4)),
    "size": lambda image: image.resize((image.width // 4, image.height // 4)),
    "borders": letterboxed,
    "subtitle": subtitled,
    "enlarged": lambda image: ImageOps.contain(ImageOps.contain(image, (200, 200)), (900, 900)),
    "blockiness": lambda image: decode_rgb(encode_jpeg(image, quality=15)),
}


@pytest.fixture(scope="module")
def pictures():
    images = {Path(name).stem: decode_rgb((DEMO / name).read_bytes()) for name in CLEAN}
    for image in images.values():
        image.thumbnail((900, 900), Image.Resampling.LANCZOS)
    return images


@pytest.fixture(scope="module")
def found(pictures, tmp_path_factory):
    """(planted rule or "clean", rule found, picture), of an examination with one concept for each planted fault."""
    root = tmp_path_factory.mktemp("planted")
    concepts = []
    for number, rule in enumerate(["clean", *PLANTED]):
        folder = root / rule
        folder.mkdir()
        chosen = list(pictures) if rule == "clean" else [list(pictures)[(number + step * 3) % 10] for step in range(3)]
        for name in chosen:
            image = pictures[name] if rule == "clean" else PLANTED[rule](pictures[name])
            image.save(folder / f"{name}.bmp")
        concepts.append(ConceptConfig(name=rule, folder=folder, prompt="a girl"))
    # The same pictures stand in several folders here, on purpose.
    findings = examine(concepts, load_rules(overrides=["rules.leak.off=true"])).findings
    same = {"too_bright": "over_exposure"}  # two measures of one fault
    return {(one.concept, same.get(one.rule, one.rule), one.file.stem) for one in findings if one.file}


def test_clean_pictures_have_nothing(found):
    assert not [one for one in found if one[0] == "clean"]


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_fault_is_found_in_every_picture(found, rule):
    assert len({name for concept, seen, name in found if concept == seen == rule}) == 3


def test_precision_and_recall_of_each_rule(found, capsys):
    """Of what a rule says in pictures without a fault, or with a fault that has nothing to do with it."""
    follows = {  # what another fault brings with it
        ("darkness", "contrast"), ("aspect", "size"), ("size", "sharpness"), ("over_exposure", "contrast"),
        ("sharpness", "contrast"), ("over_exposure", "colour_cast"), ("contrast", "sharpness"),
        ("enlarged", "sharpness"), ("sharpness", "enlarged"), ("size", "enlarged"), ("blockiness", "contrast"),
        ("aspect", "over_exposure"),  # the upper quarter of a picture may be all sky
    }  # fmt: skip
    with capsys.disabled():
        print("\nrule            precision  recall")
        for rule in PLANTED:
            right = sum(concept == seen == rule for concept, seen, _ in found)
            wrong = [one for one in found if one[1] == rule and one[0] != rule and (one[0], rule) not in follows]
            precision = right / (right + len(wrong))
            print(f"{rule:15} {precision:9.2f} {right / 3:7.2f}", *(f"{one[0]}/{one[2]}" for one in sorted(wrong)))
            assert precision >= 0.75, wrong


def test_a_figure_on_black_is_not_dark_but_a_dark_one_is(pictures, tmp_path):
    for name, light in (("lit", 1.0), ("dark", 0.3)):
        canvas = Image.new("RGB", (700, 900))
        canvas.paste(ImageEnhance.Brightness(pictures["205519"].resize((400, 500))).enhance(light), (150, 200))
        canvas.save(tmp_path / f"{name}.png")

    findings = examine([ConceptConfig(name="a", folder=tmp_path, prompt="x")], load_rules()).findings

    assert [one.file.stem for one in findings if one.rule == "darkness"] == ["dark"]


def test_a_repeated_frame_and_a_leak_are_found(pictures, tmp_path):
    for folder, name, image in (
        ("a", "one", pictures["205519"]),
        ("a", "two", pictures["205519"].resize((700, 800))),
        ("a", "three", pictures["330845"]),
        ("b", "four", pictures["330845"]),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        image.save(tmp_path / folder / f"{name}.jpg", quality=80)
    concepts = [ConceptConfig(name=name, folder=tmp_path / name, prompt="x") for name in ("a", "b")]

    findings = examine(concepts, load_rules()).findings

    assert [one.file.stem for one in findings if one.rule == "repeated"] == ["one"]
    assert [one.file.stem for one in findings if one.rule == "leak"] == ["three"]


def test_one_background_behind_several_figures_is_found(pictures, tmp_path):
    scene = pictures["330845"]
    for number, name in enumerate(("1355910", "205519", "3480994", "7205518")):
        figure = pictures[name].resize((scene.width // 3, scene.height // 2))
        frame = scene.copy()
        frame.paste(figure, (scene.width // 3, scene.height // 4))
        frame.save(tmp_path / f"{number}.png")

    findings = examine([ConceptConfig(name="a", folder=tmp_path, prompt="x")], load_rules()).findings

    assert [one.number for one in findings if one.rule == "background"] == [1.0]
