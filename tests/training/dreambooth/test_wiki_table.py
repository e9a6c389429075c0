"""The table in training/dreambooth/README.md: each line of the wiki has a test that is there, and keys that are."""

import re
from pathlib import Path

from training.config import RunConfig
from training.config.concepts import ClassImagesConfig, ConceptConfig, SampleConfig
from training.config.dreambooth import DreamBoothConfig, StageConfig
from training.dreambooth.doctor.rules import load_rules

ROOT = Path(__file__).parents[3]
README = (ROOT / "training" / "dreambooth" / "README.md").read_text()
TABLE = README.partition("## The wiki, line by line")[2].partition("\n## ")[0]
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith(("| wiki |", "| --- "))
]


def test_every_line_names_tests_that_are_there():
    assert len(ROWS) > 80 and all(len(row) == 3 for row in ROWS)
    for wiki, _, tests in ROWS:
        for name in re.findall(r"`([^`]+)`", tests):
            path, _, test = name.partition("::")
            text = (ROOT / "tests" / "training" / path).read_text()
            assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE), f"{wiki}: {name}"
    assert [wiki for wiki, _, tests in ROWS if tests == "–"] == [
        "eye styles", 'the negative prompt holds "artist name"',
    ]  # fmt: skip


def test_every_key_is_a_setting():
    tables = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    tables |= {"dreambooth": DreamBoothConfig, "class_images": ClassImagesConfig, "sample": SampleConfig}
    alone = {*RunConfig.model_fields, *ConceptConfig.model_fields, *StageConfig.model_fields, "balance", "lora"}
    for _, here, _ in ROWS:
        for key in re.findall(r"`([a-z_0-9.]+)(?: = [^`]+)?`", here):
            table, _, name = key.partition(".")
            if key.endswith((".json", ".toml")) or key in COMMANDS:
                continue
            assert key in alone if not name else name in tables[table].model_fields, key


COMMANDS = {"doctor", "suggest", "plan", "status", "export", "captioning"}


def test_every_rule_of_the_doctor_that_is_named_is_one():
    rules = set(load_rules().rules)
    named = set()
    for _, here, _ in ROWS:
        for listed in re.findall(r"`doctor`: ([a-z_, ]+?)(?:[;(]|$|, (?:with|measured|by) )", here):
            named |= {one.strip() for one in listed.split(",")}
    named = {name.split(" ")[0] for name in named if name}

    assert len(named) > 30 and named <= rules
