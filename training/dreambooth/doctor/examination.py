"""Examine concepts: read every picture, ask every rule, collect what breaks one. Writes nothing, changes nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from training.config.concepts import ConceptConfig
from training.dreambooth.concepts.imported import pictures_in
from training.dreambooth.doctor.concept_checks import check_concept, check_together
from training.dreambooth.doctor.detector import Detector
from training.dreambooth.doctor.figure_checks import check_figures
from training.dreambooth.doctor.likeness import check_likeness
from training.dreambooth.doctor.patients import Notes, Patient
from training.dreambooth.doctor.picture_checks import check_picture
from training.dreambooth.doctor.pictures import read_picture
from training.dreambooth.doctor.rules import SEVERITIES, Finding, Rules
from training.dreambooth.doctor.set_checks import check_set
from training.dreambooth.doctor.style_checks import check_style, is_style
from training.dreambooth.doctor.tag_checks import check_captions


@dataclass(frozen=True)
class Examination:
    """The result. findings: worst first, then by concept and file."""

    patients: tuple[Patient, ...]
    rules: Rules
    findings: tuple[Finding, ...]

    def count(self, severity: str) -> int:
        """Return how many findings are of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


def examine(concepts: Sequence[ConceptConfig], rules: Rules, *, detector: Detector | None = None) -> Examination:
    """Read all pictures of all concepts and judge them. Raises OSError for files that cannot be opened.

    detector: says who is in a picture; without it, tags do.
    """
    patients = tuple(_read(concept, rules, detector) for concept in concepts)
    notes = Notes(rules)
    for patient in patients:
        for picture in patient.pictures:
            check_picture(patient, picture, notes)
        check_set(patient, notes)
        check_figures(patient, notes)
        check_captions(patient, notes)
        if is_style(patient, rules):
            check_style(patient, notes)
        check_concept(patient, notes)
    check_likeness(patients, notes)
    check_together(patients, notes)
    return Examination(patients, rules, tuple(_sorted(notes.found)))


def _read(concept: ConceptConfig, rules: Rules, detector: Detector | None) -> Patient:
    buckets = rules.training.buckets
    return Patient(
        concept,
        tuple(
            read_picture(path, caption_extension=concept.caption_extension, buckets=buckets, detector=detector)
            for path in pictures_in(concept.folder)
        ),
    )


def _sorted(found: Iterable[Finding]) -> list[Finding]:
    return sorted(found, key=lambda one: (SEVERITIES.index(one.severity), one.concept, one.rule, str(one.file or "")))
