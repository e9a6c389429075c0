"""Write a dataset.toml for pictures laid out for kohya's sd-scripts: `python -m sharding import-kohya FOLDER`.

Repeats become rules of `plan.weights`. Captions are what kohya would train on: where that is not a picture's whole
`.txt`, they are written to an in_json of ours beside the TOML. Copies and moves no picture; settings that belong to
training are named, not carried over. How kohya reads a folder: `kohya_folders`.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sharding.config import DatasetConfig, parse_config
from sharding.files import write_bytes, write_json
from sharding.kohya.folders import (
    Found,
    Subset,
    subset_with_metadata,
    subsets_of_config,
    subsets_of_folder,
    texts_of,
)

_UNDERSCORED = re.compile(r"\w\w_|_\w\w")
"""A word in underscore form, not a face such as o_o or ^_^."""


@dataclass(frozen=True)
class KohyaImport:
    """What `import_kohya` has written."""

    output: Path
    sources: tuple[tuple[str, Path, int], ...]
    """(name, folder, repeats)."""
    metadata: tuple[Path, ...]
    """in_json files of ours, for captions that are not simply the `.txt`."""
    left_out: tuple[str, ...]
    """What was found and not carried over, each with its reason."""

    def summary(self) -> str:
        """Return the sources with their repeats, and what was not carried over."""
        lines = [f"{self.output}: {len(self.sources):,} sources"]
        lines += [f"  {name}: {folder}, {repeats} ×" for name, folder, repeats in self.sources]
        lines += [f"captions as kohya reads them: {path}" for path in self.metadata]
        lines += [f"not carried over: {reason}" for reason in self.left_out]
        return "\n".join(lines)


def import_kohya(
    folder: Path,
    *,
    output: Path,
    metadata: Path | None = None,
    dataset_config: Path | None = None,
    name: str = "kohya",
) -> KohyaImport:
    """Write `output`, a dataset.toml that scan, dedupe, compose, plan and pack can use as it is.

    folder: pictures, or folders `REPEATS_class tokens` of them; relative paths of a dataset_config are below it.
    name: of the dataset; all pictures are filed under it, since kohya mixes its folders.

    Raises FileNotFoundError, NotADirectoryError, ValueError for an output that is there already, a folder without
    pictures or two subsets in one, ConfigError for a dataset_config that kohya would refuse.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder")
    if metadata is not None and dataset_config is not None:
        raise ValueError("--metadata and --dataset-config: give one of them; a dataset_config names its own in_json")
    if output.exists():
        raise ValueError(f"{output}: is there already; delete it or choose another --output")
    found = _find(folder.absolute(), metadata, dataset_config)
    named = _named(found)
    texts = {source: texts_of(subset) for source, subset in named.items()}
    own = {source: _own_metadata(output, source) for source in named if not texts[source].is_plain}
    words = {word for one in texts.values() for word in one.words}
    with_underscore = {word for word in words if _UNDERSCORED.search(word)}
    keeps_underscores = bool(with_underscore) and not any(" " in word for word in words)
    left_out = list(found.left_out)
    if with_underscore and not keeps_underscores:
        some = ", ".join(sorted(with_underscore)[:3])
        left_out.append(f"underscores of {len(with_underscore):,} words, which become spaces: {some}")
    text = _toml(name, named, own, keeps_underscores=keeps_underscores)
    parse_config(tomllib.loads(text), DatasetConfig, name=str(output))
    for source, path in own.items():
        write_json(path, {picture: {"tags": line} for picture, line in texts[source].by_path.items()})
    write_bytes(output, text.encode())
    sources = tuple((source, subset.folder, subset.repeats) for source, subset in named.items())
    return KohyaImport(output, sources, tuple(own.values()), tuple(left_out))


def _find(folder: Path, metadata: Path | None, dataset_config: Path | None) -> Found:
    if dataset_config is not None:
        return subsets_of_config(dataset_config, folder)
    if metadata is not None:
        return subset_with_metadata(folder, metadata.absolute())
    return subsets_of_folder(folder)


def _named(found: Found) -> dict[str, Subset]:
    """Give each subset a name that a source may have; raise ValueError when two share a folder."""
    folders = [subset.folder for subset in found.subsets]
    if shared := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"{shared}: two subsets read this folder; a source is a folder, so give each one of its own")
    named: dict[str, Subset] = {}
    for subset in found.subsets:
        is_only = [folder.name for folder in folders].count(subset.folder.name) == 1
        name = plain = _source_name(subset.folder.name if is_only else " ".join(subset.folder.parts[-2:]))
        number = 2
        while name in named:
            name, number = f"{plain}-{number}", number + 1
        named[name] = subset
    return named


def _source_name(text: str) -> str:
    letters = "".join(letter if letter.isalnum() or letter in "-_." else " " for letter in text)
    return " ".join(letters.split()).strip(" .") or "pictures"


def _own_metadata(output: Path, source: str) -> Path:
    return output.absolute().with_name(f"{output.stem}.{source}.json")


def _toml(name: str, named: Mapping[str, Subset], own: Mapping[str, Path], *, keeps_underscores: bool) -> str:
    lines = [
        "# From a folder for kohya's sd-scripts: the same pictures, captions and repeats.",
        "#",
        "#   python -m scripts.build_chunks THIS_FILE --workspace W",
        "",
        f"name = {_text(name)}",
        "",
    ]
    for source, subset in named.items():
        metadata = own.get(source, subset.metadata)
        lines += [f"[sources.{_text(source)}]", f"root = {_text(str(subset.folder))}", f"dataset = {_text(name)}"]
        lines += (
            ['importer = "folder"']
            if metadata is None
            else ['importer = "kohya"', f"metadata = {_text(str(metadata))}"]
        )
        lines.append("")
    lines += [
        "[filters] # kohya has none",
        "min_pixels = 1",
        "max_aspect = 1000.0",
        "",
        "[dedupe] # kohya trains near-duplicates, too; 16 finds re-encodes and resizes",
        "radius = 0",
        "",
        "[plan]",
        "chunk_size = 8_000",
        "",
    ]
    for source, subset in named.items():
        if subset.repeats != 1:
            lines += ["[[plan.weights]]", f"source = {_text(source)}", f"repeats = {subset.repeats}", ""]
    lines += ["[policies.default]", 'groups = ["rest"]']
    if keeps_underscores:
        lines += ["", "[policies.default.tags]", "remove_underscores = false"]
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """Return a TOML string; JSON's is one, but for DEL, which no path should have."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
