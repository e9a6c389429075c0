"""Finding the training command in what people paste."""

import pytest

from sharding.config import ConfigError
from training.kohya.shell import read_shell


def test_a_script_with_other_lines_gives_the_one_command():
    command = read_shell(
        "#!/bin/bash\n# train\ncd sd-scripts && source venv/bin/activate\nMODEL=/m/sd\nexport OUT='/out put'\n"
        'CUDA_VISIBLE_DEVICES=1 accelerate launch --num_processes 2 "./sdxl_train.py" \\\n'
        '  --pretrained_model_name_or_path "$MODEL/x.safetensors" --output_dir=${OUT}/a --seed $UNSET | tee log; echo\n'
    )

    assert command.environment == {"CUDA_VISIBLE_DEVICES": "1"}
    assert command.launcher == ("accelerate", "launch", "--num_processes", "2")
    assert command.script == "sdxl_train"
    assert command.arguments == (
        "--pretrained_model_name_or_path", "/m/sd/x.safetensors", "--output_dir=/out put/a", "--seed", "$UNSET",
    )  # fmt: skip


@pytest.mark.parametrize("value", ["|||", ";", "a & b", "(x)", "#1", "it's"])
def test_operators_in_quotes_are_text(value):
    assert read_shell(f'python train_db.py --keep_tokens_separator "{value}"').arguments[-1] == value


@pytest.mark.parametrize("continued", ["^\r\n", "`\n", "\\\n"])
def test_windows_commands_keep_their_backslashes(continued):
    command = read_shell(
        f'accelerate launch {continued} "D:\\kohya\\train_db.py" {continued} --output_dir="D:\\new one" --vae E:\\v.pt'
    )

    assert command.script == "train_db"
    assert command.arguments == ("--output_dir=D:\\new one", "--vae", "E:\\v.pt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no command of a known trainer: found no .py file"),
        ("python flux_train.py --a 1", "found flux_train.py; known are stable_cascade_train_stage_c.py"),
        ("python train_db.py\npython train_db.py", "2 training commands"),
        ("python train_db.py --a 'b", "a quote is open"),
    ],
)
def test_what_is_no_single_command_is_refused(text, expected):
    with pytest.raises(ConfigError, match=expected):
        read_shell(text)
