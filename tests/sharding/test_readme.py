"""What sharding/README.md says is true: its snippets run, its tables are complete."""

import re
from pathlib import Path

import pytest

from sharding.config import (
    CombineConfig,
    DatasetConfig,
    DedupeConfig,
    FilterConfig,
    PackConfig,
    PlanConfig,
    SourceConfig,
)
from sharding.duplicates.keepers import REASONS

PACKAGE = Path(__file__).parents[2] / "sharding"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_snippet_runs_on_a_packed_workspace(run, write_captions, tmp_path, number):
    snippet = SNIPPETS[number].replace("demo/workspace", str(tmp_path / "ws"))
    if "import pandas" in snippet:
        pytest.importorskip("pandas")
    for command in ("scan", "dedupe", "plan"):
        run(command)
    write_captions()
    run("pack")
    names: dict[str, object] = {}

    exec(snippet, names)

    if "image" in names:
        assert names["image"][:3] == b"\xff\xd8\xff"
    if "caption" in names:
        assert names["caption"] == "solo"
    if "reasons" in names:
        assert dict(names["reasons"]) == {"kept": 7, "not_an_image": 1} and len(names["dropped"]) == 1


def test_every_drop_reason_of_the_code_is_explained():
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    patterns = (
        r'(?:ImageError|_DropError)\(\s*"(\w+)"', r'reason="(\w+)"', r'return "(\w+_\w+)"',
        r'Problem\(source[^"]*"(\w+)"',
    )  # fmt: skip
    reasons = {reason for pattern in patterns for reason in re.findall(pattern, code)}
    reasons |= {"is_deleted", "is_banned", "is_flagged", *REASONS[1:]}

    assert {"too_small", "identical_bytes", "no_period", "changed_since_scan", "dangling_link"} <= reasons
    assert sorted(reason for reason in reasons if f"`{reason}`" not in README) == []


def test_every_setting_is_in_the_table():
    configs = (SourceConfig, FilterConfig, DedupeConfig, PlanConfig, PackConfig, CombineConfig, DatasetConfig)
    tables = {"sources", "filters", "dedupe", "plan", "pack", "combine", "annotate", "policies", "periods"}
    fields = {field for config in configs for field in config.model_fields} - tables

    assert sorted(field for field in fields if not re.search(rf"^\| [^|]*`{field}` \|", README, re.MULTILINE)) == []
