"""What the checks pass around: a concept with its pictures, and the findings collected so far."""

from dataclasses import dataclass, field
from pathlib import Path

from training.config.concepts import FILEWORDS, ConceptConfig
from training.dreambooth.doctor.pictures import Picture
from training.dreambooth.doctor.rules import Finding, Rules


@dataclass(frozen=True)
class Patient:
    """A concept with all its pictures read."""

    concept: ConceptConfig
    pictures: tuple[Picture, ...]

    @property
    def name(self) -> str:
        return self.concept.name

    @property
    def needs_captions(self) -> bool:
        return FILEWORDS in self.concept.prompt


@dataclass
class Notes:
    """Collects findings while rules are asked; owned by one examination."""

    rules: Rules
    found: list[Finding] = field(default_factory=list)

    def ask(self, rule: str, number: float, concept: str, text: str, *, file: Path | None = None) -> None:
        """Judge a number; keep a finding when it breaks a limit of the rule."""
        verdict = self.rules.rules[rule].judge(number)
        if verdict is not None:
            self.found.append(Finding(verdict[0], rule, concept, file, float(number), verdict[1], text))
