"""doctor: how often the data set doctor finds a planted fault, and how often it cries wolf.

Without --data, on scripts/demo_pictures, on which its limits were set; with a folder, on pictures of it, without those
that look like one of the demo's. Each fault of `scripts.bench.doctor_faults` is planted in a third of the pictures,
and beside them stand others as they were. A finding on a clean picture counts as false, also where the picture really
has the fault: nobody has looked. Quiet is a clean picture without a warning or worse. What is found on a clean
picture is not counted a second time for its altered versions.

    python -m scripts.bench doctor [--full] [--data DIR]
"""

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scripts.bench.doctor_faults import FAULTS
from scripts.bench.result import Bar, Result
from sharding.images import EXTENSIONS, ImageError, decode_rgb, hash_picture, is_flat
from training.config.concepts import ConceptConfig
from training.dreambooth.doctor.examination import Examination, examine
from training.dreambooth.doctor.rules import load_rules

DEMO_PICTURES = Path("scripts/demo_pictures")
_CLEAN, _CLEAN_FULL = 24, 80
_MIN_SIDE, _MAX_SIDE = 512, 1600  # pixels: smaller pictures have a fault already; larger ones only take longer
_SEED = 7
_ALIKE = 8  # of 64 bits
_JPEG_QUALITY = (15, 35, 50)
_OF_PICTURES = frozenset(rule for fault in FAULTS.values() for rule in (*fault.rules, *fault.follows)) | {"text"}


@dataclass(frozen=True)
class Seen:
    """A finding: the fault that was planted ("clean": none), the rule, the picture. is_note: of the mildest kind."""

    planted: str
    rule: str
    picture: str
    is_note: bool = False


def run(*, full: bool, data: Path | None) -> Result:
    """Plant, examine, count."""
    pictures = dict(_pictures(data or DEMO_PICTURES, _CLEAN_FULL if full else _CLEAN, leave_out=data is not None))
    if not pictures:
        raise ValueError(f"{data}: no picture with sides of at least {_MIN_SIDE} pixels that is not the demo's, too")
    with tempfile.TemporaryDirectory() as folder:
        concepts, planted = _write(Path(folder), pictures)
        findings = _seen(examine(concepts, load_rules(overrides=["rules.leak.off=true"])))
    figures, notes = _judged(findings, planted, list(pictures))
    bars = [Bar("recall", at_least=0.9), Bar("precision", at_least=0.9), Bar("clean_quiet_fraction", at_least=0.9)]
    return Result("doctor", figures, bars, full, "the wiki asks people to check every picture by hand", notes)


def _pictures(folder: Path, wanted: int, *, leave_out: bool) -> Iterator[tuple[str, Image.Image]]:
    """Yield so many pictures of a folder, drawn at random and all different, made no larger than needed."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    random.Random(_SEED).shuffle(paths)
    seen = [_hash(image) for image in _decoded(sorted(DEMO_PICTURES.rglob("*")))] if leave_out else []
    for number, image in enumerate(_decoded(paths)):
        if wanted == 0:
            return
        phash = _hash(image)
        if (
            min(image.size) < _MIN_SIDE
            or is_flat(image)
            or any((phash ^ other).bit_count() <= _ALIKE for other in seen)
        ):
            continue
        seen.append(phash)
        wanted -= 1
        yield f"{number:04}", image


def _decoded(paths: Sequence[Path]) -> Iterator[Image.Image]:
    for path in paths:
        if path.suffix.lower() not in EXTENSIONS:
            continue
        try:
            image = decode_rgb(path.read_bytes(), min_side=_MIN_SIDE)
        except ImageError:
            continue
        image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        yield image


def _hash(image: Image.Image) -> int:
    return int.from_bytes(hash_picture(image, algorithm="phash", hash_size=8))


def _write(root: Path, pictures: dict[str, Image.Image]) -> tuple[list[ConceptConfig], dict[str, list[str]]]:
    """Write one concept with the clean pictures, and one per fault: a third altered beside others as they were."""
    planted: dict[str, list[str]] = {}
    names = list(pictures)
    concepts = [_concept(root, "clean", pictures)]
    for turn, (fault, how) in enumerate(FAULTS.items()):
        chosen = planted[fault] = names[turn % 3 :: 3]
        altered = {f"{name}": how.change(pictures[name], number) for number, name in enumerate(chosen)}
        beside = {
            f"{name}-as-it-was": pictures[name]
            for name in (chosen if fault == "repeated" else names[(turn + 1) % 3 :: 3])
        }
        concepts.append(_concept(root, fault, altered | beside))
    return concepts, planted


def _concept(root: Path, name: str, pictures: dict[str, Image.Image]) -> ConceptConfig:
    folder = root / name
    folder.mkdir()
    for number, (stem, image) in enumerate(pictures.items()):
        if name == "jpeg_file" and not stem.endswith("-as-it-was"):
            image.save(folder / f"{stem}.jpg", quality=_JPEG_QUALITY[number % len(_JPEG_QUALITY)])
        else:
            image.save(folder / f"{stem}.bmp")
    return ConceptConfig(name=name, folder=folder, prompt="a picture")


def _seen(examination: Examination) -> set[Seen]:
    return {
        Seen(one.concept, one.rule, one.file.stem, one.severity == "note")
        for one in examination.findings
        if one.file is not None and one.rule in _OF_PICTURES
    }


def _judged(
    findings: set[Seen], planted: dict[str, list[str]], names: Sequence[str]
) -> tuple[dict[str, float], list[str]]:
    natural = {(one.rule, one.picture) for one in findings if one.planted == "clean"}
    false = {rule: sum(seen == rule for seen, _ in natural) for rule in sorted(_OF_PICTURES)}
    right, figures, missed = 0, {}, []
    for fault, chosen in planted.items():
        found = {one.picture.removesuffix("-as-it-was") for one in findings
                 if one.planted == fault and one.rule in FAULTS[fault].rules}  # fmt: skip
        figures[f"recall_{fault}"] = len(found & set(chosen)) / len(chosen)
        right += len(found & set(chosen))
        missed += [f"{fault}/{name}" for name in chosen if name not in found]
    alarms = [one for one in findings if _is_false(one, natural)]
    for one in alarms:
        false[one.rule] += 1
    total = sum(len(chosen) for chosen in planted.values())
    wrong = sum(false.values())
    loud = {one.picture for one in findings if one.planted == "clean" and not one.is_note}
    summed = {
        "recall": right / total,
        "precision": right / (right + wrong) if right else 0.0,
        "clean_quiet_fraction": 1 - len(loud) / len(names),
        "clean_without_note_fraction": 1 - len({name for _, name in natural}) / len(names),
        "clean_pictures": float(len(names)),
        "planted_pictures": float(total),
    }
    notes = ["false alarms on clean pictures + on altered ones, by rule: "]
    notes += [
        f"  {rule:18} {sum(seen == rule for seen, _ in natural):3} + {sum(one.rule == rule for one in alarms)}"
        for rule, count in false.items()
        if count
    ]
    notes.append(
        "altered: " + (" ".join(sorted(f"{one.rule}/{one.planted}/{one.picture}" for one in alarms)) or "none")
    )
    notes.append(f"clean: {' '.join(sorted(f'{rule}/{name}' for rule, name in natural)) or 'nothing'}")
    notes.append(f"missed: {' '.join(missed) or 'nothing'}")
    return summed | figures, notes


def _is_false(one: Seen, natural: set[tuple[str, str]]) -> bool:
    if one.planted == "clean":
        return False
    name = one.picture.removesuffix("-as-it-was")
    fault = FAULTS[one.planted]
    is_altered = one.picture == name
    expected = is_altered and one.rule in fault.rules | fault.follows
    return (
        not expected and (one.rule, name) not in natural and not (one.planted == "repeated" and one.rule == "repeated")
    )
