"""Captions and concepts, each with one fault."""

import json

import numpy as np
import pytest
from PIL import Image

from sharding.config import ConfigError
from training.cli import main
from training.config.concepts import ConceptConfig
from training.dreambooth.doctor.captions import parse_caption
from training.dreambooth.doctor.examination import examine
from training.dreambooth.doctor.names import pieces_of
from training.dreambooth.doctor.rules import load_rules
from training.dreambooth.doctor.tag_checks import num_characters, redundant_tags

GOOD = b"gotou hitori, black shirt, frown, standing, facing away, from above"


def concept(root, captions, *, name="gotou hitori", repeats=1):
    """Noise pictures, all different, with these captions (None: no file)."""
    folder = root / name
    folder.mkdir()
    for number, caption in enumerate(captions):
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        if caption is not None:
            (folder / f"{number}.txt").write_bytes(caption)
    return ConceptConfig(name=name, folder=folder, repeats=repeats)


def rules_found(*concepts, overrides=()):
    return {one.rule: one for one in examine(concepts, load_rules(overrides=overrides)).findings}


@pytest.mark.parametrize(
    ("caption", "rule"),
    [
        (None, "caption_missing"),
        (b" \n", "caption_missing"),
        ("gotou hitori, café".encode("latin-1"), "caption_undecodable"),
        (b"\xef\xbb\xbf" + GOOD, "caption_form"),
        (GOOD + b"\r\n", "caption_form"),
        (GOOD + b",", "caption_form"),
        (GOOD + b", frown", "caption_form"),
        (GOOD + b", long_sleeves", "caption_form"),
        (GOOD + b", a, b, c", "tag_count"),
        (GOOD + b", " + b"word " * 70, "token_count"),
        (b"smile, gotou hitori", "first_tag"),
        (b"gotou hitori, from above, standing", "tag_order"),
        (b"gotou hitori, 1girl", "generic_tag"),
        (b"gotou hitori, skirt, pleated skirt", "redundant_tag"),
        (b"gotou hitori, left hand up", "left_right"),
        (b"gotou hitori, 2girls", "characters"),
        (b"gotou hitori, speech bubble", "text_tag"),
    ],
)
def test_a_fault_of_a_caption_is_found_and_the_others_are_quiet(tmp_path, caption, rule):
    of_captions = {"caption_missing", "caption_undecodable", "caption_form", "tag_count", "token_count", "first_tag",
                   "tag_order", "generic_tag", "redundant_tag", "left_right", "characters", "text_tag"}  # fmt: skip

    findings = examine([concept(tmp_path, [GOOD, GOOD, GOOD, caption])], load_rules()).findings

    found = {(one.rule, one.file.stem) for one in findings if one.rule in of_captions}
    assert (rule, "3") in found
    assert {name for _, name in found} == {"3"}


def test_left_and_right_fail_with_flips(tmp_path):
    one = concept(tmp_path, [GOOD, GOOD + b", left hand up"])

    assert rules_found(one, overrides=["training.flip=true"])["left_right_flipped"].severity == "fail"


def test_shares_of_tags_are_judged_over_the_concept(tmp_path):
    caption = b"gotou hitori, pink hair, portrait, from above"

    found = rules_found(concept(tmp_path, [caption] * 5))

    assert {"default_tag", "close_ups", "full_body", "one_angle"} <= set(found)
    assert "5 of 5" in found["close_ups"].text


def test_balance_names_the_repeats_that_fix_it(tmp_path):
    large = concept(tmp_path, [GOOD] * 8)
    small = concept(tmp_path, [b"kita ikuyo"] * 2, name="kita ikuyo")

    found = rules_found(large, small)["balance"]

    assert (found.concept, found.severity, found.number) == ("kita ikuyo", "fail", 4.0)
    assert "repeats = 4" in found.text
    assert "balance" not in rules_found(large, small.model_copy(update={"repeats": 4}))


def test_names_that_begin_alike_are_named(tmp_path):
    one = concept(tmp_path, [b"oyama mahiro"], name="a")
    two = concept(tmp_path, [b"oyama mihari"], name="b")

    assert "oy ama</w>" in rules_found(one, two)["name_shared"].text


def test_pieces_are_clips():
    assert pieces_of("Oyama  mahiro, 1girl") == ["oy", "ama</w>", "ma", "hiro</w>", ",</w>", "1</w>", "girl</w>"]


def test_tags_tell_how_many_figures_there_are():
    assert num_characters(["2girls", "1boy"]) == 3
    assert num_characters(["multiple girls"]) == 2
    assert num_characters(["smile"]) == 0
    assert redundant_tags(["skirt", "pleated skirt", "shirt"]) == [("skirt", "pleated skirt")]
    assert parse_caption(GOOD).faults == ()


def test_the_command_writes_table_json_and_page_and_its_exit_code_tells(tmp_path, capsys):
    concept(tmp_path, [GOOD, GOOD])
    outputs = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    quiet = ["--set", "rules.size.off=true"]

    failed = main(["doctor", str(tmp_path), *outputs])
    passed = main(["doctor", str(tmp_path), *quiet])

    assert (failed, passed) == (3, 0)
    severities = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:4] in ("fail", "warn", "note")
    ]
    assert severities[0] == "fail"
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"]["fail"] == 2
    assert report["concepts"][0]["pictures"][0]["upscale"] == 8.0
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/webp;base64,") == 2
    assert "Too Small" in page


def test_a_broken_picture_and_a_shared_caption_fail(tmp_path):
    one = concept(tmp_path, [GOOD])
    (one.folder / "0.jpg").write_bytes(b"\xff\xd8\xff broken")

    found = rules_found(one)

    assert found["broken_file"].severity == found["name_clash"].severity == "fail"


def test_a_rules_file_changes_limits_and_a_wrong_name_is_refused(tmp_path):
    one = concept(tmp_path, [GOOD] * 2)
    path = tmp_path / "mine.toml"
    path.write_text("[rules.size]\nfail = 9.0\nwarn = 8.5\n")
    assert not [f for f in examine([one], load_rules(path)).findings if f.rule == "size"]

    path.write_text("[rules.sise]\nwiki = 'x'\nwarn = 1\n")
    with pytest.raises(ConfigError, match="no rule 'sise'"):
        load_rules(path)
