"""Ask the rules of single pictures."""

from training.dreambooth.doctor.patients import Notes, Patient
from training.dreambooth.doctor.pictures import Measured, Picture, is_anamorphic

_SUBTITLE_FROM = 0.7  # of the height: subtitles end below this
_SUBTITLE_OFF_CENTRE = 0.08  # of the width


def check_picture(patient: Patient, picture: Picture, notes: Notes) -> None:
    """Judge a picture by its pixels and its file."""
    clashing = [other.path for other in patient.pictures if other.path.with_suffix("") == picture.path.with_suffix("")]
    others = [path.name for path in clashing if path != picture.path]
    notes.ask("name_clash", len(others), patient.name, f"{', '.join(others)} has its caption, too", file=picture.path)
    if picture.measured is None:
        notes.ask("broken_file", 1, patient.name, picture.error, file=picture.path)
        return
    measured = picture.measured
    for rule, number, text in [*_of_pixels(measured), *_of_shape(measured), *_of_traces(measured)]:
        notes.ask(rule, number, patient.name, text, file=picture.path)


def _of_pixels(measured: Measured) -> list[tuple[str, float, str]]:
    numbers = measured.numbers
    widths = [
        box.right - box.left
        for box in measured.text
        if box.bottom > _SUBTITLE_FROM and abs((box.left + box.right) / 2 - 0.5) < _SUBTITLE_OFF_CENTRE
    ]
    area = sum(box.area for box in measured.text)
    return [
        ("sharpness", numbers.blur, f"blur {numbers.blur:.2f} of 1"),
        ("darkness", numbers.lit_luma, f"mean brightness {numbers.lit_luma:.2f}"),
        ("over_exposure", numbers.burnt_fraction, f"{numbers.burnt_fraction:.0%} of its pixels are burnt out"),
        ("too_bright", numbers.mean_luma, f"mean brightness {numbers.mean_luma:.2f}"),
        ("contrast", numbers.contrast, f"contrast {numbers.contrast:.2f} of 1"),
        ("colour_cast", numbers.cast, f"black or white points of the channels differ by {numbers.cast:.2f}"),
        ("subtitle", max(widths, default=0.0), f"a line of text over {max(widths, default=0):.0%} of its width"),
        ("text", area, f"text covers {area:.0%}"),
    ]


def _of_shape(measured: Measured) -> list[tuple[str, float, str]]:
    facts, bars = measured.facts, measured.bars
    size = f"{facts.width}x{facts.height}"
    oddities = [
        name
        for is_so, name in (
            (facts.is_animated, "animated"),
            (facts.has_alpha, "has transparency"),
            (facts.mode in ("CMYK", "I;16", "I", "F"), f"mode {facts.mode}"),
        )
        if is_so
    ]
    is_stretched = is_anamorphic(facts.width, facts.height) or abs(measured.pixel_aspect - 1) > 0.02
    sides = [
        f"{name} {share:.0%}"
        for name, share in (("top", bars.top), ("bottom", bars.bottom), ("left", bars.left), ("right", bars.right))
        if share
    ]
    return [
        ("odd_file", len(oddities), ", ".join(oddities)),
        ("size", measured.upscale, f"{size} is enlarged {measured.upscale:.2f} times to {measured.bucket}"),
        ("squeezed", float(is_stretched), f"{size} is a size of film, or the file says its pixels are not square"),
        ("aspect", measured.crop_loss, f"{size} loses {measured.crop_loss:.0%} to {measured.bucket}"),
        ("borders", bars.largest, f"bars: {', '.join(sides)}"),
    ]


def _of_traces(measured: Measured) -> list[tuple[str, float, str]]:
    traces, facts = measured.traces, measured.facts
    own = f"{round(facts.width * traces.detail)}x{round(facts.height * traces.detail)}"
    enlarged = measured.upscale / traces.detail if traces.detail < 1 else 0.0
    quality = traces.jpeg_quality
    return [
        ("enlarged", enlarged, f"shows no more than {own} would: enlarged {enlarged:.2f} times to {measured.bucket}"),
        ("stretched", traces.stretch, f"its detail is {traces.stretch:.2f} times finer one way than the other"),
        ("blockiness", traces.blockiness, f"steps of {traces.blockiness:.1f} levels between blocks of 8x8 pixels"),
        ("jpeg_quality", 100 if quality is None else quality, f"a JPEG of quality {quality}"),
    ]
