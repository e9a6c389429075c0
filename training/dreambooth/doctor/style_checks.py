"""Ask the rules of a set that teaches an artist's style: one artist in every caption, different characters.

Which concepts are styles: those that `training.styles` of the rules names, and those in a folder "Artwork" or "Style".
"""

from collections import Counter
from collections.abc import Sequence

from training.dreambooth.doctor.patients import Notes, Patient
from training.dreambooth.doctor.rules import Rules, Words

_FOLDERS = {"artwork", "artworks", "style", "styles", "artist", "artists"}
_MARKS = ("artist:", "by ")


def is_style(patient: Patient, rules: Rules) -> bool:
    """Tell whether a concept is a style."""
    folder = patient.concept.folder
    return patient.name in rules.training.styles or bool({folder.name.lower(), folder.parent.name.lower()} & _FOLDERS)


def check_style(patient: Patient, notes: Notes) -> None:
    """Judge the captions of a style."""
    captions = [(picture.path, picture.caption.tags) for picture in patient.pictures if picture.caption]
    tagged = [tags for _, tags in captions if tags]
    if not tagged:
        return
    artist = artist_of(patient, tagged, notes.rules.words)
    for path, tags in captions:
        text = f"{artist!r} is not in its caption"
        notes.ask("style_artist", float(bool(tags) and artist not in tags), patient.name, text, file=path)
    artists = {tag for tags in tagged for tag in tags if tag in notes.rules.words.artists or tag.startswith(_MARKS)}
    text = f"{len(artists)} artists: {', '.join(sorted(artists))}"
    notes.ask("style_artists", len(artists), patient.name, text)
    characters = num_characters_of(tagged, artist, notes.rules.words)
    text = f"tags tell of {characters} different characters in {len(tagged)} captions"
    notes.ask("style_characters", characters, patient.name, text)


def artist_of(patient: Patient, tagged: Sequence[Sequence[str]], words: Words) -> str:
    """Return the tag that names the artist: a known one, the concept's token or name, else the most frequent tag."""
    counts = Counter(tag for tags in tagged for tag in tags)
    own = [name.lower().replace("_", " ") for name in (patient.concept.token, patient.name) if name]
    named = [*(tag for tag, _ in counts.most_common() if tag in words.artists or tag.startswith(_MARKS)), *own]
    return next((name for name in named if name in counts), counts.most_common(1)[0][0])


def num_characters_of(tagged: Sequence[Sequence[str]], artist: str, words: Words) -> int:
    """Return how many looks (hair and eyes) captions describe; without such tags, how many first names they have."""
    looks = {frozenset(tag for tag in tags if tag.split()[-1] in words.defaults) for tags in tagged} - {frozenset()}
    names = {next((tag for tag in tags if tag != artist), "") for tags in tagged} - {""}
    return len(looks) if looks else len(names)
