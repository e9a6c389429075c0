"""Ask which pictures are alike: repeated frames, the same picture in two concepts, one background everywhere."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from training.dreambooth.concepts.imported import pictures_in
from training.dreambooth.doctor.fix.levels import raw_name
from training.dreambooth.doctor.patients import Notes, Patient
from training.dreambooth.doctor.pictures import Picture, read_phash

_SAME_RING = 0.12  # share of a ring's steps that may differ between two frames of one scene
_MIN_SAME = 3  # pictures: two of one scene are no pattern


def check_likeness(patients: Sequence[Patient], notes: Notes) -> None:
    """Compare every picture with every other one (a few hundred: quick enough)."""
    placed = [(patient.name, picture) for patient in patients for picture in patient.pictures]
    for (name, one), (other_name, other) in combinations(placed, 2):
        distance = _distance(one, other)
        if distance is None or _are_meant(one, other):
            continue
        rule, where = ("repeated", "") if name == other_name else ("leak", f" of {other_name}")
        notes.ask(rule, distance, name, f"{distance} of 64 bits from {other.path.name}{where}", file=one.path)
    for patient in patients:
        _check_background(patient, notes)
        _check_class_images(patient, notes)


def _check_class_images(patient: Patient, notes: Notes) -> None:
    """Compare a concept with the class images that it is given."""
    folder = patient.concept.class_images.folder
    if not folder or not Path(folder).is_dir():
        return
    own = [
        (picture.path, picture.measured.phash)
        for picture in patient.pictures
        if picture.measured and picture.measured.phash is not None
    ]
    for path in pictures_in(Path(folder)):
        phash = read_phash(path)
        for mine, bits in own if phash is not None else ():
            distance = (bits ^ (phash or 0)).bit_count()
            text = f"{distance} of 64 bits from the class image {path.name}"
            notes.ask("class_leak", distance, patient.name, text, file=mine)


def _are_meant(one: Picture, other: Picture) -> bool:
    """Tell whether they are one picture with and without its levels changed, side by side, as `--fix` writes them."""
    return raw_name(one.path) == raw_name(other.path)


def _distance(one: Picture, other: Picture) -> int | None:
    if one.measured is None or other.measured is None:
        return None
    left, right = one.measured.phash, other.measured.phash
    return None if left is None or right is None else (left ^ right).bit_count()


def _check_background(patient: Patient, notes: Notes) -> None:
    """Judge the largest group of pictures that look alike around the border with one of them."""
    rings = [
        (picture, picture.measured.ring)
        for picture in patient.pictures
        if picture.measured is not None and picture.measured.ring is not None
    ]
    largest: list[Picture] = []
    for _, ring in rings:
        group = [picture for picture, other in rings if np.mean(ring != other) <= _SAME_RING]
        largest = max(largest, group, key=len)
    if len(largest) >= _MIN_SAME:
        names = ", ".join(picture.path.name for picture in largest[:5])
        share = len(largest) / len(patient.pictures)
        notes.ask("background", share, patient.name, f"{len(largest)} pictures have one background: {names}")
