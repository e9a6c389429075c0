"""Draw some duplicate groups into one PNG, to be looked at before one believes them.

A row per group, those nearest to the threshold first: the keeper at the left, then those dropped for it, farthest
first, each with its kind, distance and deciding rule, size and path. Reads the source files, decides nothing.

    python -m sharding dedupe contact-sheet configs/datasets/X.toml --output groups.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sharding.config import DatasetConfig
from sharding.files import replacing
from sharding.images import ImageError, decode_rgb
from sharding.pictures.phash import hash_bits
from sharding.reporting.questions import Questions, rows_of
from sharding.schema import GROUPS, MANIFEST, Workspace
from sharding.sources import read_file
from sharding.tables import list_parts

TILE = 240
MAX_SHOWN = 5
"""Members of a group that are drawn; the others are counted."""
_LINE = 13
_TEXT_LINES = 4
_MARGIN = 8
_GREY, _BLACK, _WHITE = (200, 200, 200), (0, 0, 0), (255, 255, 255)

Row = dict[str, Any]


@dataclass(frozen=True)
class ContactSheet:
    """What was drawn."""

    output: Path
    num_groups: int
    num_all_groups: int
    num_unreadable: int

    def summary(self) -> str:
        """Return what was drawn and where it is."""
        lines = [
            f"{self.output}: {self.num_groups:,} of {self.num_all_groups:,} groups, nearest to the threshold first"
        ]
        if self.num_unreadable:
            lines.append(f"{self.num_unreadable:,} pictures could not be read")
        return "\n".join(lines)


def draw_contact_sheet(
    config: DatasetConfig, workspace: Workspace, output: Path, *, num_groups: int = 20
) -> ContactSheet:  # fmt: skip
    """Draw `num_groups` groups into a PNG. Groups of identical bytes alone are left out.

    Raises FileNotFoundError before dedupe has run, ValueError when there is no group or `output` is no PNG.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output}: must end in .png")
    groups, num_all = _nearest_to_threshold(workspace, num_groups, crop_distance=config.dedupe.radius)
    if not groups:
        raise ValueError(f"{workspace.dedupe / 'groups'}: no group of near-duplicates; there is nothing to draw")
    font = ImageFont.load_default(11)
    width = _MARGIN + (TILE + _MARGIN) * max(min(len(group), MAX_SHOWN) for group in groups)
    row_height = TILE + _LINE * _TEXT_LINES + 2 * _MARGIN
    sheet = Image.new("RGB", (width, row_height * len(groups) + _MARGIN), _WHITE)
    draw = ImageDraw.Draw(sheet)
    num_unreadable = 0
    for number, group in enumerate(groups):
        top = _MARGIN + number * row_height
        for place, member in enumerate(group[:MAX_SHOWN]):
            left = _MARGIN + place * (TILE + _MARGIN)
            tile = _tile(config, member)
            num_unreadable += tile is None
            draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=_GREY)
            if tile is not None:
                sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            lines = _caption(config, member, len(group) - MAX_SHOWN if place == MAX_SHOWN - 1 else 0)
            for line, text in enumerate(lines):
                draw.text((left, top + TILE + 2 + line * _LINE), _shorten(draw, text, font), fill=_BLACK, font=font)
    with replacing(output) as temporary:
        sheet.save(temporary, "PNG")
    return ContactSheet(output, len(groups), num_all, num_unreadable)


def _nearest_to_threshold(workspace: Workspace, num_groups: int, *, crop_distance: int) -> tuple[list[list[Row]], int]:
    """Return the members of the groups with the greatest distances, keepers first, and the number of all such groups.

    A crop has no distance and counts as crop_distance.
    """
    parts = list_parts(workspace.dedupe / "groups")
    if not parts:
        raise FileNotFoundError(f"{workspace.dedupe / 'groups'}: no parts; run `python -m sharding dedupe` first")
    table = rows_of(parts, GROUPS)
    bits = f"coalesce(distance, {crop_distance})"
    with Questions() as questions:
        like = f"from {table} where kind not in ('', 'exact')"
        num_all = questions.ask_one(f'select count(distinct "group") as n {like}')["n"]
        rows = questions.ask(
            f"""
            with chosen as (
                select "group", max({bits}) as farthest {like}
                group by "group" order by farthest desc, "group" limit {num_groups}),
            members as (
                select distinct on ("group", key) groups.*, farthest from {table} as groups join chosen using ("group")
                order by "group", key, is_keeper desc)
            select members.*, source, path, width, height, format, num_bytes
            from members join (
                select distinct on (key) * from {rows_of(list_parts(workspace.manifest), MANIFEST)}
                where status = 'kept' order by key, source, path) using (key)
            order by farthest desc, "group", is_keeper desc, {bits} desc, key
            """
        )
    return [list(members) for _, members in groupby(rows, key=lambda row: row["group"])], num_all


def _tile(config: DatasetConfig, member: Row) -> Image.Image | None:
    if member["source"] not in config.sources:
        return None
    try:
        data = read_file(config.sources[member["source"]].root, member["path"])
        image = decode_rgb(data, min_side=TILE, max_pixels=config.filters.max_pixels)
    except (OSError, ImageError):
        return None  # counted, and its place stays grey
    image.thumbnail((TILE, TILE))
    return image


def _caption(config: DatasetConfig, member: Row, num_hidden: int) -> Sequence[str]:
    bits = hash_bits(config.dedupe.algorithm, config.dedupe.hash_size)
    if member["is_keeper"]:
        first = f"KEPT by {member['rule']}"
    elif member["distance"] is None:
        first = f"{member['kind']}, dropped by {member['rule']}"
    else:
        first = f"{member['kind']}, {member['distance']} of {bits} bits, dropped by {member['rule']}"
    lines = [
        first,
        f"{member['width']}x{member['height']} {member['format']} {member['num_bytes']:,} bytes",
        f"{member['key']}  {member['source']}",
        member["path"],
    ]
    return [*lines[:2], f"and {num_hidden:,} more in the group", lines[3]] if num_hidden > 0 else lines


def _shorten(draw: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    """Cut the front off a text that is wider than a tile."""
    if draw.textlength(text, font=font) <= TILE:
        return text
    while text and draw.textlength("…" + text, font=font) > TILE:
        text = text[1:]
    return "…" + text
