import json

import pytest

from sharding.config import ConfigError
from training.config.stage_c import prompt_problems
from training.prompt_file import read_prompts

LINES = """\ufeff# a comment
masterpiece, 1girl --n bad hands, text --w 832 --h 1216 --d 42 --l 4.5 --s 28 --ss ddim

just a sky -- with a dash
masterpiece, 1girl --D -1
"""


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def read(path):
    return read_prompts(path, problems=prompt_problems)


def test_lines_are_read_as_kohya_reads_them(tmp_path):
    full, plain, _ = read(write(tmp_path, "p.txt", LINES))

    assert full.model_dump(exclude_none=True) == {
        "text": "masterpiece, 1girl", "negative": "bad hands, text", "width": 832, "height": 1216, "seed": 42,
        "steps": 28, "guidance": 4.5, "sampler": "ddim",
    }  # fmt: skip
    assert (plain.text, plain.negative, plain.width, plain.height) == ("just a sky -- with a dash", "", 1024, 1024)
    assert (plain.steps, plain.guidance) == (20, 4.0)


def test_a_missing_seed_is_made_from_the_text_and_never_changes(tmp_path):
    first = read(write(tmp_path, "p.txt", "a cat\na dog --d -1\na cat\n"))
    longer = read(write(tmp_path, "q.txt", "a bird\na cat\na dog\na cat --w 512\n"))

    assert [prompt.seed for prompt in first] == [prompt.seed for prompt in longer[1:]]
    assert len({prompt.seed for prompt in first}) == 3


def test_toml_and_json_say_the_same_as_lines(tmp_path):
    entry = {"prompt": "a cat", "negative_prompt": "bad", "width": 512, "seed": 3, "scale": 7, "sample_steps": 9}
    toml = '[prompt]\nnegative_prompt = "bad"\nwidth = 512\nscale = 7\n[[prompt.subset]]\nprompt = "a cat"\nseed = 3\n'
    toml += "sample_steps = 9\n"

    from_lines = read(write(tmp_path, "p.txt", "a cat --n bad --w 512 --d 3 --l 7 --s 9"))
    from_json = read(write(tmp_path, "p.json", json.dumps([{**entry, "height": None}])))
    from_toml = read(write(tmp_path, "p.toml", toml))

    assert from_json == from_toml == from_lines


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\na cat --w 1000 --h 1001", "line 2: 1000x1001: .*nearest size is 1000x1000"),
        ("p.txt", "a cat --ss euler_a", "line 1: sampler 'euler_a': the recipe stage_c has ddpm and ddim"),
        ("p.txt", "a cat --cn image.png", "line 1: option --cn is not known"),
        ("p.txt", "a cat --w wide", "line 1: width"),
        ("p.txt", "a cat --d x", "line 1: seed"),
        ("p.txt", "a cat --s 0", "line 1: steps"),
        ("p.txt", "# nothing\n", "no prompt"),
        ("p.csv", "a cat", "must end in .txt, .toml, .json"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", '{"prompt": "a"}', "list of objects"),
        ("p.json", '[{"prompt": "a", "enum": 0}]', "entry 0: unknown key enum"),
        ("p.toml", "x = 1", r"no table \[prompt\]"),
        ("p.toml", "[prompt", "not valid TOML"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_its_place(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path, name, text))


def test_a_missing_file_and_other_encodings_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))

    with pytest.raises(FileNotFoundError, match=r"preview.file .*none\.txt"):
        read(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(tmp_path / "latin.txt")
