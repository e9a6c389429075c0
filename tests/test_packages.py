"""What pyproject.toml lists is what is there: a package that is missing would be missing in an install."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]

    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("sharding", "captioning", "training", "scripts")
        for path in (ROOT / top).rglob("*.py")
    }

    assert sorted(listed) == sorted(found)
