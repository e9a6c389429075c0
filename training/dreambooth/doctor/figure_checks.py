"""Ask the rules of who is in a picture, by what a detector found: alone, large enough, with a face to be seen."""

from collections.abc import Sequence
from statistics import median

from training.dreambooth.doctor.boxes import FACE, PERSON, Box
from training.dreambooth.doctor.patients import Notes, Patient
from training.dreambooth.doctor.pictures import Picture

_CLOSE_FACE = 0.25  # of the picture
_MIN_FACES = 4  # pictures: the shape of fewer faces says nothing


def check_figures(patient: Patient, notes: Notes) -> None:
    """Judge what a detector saw, if one was asked."""
    found = [(picture, seen_in_crop(picture)) for picture in patient.pictures if _was_asked(picture)]
    for picture, boxes in found:
        _check_picture(patient, picture, boxes, notes)
    faces = [
        (picture, max(own, key=lambda box: box.area))
        for picture, boxes in found
        if (own := [box for box in boxes if box.label == FACE])
    ]
    if len(faces) < _MIN_FACES:
        return
    close = sum(face.area > _CLOSE_FACE for _, face in faces)
    notes.ask("close_ups", close / len(found), patient.name, f"{close} of {len(found)} are close-ups, by their faces")
    _check_shapes(patient, faces, notes)
    for picture, boxes in found:
        _check_face(patient, picture, boxes, notes)


def seen_in_crop(picture: Picture) -> list[Box]:
    """Return what was found as shares of the picture as it is trained; what the crop cuts off is not there."""
    if picture.measured is None:
        return []
    window, boxes = picture.measured.window, []
    width, height = window.right - window.left, window.bottom - window.top
    for box in picture.measured.boxes or ():
        across = [min(max((side - window.left) / width, 0), 1) for side in (box.left, box.right)]
        down = [min(max((side - window.top) / height, 0), 1) for side in (box.top, box.bottom)]
        seen = Box(box.label, across[0], down[0], across[1], down[1], box.score)
        if seen.area > 0:
            boxes.append(seen)
    return boxes


def _was_asked(picture: Picture) -> bool:
    return picture.measured is not None and picture.measured.boxes is not None


def _check_picture(patient: Patient, picture: Picture, boxes: Sequence[Box], notes: Notes) -> None:
    persons = sorted((box for box in boxes if box.label == PERSON), key=lambda box: -box.area)
    if not persons:
        return
    subject, others = persons[0], persons[1:]
    area = sum(box.area - box.shared(subject) for box in others)
    text = f"others ({len(others)}) cover {area:.0%} of the crop"
    notes.ask("others_area", area, patient.name, text, file=picture.path)
    text = f"the figure covers {subject.area:.0%} of the crop"
    notes.ask("subject_share", subject.area, patient.name, text, file=picture.path)


def _check_face(patient: Patient, picture: Picture, boxes: Sequence[Box], notes: Notes) -> None:
    """A figure that is not said to look away and has no face: something covers it."""
    words = notes.rules.words
    looks_away = picture.caption is not None and any(tag in words.away for tag in picture.caption.tags)
    has_person = any(box.label == PERSON for box in boxes)
    is_unseen = has_person and not looks_away and not any(box.label == FACE for box in boxes)
    text = "no face is found on the figure, and no tag says that it looks away"
    notes.ask("face_unseen", float(is_unseen), patient.name, text, file=picture.path)


def _check_shapes(patient: Patient, faces: Sequence[tuple[Picture, Box]], notes: Notes) -> None:
    """A face much wider or narrower than the concept's others: the picture is squeezed."""
    shapes = [(picture, face, _shape(picture, face)) for picture, face in faces]
    usual = median(shape for _, _, shape in shapes)
    for picture, face, shape in shapes:
        touches = face.left <= 0 or face.top <= 0 or face.right >= 1 or face.bottom >= 1
        ratio = max(shape / usual, usual / shape) if not touches else 1.0
        text = f"its face is {shape:.2f} times as wide as high, the concept's are {usual:.2f} times"
        notes.ask("squeezed_face", ratio, patient.name, text, file=picture.path)


def _shape(picture: Picture, face: Box) -> float:
    """Return a face's width by its height, in pixels of the crop."""
    width, height = (int(side) for side in picture.measured.bucket.split("x")) if picture.measured else (1, 1)
    return (face.right - face.left) * width / max((face.bottom - face.top) * height, 1e-9)
