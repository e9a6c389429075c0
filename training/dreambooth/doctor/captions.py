"""A caption file: its bytes → tags, and what is wrong with its form."""

import codecs
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Caption:
    """What stands beside a picture. tags: lower case, without doubles; faults: of its form, for people."""

    text: str
    tags: tuple[str, ...]
    faults: tuple[str, ...] = ()
    is_decodable: bool = True


def read_caption(path: Path) -> Caption | None:
    """Read a caption file; None when there is none."""
    try:
        return parse_caption(path.read_bytes())
    except FileNotFoundError:
        return None


def parse_caption(data: bytes) -> Caption:
    """Decode a caption and look at its form; what is not UTF-8 is read as Latin-1 and marked."""
    faults = []
    if data.startswith(codecs.BOM_UTF8):
        faults.append("begins with a byte order mark")
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
        is_decodable = True
    except UnicodeDecodeError:
        text, is_decodable = data.decode("latin-1"), False
    faults += _faults(text)
    tags = [tag for tag in (part.strip().lower() for part in re.split(r"[,\n]", text)) if tag]
    doubled = [tag for tag, count in Counter(tags).items() if count > 1]
    if doubled:
        faults.append(f"{doubled[0]!r} comes twice")
    return Caption(text.strip(), tuple(dict.fromkeys(tags)), tuple(faults), is_decodable)


def _faults(text: str) -> list[str]:
    body = text.strip()
    if not body:
        return ["is empty"]
    looked_for = (
        ("\r" in text, "has line ends of Windows"),
        ("\t" in text, "has tabs"),
        ("\n" in body, "has several lines"),
        ("�" in text or "Ã" in text, "has letters that were decoded wrongly once"),
        (body.endswith(","), "ends with a comma"),
        (bool(re.search(r",\s*,", body)), "has an empty tag"),
        (bool(re.search(r"\w_\w", body)) and " " in body.replace(", ", ","), "mixes underscores with spaces"),
    )
    return [fault for is_so, fault in looked_for if is_so]
