"""Ask the rules of whole concepts: how many pictures, for how long, balanced with the others, named how."""

from collections.abc import Sequence
from itertools import combinations

from training.dreambooth.doctor.names import pieces_of, shared_pieces
from training.dreambooth.doctor.patients import Notes, Patient
from training.dreambooth.doctor.tag_checks import first_tag

# The wiki: fewer than 15 images need more than 100 epochs, 80 is ideal, more images need fewer.
_FEW_IMAGES, _MANY_IMAGES = 15, 30
_EXPOSURES = 80 * 30


def check_concept(patient: Patient, notes: Notes) -> None:
    """Judge a concept's size and name."""
    count = len(patient.pictures)
    notes.ask("many_images", count, patient.name, f"{count:,} pictures")
    notes.ask("few_images", count, patient.name, f"{count:,} pictures")
    if count:
        plan = f"{count} pictures: {epochs_for(count)} epochs ({epochs_for(count) * count:,} exposures)"
        notes.ask("epochs", count, patient.name, plan)
    if count and notes.rules.training.epochs:
        share = notes.rules.training.epochs / epochs_for(count)
        plan = f"{notes.rules.training.epochs} epochs are planned, {epochs_for(count)} fit {count} pictures"
        notes.ask("epochs_many", share, patient.name, plan)
        notes.ask("epochs_few", share, patient.name, plan)
    _check_token(patient, notes)
    name = name_of(patient)
    pieces = pieces_of(name)
    notes.ask("name_pieces", len(pieces), patient.name, f"{name!r} is {len(pieces)} pieces: {' '.join(pieces)}")


def _check_token(patient: Patient, notes: Notes) -> None:
    """A token of one piece is a word that the model knows; one that stands nowhere is never trained."""
    concept = patient.concept
    if not concept.token:
        return
    is_known = len(pieces_of(concept.token)) == 1
    notes.ask("token_common", float(is_known), patient.name, f"{concept.token!r} is one piece of CLIP's vocabulary")
    replaced = [word.lower() for word in (concept.token, concept.class_images.token) if word]
    texts = [concept.prompt, *(picture.caption.text for picture in patient.pictures if picture.caption)]
    is_absent = not any(word in text.lower() for text in texts for word in replaced)
    text = f"{concept.token!r} is neither in the prompt nor in a caption"
    notes.ask("token_absent", float(is_absent), patient.name, text)


def epochs_for(num_images: int) -> int:
    """Return how often to show each picture: 120 up to 15 pictures, 80 up to 30, then as many as makes 2,400."""
    if num_images < _FEW_IMAGES:
        return 120
    return 80 if num_images <= _MANY_IMAGES else max(1, round(_EXPOSURES / num_images))


def check_together(patients: Sequence[Patient], notes: Notes) -> None:
    """Judge concepts against each other: balance, and names that begin alike."""
    shown = {patient.name: len(patient.pictures) * patient.concept.repeats for patient in patients}
    most = max(shown.values(), default=0)
    for patient in patients:
        if shown[patient.name]:
            fitting = max(1, round(most / len(patient.pictures)))
            text = f"{shown[patient.name]:,} exposures an epoch, the largest has {most:,}: repeats = {fitting} fixes it"
            notes.ask("balance", most / shown[patient.name], patient.name, text)
    for one, other in combinations(patients, 2):
        shared = shared_pieces(name_of(one), name_of(other))
        text = f"{name_of(one)!r} and {name_of(other)!r} begin with {' '.join(shared)}"
        notes.ask("name_shared", len(shared), one.name, text)


def name_of(patient: Patient) -> str:
    """Return the words a concept is called by: its token, else the first tag of most captions, else its name."""
    return patient.concept.token or first_tag(patient) or patient.name
