import pyarrow as pa
import pytest
from PIL import Image

from tests.training.toy import toy_config
from training.config import Prompt
from training.preview import read_pictures, write_pictures
from training.preview_prompts import preview_prompts, with_filewords
from training.run_dir import RunDir


def index(captions):
    keys = [f"{number:04d}" for number in range(len(captions))]
    return pa.table({"key": keys, "caption": captions, "groups": pa.nulls(len(captions))})


def filled(texts, captions, **changes):
    prompts = [Prompt(text=text) for text in texts]
    found = with_filewords(prompts, index(captions), chunk="a/0000", config=toy_config(**changes))
    return [prompt.text for prompt in found]


CAPTIONS = ["", *(f"caption {number}, b, c, d" for number in range(30))]


def test_filewords_are_one_caption_that_neither_order_nor_other_prompts_change():
    (alone,) = filled(["best, [filewords]"], CAPTIONS)
    shuffled = with_filewords(
        [Prompt(text="x [filewords]"), Prompt(text="plain"), Prompt(text="best, [filewords]")],
        index(CAPTIONS).take(list(range(30, -1, -1))), chunk="a/0000", config=toy_config(),
    )  # fmt: skip

    assert alone.removeprefix("best, ") in CAPTIONS[1:]
    assert shuffled[2].text == alone
    assert shuffled[1].text == "plain"


def test_filewords_of_several_prompts_and_of_other_seeds_differ():
    texts = ["[filewords]"] * 4

    assert len(set(filled(texts, CAPTIONS))) > 1
    assert filled(texts, CAPTIONS) != filled(texts, CAPTIONS, seed=4)


def test_filewords_are_whole_whatever_training_drops():
    caption = {"shuffle": True, "tag_dropout_fraction": 0.9, "caption_dropout_fraction": 0.9, "token_warmup_steps": 9}

    assert filled(["[filewords]"], ["a, b, c, d, e"], caption=caption) == ["a, b, c, d, e"]


def test_filewords_without_a_caption_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no sample of chunk a/0000 has one"):
        filled(["[filewords]"], ["", ""])
    config = toy_config(preview={"prompts": [{"text": "[filewords]"}]}, stage_c={"previewer": "p"})
    with pytest.raises(ValueError, match="none was started"):
        preview_prompts(config, RunDir(tmp_path))


def test_prompts_of_the_file_come_after_those_of_the_config(tmp_path):
    (tmp_path / "p.txt").write_text("second --d 1")
    preview = {"prompts": [{"text": "first"}], "file": str(tmp_path / "p.txt")}

    prompts = preview_prompts(toy_config(preview=preview, stage_c={"previewer": "p"}), RunDir(tmp_path))

    assert [prompt.text for prompt in prompts] == ["first", "second"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"width": 1020}, "preview.prompts.0: 1020x1024: .* nearest size is 1024x1024"),
        ({"height": 3}, "1024x3: .* nearest size is 1024x8"),
        ({"sampler": "euler"}, "sampler 'euler': the recipe stage_c has ddpm and ddim"),
    ],
)
def test_a_prompt_that_stage_c_cannot_draw_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        toy_config(preview={"prompts": [{"text": "a", **prompt}]}, stage_c={"previewer": "p"})


def test_a_prompt_file_needs_a_previewer():
    with pytest.raises(ValueError, match=r"preview.file is given, but stage_c.previewer is not"):
        toy_config(preview={"file": "p.txt"})


def test_pictures_say_how_they_were_made_and_are_found_again(tmp_path):
    prompts = [Prompt(text="söte", negative="bad", width=8, height=8, seed=5)] * 101
    write_pictures(tmp_path, 7, [Image.new("RGB", (8, 8))] * 101, prompts)

    found = read_pictures(tmp_path)

    assert len(found[7]) == 102
    assert Image.open(found[7]["preview/100"]).text["parameters"] == (
        "söte\nNegative prompt: bad\nSteps: 20, Sampler: ddpm, CFG scale: 4.0, Seed: 5, Size: 8x8"
    )
