"""The tables of a workspace: their columns and where they lie. DESIGN section 4 in code.

Nothing here reads or writes files; `tables` does.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1

RATINGS = ("general", "sensitive", "questionable", "explicit")
TAG_CATEGORIES = ("general", "character", "copyright", "artist", "meta")

_STRINGS = pa.list_(pa.string())

LISTING = pa.schema([("source", pa.string()), ("path", pa.string()), ("num_bytes", pa.int64())])

MANIFEST = pa.schema(
    [
        ("key", pa.string()),  # first 16 hex digits of sha256; "" when the file could not be read
        ("sha256", pa.string()),
        ("dataset", pa.string()),  # the source's `dataset`; "{period}" means: filed by date at plan time
        ("source", pa.string()),
        ("path", pa.string()),  # relative to the source root, "/" separated
        ("num_bytes", pa.int64()),
        ("format", pa.string()),  # of the content, lower case: jpeg png webp avif jxl gif bmp tiff
        ("width", pa.int32()),  # after EXIF rotation
        ("height", pa.int32()),
        ("mode", pa.string()),  # Pillow's mode as stored: RGB RGBA P L LA CMYK I;16 …
        ("has_alpha", pa.bool_()),
        ("is_animated", pa.bool_()),
        ("is_pass_through", pa.bool_()),  # JPEG or PNG, upright, sRGB, no alpha: packed without re-encoding
        ("created_at", pa.timestamp("ms", tz="UTC")),  # whole seconds (Parquet has no "s"); null when nothing says
        ("date_source", pa.string()),  # post, exif, path or ""
        ("phash", pa.binary()),  # perceptual hash, big-endian bits; empty when not decodable
        ("turned_phashes", pa.binary()),  # hashes of the turned picture, in the order of dedupe.turns, joined
        ("sketch", pa.binary()),  # small picture for dedupe's second look; empty unless asked for
        ("local_features", pa.binary()),  # for finding crops; empty unless asked for
        ("rating", pa.string()),  # one of RATINGS or ""
        ("tags_general", _STRINGS),
        ("tags_character", _STRINGS),
        ("tags_copyright", _STRINGS),
        ("tags_artist", _STRINGS),
        ("tags_meta", _STRINGS),
        ("custom", pa.map_(pa.string(), pa.string())),  # what an importer knows: artist_name, vn_name, vn_short, …
        ("status", pa.string()),  # kept, or the snake_case drop reason
        ("detail", pa.string()),  # the evidence for the status
    ]
)

DROPS = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("path", pa.string()),
        ("stage", pa.string()),  # scan, dedupe, plan, pack
        ("reason", pa.string()),
        ("kept_key", pa.string()),  # the keeper, for duplicates
        ("distance", pa.int32()),  # Hamming distance to the keeper, null otherwise
        ("detail", pa.string()),
    ]
)

GROUPS = pa.schema(
    [
        ("group", pa.int64()),
        ("key", pa.string()),
        ("is_keeper", pa.bool_()),
        ("distance", pa.int32()),  # to the keeper, bits; null for a crop
        ("rule", pa.string()),  # what decided, one of keepers.RULES
        ("kind", pa.string()),  # how it is like its keeper: exact, near, turned, crop; "" for a keeper
    ]
)

PAIRS = pa.schema(
    [
        ("left", pa.uint64()),  # keys as numbers, left < right
        ("right", pa.uint64()),
        ("distance", pa.int32()),  # bits; null for a crop
        ("kind", pa.string()),  # one of PAIR_KINDS
    ]
)
PAIR_KINDS = ("near", "turned", "crop", "variant")
"""near and turned: by hash; crop: one is a part of the other; variant: near, but the pictures differ in a detail."""

RELATIVES = pa.schema([("component", pa.int64()), ("key", pa.string())])  # kept keys that look alike, see dedupe

DECISIONS = pa.schema(
    [
        ("key", pa.string()),
        ("decision", pa.string()),  # one of DECISION_KINDS
        ("who", pa.string()),
        ("why", pa.string()),
    ]
)
DECISION_KINDS = ("keep", "drop", "not_a_duplicate", "preferred_keeper")

TAGGER = pa.schema(
    [
        ("key", pa.string()),
        ("rating_probs", pa.list_(pa.float32())),  # in the order of RATINGS; empty when the model has none
        ("tag_ids", pa.list_(pa.int32())),  # row numbers of the model's label file, ascending
        ("tag_probs", pa.list_(pa.float32())),  # of tag_ids; all >= the stored floor
        ("status", pa.string()),  # ok, or why there is no result
    ]
)

LABELS = pa.schema([("tag_id", pa.int32()), ("name", pa.string()), ("category", pa.string())])

SCORES = pa.schema([("key", pa.string()), ("score", pa.float32()), ("status", pa.string())])

TEXTS = pa.schema(  # what a captioner said
    [
        ("key", pa.string()),
        ("text", pa.string()),  # cleaned by the rules that the part's metadata names; null without a result
        ("prompt", pa.string()),  # what it was asked, hints filled in
        ("status", pa.string()),
    ]
)

TAG_GROUP = pa.struct([("group", pa.string()), ("tags", _STRINGS)])

CAPTIONS = pa.schema([("key", pa.string()), ("text", pa.string()), ("groups", pa.list_(TAG_GROUP))])

EDITS = pa.schema(
    [
        ("edit", pa.int32()),  # number of the edit, from 1; one part each
        ("key", pa.string()),
        ("group", pa.string()),  # of words, as in CAPTIONS
        ("before", _STRINGS),  # its words when the edit was made
        ("after", _STRINGS),
        ("operation", pa.string()),  # what was asked for
        ("who", pa.string()),
        ("when", pa.timestamp("ms", tz="UTC")),
        ("why", pa.string()),
    ]
)

PLAN = pa.schema(
    [
        ("key", pa.string()),
        ("dataset", pa.string()),
        ("period", pa.string()),  # "" without a date
        ("chunk", pa.int32()),  # number within the dataset, from 0; HELD_OUT for the validation chunk
        ("position", pa.int32()),  # within the chunk, from 0
        ("repeats", pa.int32()),
        ("loss_weight", pa.float32()),
    ]
)

HELD_OUT = -1
"""Number of a dataset's validation chunk, whose name is DATASET/held-out. No run trains it."""

INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # path of the tar relative to the chunk's folder, "/" separated
        ("shard_sha256", pa.string()),
        ("image_name", pa.string()),  # member name, KEY.jpg or KEY.png
        ("image_offset", pa.int64()),  # of the member's bytes in the tar
        ("image_bytes", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_bytes", pa.int64()),
        ("txt_offset", pa.int64()),
        ("txt_bytes", pa.int64()),
        ("mask_offset", pa.int64()),  # of KEY.mask.png; 0 bytes when the sample has no mask
        ("mask_bytes", pa.int64()),
        ("width", pa.int32()),  # of the stored image
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("groups", pa.list_(TAG_GROUP)),
        ("dataset", pa.string()),
        ("period", pa.string()),
        ("repeats", pa.int32()),
        ("loss_weight", pa.float32()),
        ("sha256", pa.string()),  # of the stored image bytes
    ]
)

OF_CONCEPTS = pa.schema(  # columns that the index of packed concepts has, too
    [
        ("concept", pa.string()),  # the concept's name; of a class image NAME/class
        ("every_epochs", pa.int32()),  # shown in the epochs e with e % every_epochs == epoch_offset
        ("epoch_offset", pa.int32()),
    ]
)


def index_schema(names: Collection[str]) -> pa.Schema:
    """Return the schema of an index with these columns: INDEX, and those of OF_CONCEPTS that it has."""
    return pa.schema([*INDEX, *(field for field in OF_CONCEPTS if field.name in names)])


def drop_row(
    record: Mapping[str, Any], *, stage: str, reason: str, detail: str, kept_key: str = "", distance: int | None = None
) -> dict[str, Any]:
    """Return a row of DROPS for a record, of which key, source and path are used."""
    return {
        **{name: record[name] for name in ("key", "source", "path")},
        "stage": stage, "reason": reason, "kept_key": kept_key, "distance": distance, "detail": detail,
    }  # fmt: skip


@dataclass(frozen=True)
class Workspace:
    """Where the tables of a workspace lie. Purely names; nothing is created."""

    root: Path

    @property
    def listing(self) -> Path:
        """Frozen lists of files, one part of which becomes one part of the manifest."""
        return self.root / "listing"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest"

    @property
    def dedupe(self) -> Path:
        """Folders of parts: `pairs` (PAIRS), `groups` (GROUPS), `relatives` (RELATIVES), `drops` (DROPS), `kept`."""
        return self.root / "dedupe"

    @property
    def kept(self) -> Path:
        """What stays after dedupe: for each part of the manifest the part of the same name, schema MANIFEST.

        One row per key, with the tags and dates of its duplicates merged in. All later stages read this.
        """
        return self.root / "dedupe" / "kept"

    @property
    def decisions(self) -> Path:
        """`part-*.parquet` (DECISIONS): what people have decided; overrides filters and dedupe."""
        return self.root / "decisions"

    def annotations(self, model: str) -> Path:
        return self.root / "annotations" / model

    def captions(self, policy: str) -> Path:
        return self.root / "captions" / policy

    def edits(self, policy: str) -> Path:
        """`part-*.parquet` (EDITS), one per edit: what people have changed in the captions of a policy."""
        return self.root / "edits" / policy

    @property
    def plan(self) -> Path:
        """`part-*.parquet` (PLAN) and `drops/part-*.parquet`."""
        return self.root / "plan"

    @property
    def chunks(self) -> Path:
        return self.root / "chunks"

    @property
    def pack_drops(self) -> Path:
        return self.root / "pack_drops"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"
