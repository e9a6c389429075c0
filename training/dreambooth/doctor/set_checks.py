"""Ask what only shows beside the concept's other pictures: blurred for this set, captions that say nothing new."""

from collections import Counter
from statistics import median

from training.dreambooth.doctor.patients import Notes, Patient

_MIN_PICTURES = 6  # fewer have no usual sharpness


def check_set(patient: Patient, notes: Notes) -> None:
    """Judge each picture by its concept."""
    _check_sharpness(patient, notes)
    _check_same_captions(patient, notes)


def _check_sharpness(patient: Patient, notes: Notes) -> None:
    sharp = [(picture, 1 - picture.measured.numbers.blur) for picture in patient.pictures if picture.measured]
    if len(sharp) < _MIN_PICTURES:
        return
    usual = median(number for _, number in sharp)
    for picture, number in sharp:
        share = number / max(usual, 1e-6)
        text = f"{share:.2f} times as sharp as the concept's pictures are"
        notes.ask("sharpness_in_set", share, patient.name, text, file=picture.path)


def _check_same_captions(patient: Patient, notes: Notes) -> None:
    texts = [picture.caption.tags for picture in patient.pictures if picture.caption and picture.caption.tags]
    if len(texts) < _MIN_PICTURES:
        return
    most, count = Counter(texts).most_common(1)[0]
    notes.ask("same_captions", count / len(texts), patient.name, f"{count} of {len(texts)} say {', '.join(most)!r}")
