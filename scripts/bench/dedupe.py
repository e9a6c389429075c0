"""dedupe: precision and recall of duplicates on real pictures, beside imagehash and czkawka.

Without --data, or with a folder of pictures, changes are planted in them (`scripts.bench.planted`). With a folder that
holds truth.csv (path,group and, if wanted, family: pairs of one family but two groups are not judged), or whose
pictures lie in subfolders, one per picture, what is there is measured. Ours goes through scan and dedupe of a temporary
workspace, with the switches off and on; found is what stands in `dedupe/pairs` as anything but a variant.

    python -m scripts.bench dedupe [--full] [--data DIR]

czkawka is looked for as in `scripts.bench scan`.
"""

import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.bench.planted import KINDS, VARIANT, plant
from scripts.bench.result import Bar, Result
from scripts.bench.scan import CZKAWKA_PYTHON, find_czkawka
from sharding.config import DatasetConfig, parse_config
from sharding.dedupe import dedupe
from sharding.images import EXTENSIONS
from sharding.scan import scan
from sharding.schema import Workspace
from sharding.tables import read_parts

DEMO_PICTURES = Path("scripts/demo_pictures")
SETTINGS: dict[str, dict[str, Any]] = {
    "hash": {},
    "crops": {"find_crops": True},
    "both": {"find_crops": True, "keep_variants": True},
}
JUDGED = "crops"
"""The settings that the bars speak of."""

_PARTS_OF_OTHERS = {
    "boards/2120660.webp", "boards/2304115.webp", "boards/330845.jpg", "boards/4280776.jpg",
    "boards/5544820.jpg", "pixiv/Alesya Khoteeva/87120455_p1.jpg", "pixiv/Louis Durrant/98211034_p1.webp",
    "pixiv/Áron Kovács/92277304_p1.jpg", "wallpapers/aurora_warm.jpg", "wallpapers/sway_blue_portrait.webp",
}  # fmt: skip
"""Of the demo's pictures: parts of another one, figures before another one's background, another colour of one."""

_SMALL_PLANT = 24
_FULL_NATURAL = 300  # files
_SAME_ASPECT = 0.02  # |log ratio|
_RADIUS = 4  # imagehash's, of 64 bits
_CZKAWKA_RADIUS = 2
_ASK_CZKAWKA = """
import json, sys
from czkawka import ImageSimilarity
finder = ImageSimilarity()
finder.set_directories([sys.argv[1]])
finder.set_similarity(int(sys.argv[2]))
print(json.dumps([[str(path) for path in group] for group in finder.find_similar()]))
"""

Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Files:
    """The files that are measured. group: what shows one picture; family: what is not judged against each other."""

    root: Path
    paths: Sequence[str]
    group: npt.NDArray[np.str_]
    family: npt.NDArray[np.str_]
    kind: npt.NDArray[np.str_]
    """How a file was made from its group's base; "" in what was not planted."""
    aspect: npt.NDArray[np.float64]

    def are_true(self, left: Rows, right: Rows) -> Flags:
        is_true: Flags = self.group[left] == self.group[right]
        return is_true

    def are_judged(self, left: Rows, right: Rows) -> Flags:
        """Whether a pair counts. Two of one family but two groups do not, nor do a variant and another of its group; of
        a planted group those with the base do, not a mirrored one and a crop of it.
        """
        is_true = self.are_true(left, right)
        is_variant = (self.kind[left] == VARIANT) | (self.kind[right] == VARIANT)
        is_with_base = (
            (self.kind[left] == self.kind[right]) | (self.kind[left] == "base") | (self.kind[right] == "base")
        )
        judged: Flags = np.where(is_true, is_with_base & ~is_variant, self.family[left] != self.family[right])
        return judged

    def are_same_aspect(self, left: Rows, right: Rows) -> Flags:
        same: Flags = np.abs(np.log(self.aspect[left] / self.aspect[right])) < _SAME_ASPECT
        return same


def run(*, full: bool, data: Path | None) -> Result:
    """Measure ours with each of SETTINGS, and the peers."""
    with tempfile.TemporaryDirectory() as folder:
        files, is_natural = _files(Path(folder), data, full=full)
        turns = [] if is_natural else ["mirror"]
        found = {
            name: _ours(files, settings | {"turns": turns}, Path(folder) / name) for name, settings in SETTINGS.items()
        }
        found["imagehash"] = _imagehash(files)
        notes = []
        if python := find_czkawka():
            found["czkawka"] = _czkawka(files, python)
        else:
            notes.append(f"czkawka is not installed here, and {CZKAWKA_PYTHON} names no Python that has it")
    figures: dict[str, float] = {"files": len(files.paths)}
    for name, pairs in found.items():
        figures |= {f"{name}_{what}": value for what, value in _quality(files, pairs).items()}
    notes = [*_table(files, found), *notes]
    bars = [
        Bar(f"{JUDGED}_same_aspect_precision", at_least=0.99),
        Bar(f"{JUDGED}_same_aspect_recall", at_least=0.99),
        Bar(f"{JUDGED}_other_aspect_precision", at_least=0.98),
        Bar(f"{JUDGED}_other_aspect_recall", at_least=0.85),
    ]
    return Result(
        bench="dedupe",
        figures=figures,
        bars=bars,
        full_size=len(files.paths) >= _FULL_NATURAL if is_natural else full,
        peer=f"imagehash {version('imagehash')} phash, {_RADIUS} of 64 bits"
        + (f"; czkawka, {_CZKAWKA_RADIUS} bits" if "czkawka" in found else ""),
        notes=notes,
    )


# --- the files and their truth ---


def _files(folder: Path, data: Path | None, *, full: bool) -> tuple[Files, bool]:
    """Return what is measured, and whether it is as it was found."""
    if data is not None and (data / "truth.csv").is_file():
        with (data / "truth.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or not {"path", "group"} <= set(rows[0]):
            raise ValueError(f"{data / 'truth.csv'}: a header path,group and a row per picture are needed")
        groups = [row["group"] for row in rows]
        families = [row.get("family") or row["group"] for row in rows]
        return _measured(data, [row["path"] for row in rows], groups, families), True
    root = DEMO_PICTURES if data is None else data
    pictures = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in EXTENSIONS and not path.is_symlink()]
    if data is not None and pictures and not any(path.parent == root for path in pictures):
        groups = [path.relative_to(root).parts[0] for path in pictures]
        return _measured(root, [path.relative_to(root).as_posix() for path in pictures], groups, groups), True
    if data is None:
        pictures = _distinct_demo_pictures(pictures)
    if not pictures:
        raise FileNotFoundError(f"{root}: no pictures")
    planted = folder / "planted"
    planted.mkdir()
    truth = plant(pictures if full else pictures[:: max(len(pictures) // _SMALL_PLANT, 1)], planted)
    numbers = [str(number) for number, _ in truth.values()]
    return _measured(planted, list(truth), numbers, numbers, [kind for _, kind in truth.values()]), False


def _distinct_demo_pictures(pictures: Sequence[Path]) -> list[Path]:
    """Leave out what the demo planted itself: copies, variants, crops, broken, animated and small files."""
    expected = json.loads((DEMO_PICTURES / "expected.json").read_text(encoding="utf-8"))
    unwanted = {name for kind in ("broken", "too_small", "animated") for name in expected[kind]}
    for kind in ("near_duplicates", "exact_duplicates", "expression_variants"):
        unwanted |= {name for group in expected[kind] for name in group[1:]}
    unwanted |= _PARTS_OF_OTHERS
    return [path for path in pictures if path.relative_to(DEMO_PICTURES).as_posix() not in unwanted]


def _measured(
    root: Path, paths: Sequence[str], groups: Sequence[str], families: Sequence[str], kinds: Sequence[str] | None = None
) -> Files:
    from sharding.images import probe

    facts = [probe((root / path).read_bytes()) for path in paths]
    aspects = np.array([fact.width / fact.height for fact in facts])
    kinds = kinds or [""] * len(paths)
    return Files(root, paths, np.array(groups), np.array(families), np.array(kinds), aspects)


# --- who finds which pairs ---


def _ours(files: Files, settings: Mapping[str, Any], folder: Path) -> tuple[Rows, Rows]:
    values = {
        "name": "bench",
        "sources": {"files": {"root": str(files.root)}},
        "filters": {"min_pixels": 0, "max_aspect": 100.0},
        "dedupe": dict(settings),
    }
    config = parse_config(values, DatasetConfig, name="bench dedupe")
    workspace = Workspace(folder)
    scan(config, workspace, workers=os.cpu_count() or 1)
    dedupe(config, workspace)
    manifest = read_parts(workspace.manifest, ["key", "path"])
    place = {path: number for number, path in enumerate(files.paths)}
    files_of_key: dict[int, list[int]] = {}
    for key, path in zip(manifest.column("key").to_pylist(), manifest.column("path").to_pylist(), strict=True):
        if path in place:
            files_of_key.setdefault(int(key or "0", 16), []).append(place[path])
    pairs = [
        (left, right)
        for row in read_parts(workspace.dedupe / "pairs", ["left", "right", "kind"]).to_pylist()
        if row["kind"] != "variant"
        for left in files_of_key.get(row["left"], ())
        for right in files_of_key.get(row["right"], ())
    ]
    equal = [(a, b) for same in files_of_key.values() for a in same for b in same if a < b]
    return _as_rows([*pairs, *equal])


def _as_rows(pairs: Sequence[tuple[int, int]]) -> tuple[Rows, Rows]:
    ordered = sorted({(min(pair), max(pair)) for pair in pairs})
    rows = np.array(ordered, dtype=np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _imagehash(files: Files) -> tuple[Rows, Rows]:
    """imagehash as its README uses it: phash of what Pillow opens, all pairs compared."""
    import imagehash
    from PIL import Image

    bits = []
    for path in files.paths:
        with Image.open(files.root / path) as image:
            bits.append(imagehash.phash(image).hash.ravel())
    words = np.packbits(np.array(bits), axis=1).view(np.uint64)[:, 0]
    left, right = np.triu_indices(len(words), 1)
    is_near = np.bitwise_count(words[left] ^ words[right]) <= _RADIUS
    return left[is_near].astype(np.int64), right[is_near].astype(np.int64)


def _czkawka(files: Files, python: str) -> tuple[Rows, Rows]:
    place = {(files.root / path).resolve(): number for number, path in enumerate(files.paths)}
    with tempfile.TemporaryDirectory() as home:
        asked = subprocess.run(
            [python, "-c", _ASK_CZKAWKA, str(files.root.resolve()), str(_CZKAWKA_RADIUS)],
            check=True, capture_output=True, text=True, env={**os.environ, "HOME": home, "XDG_CACHE_HOME": home},
        )  # fmt: skip
    groups = [
        [place[Path(path).resolve()] for path in group if Path(path).resolve() in place]
        for group in json.loads(asked.stdout.splitlines()[-1])
    ]
    return _as_rows([(a, b) for group in groups for a in group for b in group if a < b])


# --- what that is worth ---


def _quality(files: Files, pairs: tuple[Rows, Rows]) -> dict[str, float]:
    """Return precision and recall over pairs of the same and of another aspect, and how often variants are apart."""
    judged = files.are_judged(*pairs)
    left, right = pairs[0][judged], pairs[1][judged]
    all_left, all_right = np.triu_indices(len(files.paths), 1)
    wanted = files.are_true(all_left, all_right) & files.are_judged(all_left, all_right)
    figures = {}
    for name, is_same in (("same_aspect", True), ("other_aspect", False)):
        here = files.are_same_aspect(left, right) == is_same
        num_true = int(files.are_true(left, right)[here].sum())
        num_wanted = int((wanted & (files.are_same_aspect(all_left, all_right) == is_same)).sum())
        figures[f"{name}_precision"] = num_true / max(int(here.sum()), 1) if here.any() else 1.0
        figures[f"{name}_recall"] = num_true / max(num_wanted, 1)
    if (files.kind == VARIANT).any():
        figures["variants_apart"] = 1 - _recall(files, pairs, VARIANT)
    return figures


def _recall(files: Files, pairs: tuple[Rows, Rows], kind: str) -> float:
    """Return the share of files of a kind that are in a pair with their base."""
    left, right = pairs
    kinds = np.stack([files.kind[left], files.kind[right]])
    is_pair = files.are_true(left, right) & (kinds == "base").any(axis=0) & (kinds == kind).any(axis=0)
    return float(is_pair.sum() / (files.kind == kind).sum())


def _table(files: Files, found: Mapping[str, tuple[Rows, Rows]]) -> list[str]:
    """Return lines: recall, and precision of the pairs that a file of the kind is in, per kind of change and finder."""
    if not (files.kind != "").any():
        return []
    lines = ["recall/precision".ljust(18) + "".join(name.rjust(14) for name in found)]
    for kind in KINDS:
        cells = []
        for pairs in found.values():
            here = files.are_judged(*pairs) & ((files.kind[pairs[0]] == kind) | (files.kind[pairs[1]] == kind))
            left, right = pairs[0][here], pairs[1][here]
            precision = f"{files.are_true(left, right).mean():.3f}" if len(left) else "-"
            cells.append(f"{_recall(files, pairs, kind):.3f}/{precision}".rjust(14))
        lines.append(kind.ljust(18) + "".join(cells))
    lines.append(f"{VARIANT}: recall is what is wrongly found; all others should be found")
    return lines
