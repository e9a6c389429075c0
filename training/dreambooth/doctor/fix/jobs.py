"""What a concept's copies are made of: one job per picture, or per pan of frames. Decides names, writes nothing."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.dreambooth.doctor.boxes import Box
from training.dreambooth.doctor.fix.levels import CONTRAST, LEVEL
from training.dreambooth.doctor.fix.repair import Opened, open_picture
from training.dreambooth.doctor.fix.stitch import Pan, find_pans, stitch
from training.dreambooth.doctor.fix.upscale import Upscaler
from training.dreambooth.doctor.patients import Patient
from training.dreambooth.doctor.pictures import Picture
from training.dreambooth.doctor.rules import FixRules

STITCHED = "-stitched"


@dataclass(frozen=True)
class Job:
    """Make the copies of one picture. stem: its name below the new folder, without suffix; ends: what may stand by."""

    concept: str
    stem: str
    sources: tuple[Path, ...]
    caption: Path
    """May not be there."""
    ends: tuple[str, ...]
    keep: tuple[Box, ...] = ()
    pan: Pan | None = None

    def opened(self) -> Opened:
        """Read the picture, or stitch its frames. Raises ImageError."""
        if self.pan is None:
            return open_picture(self.sources[0])
        frames = [open_picture(path) for path in self.sources]
        pan = Pan(tuple(range(len(frames))), self.pan.places, self.pan.width, self.pan.height)
        image = stitch([frame.image for frame in frames], pan)
        told = (f"{len(frames)} frames stitched to {image.width}x{image.height}",)
        return Opened(image, (*frames[0].steps, *told), Box("", 0, 0, 1, 1))

    def fingerprint(self, settings: FixRules, upscaler: Upscaler | None) -> str:
        """Return a hash of all that decides what the copies are."""
        parts = [
            settings.model_dump_json(),
            upscaler.sha256 if upscaler else "",
            json.dumps([self.concept, self.stem, self.ends, [vars(box) for box in self.keep], str(self.pan)]),
            *(
                hashlib.sha256(path.read_bytes()).hexdigest()
                for path in (*self.sources, self.caption)
                if path.is_file()
            ),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def jobs_of(patient: Patient, settings: FixRules) -> tuple[list[Job], list[Picture]]:
    """Return the jobs of a concept, and the pictures that cannot be read and get no copy."""
    good = [picture for picture in patient.pictures if picture.measured is not None]
    broken = [picture for picture in patient.pictures if picture.measured is None]
    pans = find_pans(_Frames([picture.path for picture in good])) if settings.stitch else []
    framed = {number for pan in pans for number in pan.frames}
    stems = _stems(patient.concept.folder, [picture.path for picture in good])
    jobs = [
        Job(
            patient.name,
            stem,
            (picture.path,),
            _caption(patient, picture.path),
            _ends(stem, stems),
            picture.measured.subject if picture.measured else (),
        )
        for number, (picture, stem) in enumerate(zip(good, stems, strict=True))
        if number not in framed
    ]
    for pan in pans:
        sources = tuple(good[number].path for number in pan.frames)
        stem = stems[pan.frames[0]] + STITCHED
        stem += "-2" if stem in stems else ""
        jobs.append(Job(patient.name, stem, sources, _caption(patient, sources[0]), (LEVEL, CONTRAST), pan=pan))
    return jobs, broken


class _Frames(Sequence[Image.Image]):
    """Frames that are decoded when they are asked for: a whole concept at once would not fit."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Image.Image:  # type: ignore[override]
        return open_picture(self._paths[number]).image


def _caption(patient: Patient, picture: Path) -> Path:
    return picture.with_suffix(patient.concept.caption_extension)


def _stems(folder: Path, pictures: Sequence[Path]) -> list[str]:
    """Return names below the folder, without suffix: those of pictures that share a name get it behind: "a-png"."""
    plain = [path.relative_to(folder).with_suffix("").as_posix() for path in pictures]
    taken = {stem for stem in plain if plain.count(stem) == 1}
    stems = []
    for stem, path in zip(plain, pictures, strict=True):
        if stem not in taken or plain.count(stem) > 1:
            stem = f"{stem}-{path.suffix[1:].lower()}"
            while stem in taken:
                stem += "-2"
            taken.add(stem)
        stems.append(stem)
    return stems


def _ends(stem: str, stems: Sequence[str]) -> tuple[str, ...]:
    """Return which copies may be made beside one: none of what is such a copy, and none that is there."""
    if stem.endswith((LEVEL, CONTRAST)):
        return ()
    return tuple(end for end in (LEVEL, CONTRAST) if stem + end not in stems)
