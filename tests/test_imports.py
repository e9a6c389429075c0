"""The import arrows of DESIGN section 2, and nothing heavy where it does not belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sharding", "captioning", "training", "scripts")
SHARED = {"config", "schema", "tables", "chunk", "images", "files", "runlog"}
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "numba", "duckdb", "onnxruntime"}
ALLOWED = {
    "sharding": {"sharding"},
    "captioning": {"sharding", "captioning"},
    "training": {"sharding", "training"},
    "scripts": set(PACKAGES),
}


def imported_modules(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names += [f"{module}.{alias.name}" for alias in node.names] if module in PACKAGES else [module]
    return names


def wrong_arrows(package: str, path: Path) -> list[str]:
    wrong = []
    for name in imported_modules(path):
        top, *rest = name.split(".")
        if top not in PACKAGES:
            continue
        is_foreign_private = (
            top == "sharding" and package in ("captioning", "training") and rest[:1] and rest[0] not in SHARED
        )
        if top not in ALLOWED[package] or is_foreign_private:
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_designs_import_arrows_exist(package):
    wrong = [line for path in sorted((ROOT / package).rglob("*.py")) for line in wrong_arrows(package, path)]

    assert wrong == []


def test_a_wrong_arrow_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "bad.py"
    path.write_text("from sharding import pack\nimport captioning.compose\nfrom sharding.files import write_json\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)

    assert wrong_arrows("training", path) == [
        "bad.py imports sharding.pack",
        "bad.py imports captioning.compose",
    ]


@pytest.mark.parametrize("package", ["sharding", "captioning", "training"])
def test_help_imports_nothing_heavy(package):
    code = (
        f"import sys; sys.argv = ['x', '--help']; from {package}.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"heavy = {HEAVY} & set(sys.modules)\nassert not heavy, heavy"
    )

    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_sharding_never_imports_torch():
    torch_imports = [
        path.name
        for path in sorted((ROOT / "sharding").rglob("*.py"))
        if any(name.split(".")[0] == "torch" for name in imported_modules(path))
    ]

    assert torch_imports == []
