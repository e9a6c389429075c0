"""Make the demo's pictures from freely licensed originals.

Reads the table `demo_pictures/recipe.toml` and a folder of unpacked Debian packages
(`CORPUS/dataset/<package>/usr/...`, as `dpkg -x` lays them out) and writes the folders of pictures, their
metadata, `provenance.csv`, `expected.json` and `LICENSES/`. It fetches nothing, and nobody needs it to run the
demo: its output is in the repository. Same originals and same Pillow, same bytes.

Run: python -m scripts.make_demo_pictures CORPUS [--output DIR]
"""

import argparse
import csv
import gzip
import hashlib
import json
import random
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor

RECIPE = Path(__file__).parent / "demo_pictures" / "recipe.toml"
FLOOR_PIXELS = 768_000
"""Pictures of fewer pixels are listed as too small; the data pipeline's default floor."""
SEED = 2024
COMMON_LICENCES = ("GPL-2", "GPL-3", "LGPL-3", "CC0-1.0")
SOFTWARE_TAG, ORIENTATION_TAG, EXIF_POINTER, DATE_TIME_ORIGINAL = 0x0131, 0x0112, 0x8769, 0x9003
STORED_TURN = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""How the upright picture is turned before it is stored with that EXIF orientation."""


@dataclass(frozen=True)
class Originals:
    """The unpacked packages and the names the recipe has for their folders."""

    corpus: Path
    sources: dict[str, dict[str, str]]

    def path(self, reference: str) -> Path:
        """Return the file behind `source/file`. Raises FileNotFoundError if its package is not unpacked."""
        name, _, file = reference.partition("/")
        source = self.sources[name]
        path = self.corpus / "dataset" / source["package"] / source["folder"] / file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such original; unpack the package {source['package']} first")
        return path

    def open(self, reference: str) -> Image.Image:
        """Return the original as RGBA."""
        with Image.open(self.path(reference)) as image:
            return image.convert("RGBA")


def references_of(row: dict[str, Any]) -> list[str]:
    """Return the originals a line is made from."""
    background: list[str] = [row["from"]] if "from" in row else []
    return [*background, *(layer[0] for layer in row.get("layers", [])), *row.get("frames", [])]


def scaled_to_height(image: Image.Image, height: int) -> Image.Image:
    """Return the image resized to that height, the aspect ratio kept."""
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)


def compose(row: dict[str, Any], originals: Originals, *, frame: str | None = None) -> Image.Image:
    """Return the upright picture of one recipe line: RGBA if it keeps alpha, else RGB on white.

    frame: an original pasted last, at the line's `at`; for animated pictures.
    """
    if "color" in row:
        ground = (255, 255, 255, 0) if row.get("alpha") else ImageColor.getcolor(row["color"], "RGBA")
        picture = Image.new("RGBA", tuple(row["size"]), ground)
    else:
        picture = originals.open(row["from"])
        if "crop" in row:
            picture = picture.crop(tuple(row["crop"]))
        if "size" in row:
            picture = picture.resize(tuple(row["size"]), Image.Resampling.LANCZOS)
    layers = list(row.get("layers", []))
    if frame is not None:
        layers.append([frame, *row["at"]])
    for reference, left, top, height in layers:
        layer = scaled_to_height(originals.open(reference), height)
        on_canvas = Image.new("RGBA", picture.size, (0, 0, 0, 0))
        on_canvas.paste(layer, (left, top))
        picture = Image.alpha_composite(picture, on_canvas)
    if row.get("alpha"):
        return picture
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def exif_of(row: dict[str, Any]) -> bytes:
    """Return the EXIF block a line asks for, empty if it asks for none."""
    exif = Image.Exif()
    if "orientation" in row:
        exif[ORIENTATION_TAG] = row["orientation"]
    if "taken" in row:
        exif[SOFTWARE_TAG] = "chunkline demo"
        exif.get_ifd(EXIF_POINTER)[DATE_TIME_ORIGINAL] = row["taken"]
    return exif.tobytes() if len(exif) or "taken" in row else b""


def save(row: dict[str, Any], path: Path, originals: Originals) -> tuple[int, int]:
    """Write one picture; return its width and height in pixels as seen, after EXIF rotation."""
    picture = compose(row, originals)
    options: dict[str, Any] = {}
    if path.suffix == ".png":
        options = {"optimize": True}
    elif path.suffix == ".jpg":
        options = {"quality": row["quality"], "optimize": True, "progressive": False}
    elif path.suffix == ".webp":
        options = {"quality": row["quality"], "method": 6}
    if "frames" in row:
        frames = [compose(row, originals, frame=frame) for frame in row["frames"]]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=700, loop=0, **options)
        return frames[0].size
    if exif := exif_of(row):
        options["exif"] = exif
    stored = picture.transpose(STORED_TURN[row["orientation"]]) if "orientation" in row else picture
    stored.save(path, **options)
    if "keep_fraction" in row:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * row["keep_fraction"])])
    return picture.size


def write_post(row: dict[str, Any], path: Path, size: tuple[int, int]) -> None:
    """Write the booru post beside a picture. Numbers are drawn from the picture's path: they are made up."""
    draw = random.Random(f"{SEED}:{row['folder']}/{row['path']}")
    stem = path.stem
    clock = f"{draw.randrange(24):02}:{draw.randrange(60):02}:{draw.randrange(60):02}.000-05:00"
    score = int(draw.expovariate(1 / 25))
    post = {
        "id": int(stem) if stem.isdigit() else draw.randrange(9_000_000, 9_999_999),
        "created_at": f"{row['date']}T{clock}",
        "rating": row["rating"],
        "score": score,
        "fav_count": score + draw.randrange(20),
        "file_ext": path.suffix[1:],
        "file_size": path.stat().st_size,
        "image_width": size[0],
        "image_height": size[1],
        "md5": hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(),
        "tag_string_general": " ".join(sorted(row["tags"].split())),
        "tag_string_character": row.get("character", ""),
        "tag_string_copyright": row.get("copyright", ""),
        "tag_string_artist": row.get("artist", ""),
        "tag_string_meta": row.get("meta", ""),
        "is_deleted": False,
        "is_banned": False,
        "is_flagged": False,
    }
    path.with_suffix(".json").write_text(json.dumps(post, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def what_was_done(row: dict[str, Any]) -> str:
    """Say in words how the picture differs from its original."""
    if "text" in row:
        return "made for the demo: a broken file" if row["text"] else "made for the demo: an empty file"
    if "copy_of" in row:
        return f"byte-identical copy of {row['copy_of']}"
    width_height = "x".join(map(str, row["size"])) if "size" in row else "unchanged"
    steps = [
        f"cropped to {row['crop']}" if "crop" in row else "",
        "pictures placed on a plain background" if "color" in row else "",
        "sprite placed over it" if "color" not in row and ("layers" in row or "frames" in row) else "",
        f"size {width_height}",
        "alpha flattened on white if any" if not row.get("alpha") else "alpha kept",
        f"encoded as {Path(row['path']).suffix[1:]}" + (f" q{row['quality']}" if "quality" in row else ""),
        f"stored with EXIF orientation {row['orientation']}" if "orientation" in row else "",
        "EXIF date made up (demo metadata)" if "taken" in row else "",
        "cut off on purpose" if "keep_fraction" in row else "",
    ]
    return "; ".join(filter(None, steps))


def provenance(row: dict[str, Any], originals: Originals) -> list[str]:
    """Return one line of provenance.csv; several originals are joined by ` + `."""
    references = references_of(row)
    sources = [originals.sources[reference.partition("/")[0]] for reference in references]
    packages = dict.fromkeys(f"{source['package']} {source['version']}" for source in sources)
    return [
        f"{row['folder']}/{row['path']}",
        " + ".join(packages),
        " + ".join(
            f"{source['folder']}/{reference.partition('/')[2]}"
            for source, reference in zip(sources, references, strict=True)
        ),
        row.get("author") or " + ".join(dict.fromkeys(source["author"] for source in sources)) or "chunkline",
        row.get("licence") or " + ".join(dict.fromkeys(source["licence"] for source in sources)) or "Apache-2.0",
        what_was_done(row),
    ]


def expectations(rows: list[dict[str, Any]], sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Return what a pipeline should find: the planted broken, small, equal, animated, turned and alpha files.

    `kept_at_least` counts what stays when all of these and, to be safe, all expression variants are dropped;
    pictures with alpha or EXIF rotation stay.
    """

    def where(key: str) -> list[str]:
        return [f"{row['folder']}/{row['path']}" for row in rows if key in row]

    def pairs(key: str) -> list[list[str]]:
        return [[row[key], f"{row['folder']}/{row['path']}"] for row in rows if key in row]

    broken = where("text") + where("keep_fraction")
    too_small = [path for path, (width, height) in sizes.items() if width * height < FLOOR_PIXELS]
    dropped = {*broken, *too_small, *where("frames"), *where("copy_of"), *where("like"), *where("variant_of")}
    return {
        "num_files": len(rows),
        "kept_at_least": len(rows) - len(dropped),
        "broken": broken,
        "too_small": too_small,
        "near_duplicates": pairs("like"),
        "exact_duplicates": pairs("copy_of"),
        "expression_variants": pairs("variant_of"),
        "animated": where("frames"),
        "rotated": where("orientation"),
        "alpha": where("alpha"),
    }


def write_licences(originals: Originals, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Copy the packages' copyright files and the common licence texts they point to."""
    folder.mkdir(parents=True, exist_ok=True)
    used = {reference.partition("/")[0] for row in rows for reference in references_of(row)}
    for package in sorted({originals.sources[name]["package"] for name in used}):
        documents = originals.corpus / "dataset" / package / "usr" / "share" / "doc" / package
        plain = documents / "copyright"
        text = plain.read_bytes() if plain.exists() else gzip.decompress((documents / "copyright.gz").read_bytes())
        (folder / f"{package}.copyright.txt").write_bytes(text)
    for name in COMMON_LICENCES:
        shutil.copyfile(Path("/usr/share/common-licenses") / name, folder / f"{name}.txt")


def read_rows(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the recipe's lines in order; a copy takes over what its original's line says of its origin."""
    rows = [{**row, "folder": folder} for folder, lines in recipe["pictures"].items() for row in lines]
    by_path = {f"{row['folder']}/{row['path']}": row for row in rows}
    return [{**by_path[row["copy_of"]], **row} if "copy_of" in row else row for row in rows]


def make(corpus: Path, output: Path) -> None:
    """Write the whole folder of demo pictures; a folder it writes is emptied first."""
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    originals = Originals(corpus=corpus, sources=recipe["sources"])
    rows = read_rows(recipe)
    for folder in (*recipe["pictures"], "LICENSES"):
        shutil.rmtree(output / folder, ignore_errors=True)
    sizes: dict[str, tuple[int, int]] = {}
    for row in rows:
        path = output / row["folder"] / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if "text" in row:
            path.write_text(row["text"], encoding="utf-8")
        elif "copy_of" in row:
            shutil.copyfile(output / row["copy_of"], path)
        else:
            sizes[f"{row['folder']}/{row['path']}"] = save(row, path, originals)
        if "date" in row:
            write_post(row, path, sizes.get(f"{row['folder']}/{row['path']}") or tuple(row["size"]))
        elif row["folder"] == "pixiv":
            path.with_suffix(".txt").write_text(", ".join(row["tags"].split()) + "\n", encoding="utf-8")
    with (output / "provenance.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "package", "original", "author", "licence", "what_was_done"])
        writer.writerows(provenance(row, originals) for row in rows)
    expected = json.dumps(expectations(rows, sizes), indent=1, ensure_ascii=False)
    (output / "expected.json").write_text(expected + "\n", encoding="utf-8")
    write_licences(originals, output / "LICENSES", rows)


def main() -> None:
    """Read the command line and make the pictures."""
    parser = argparse.ArgumentParser(description="Make the demo's pictures from unpacked Debian packages.")
    parser.add_argument("corpus", type=Path, help="folder that holds dataset/<package>/usr/...")
    parser.add_argument("--output", type=Path, default=RECIPE.parent, help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()
    make(arguments.corpus, arguments.output)


if __name__ == "__main__":
    main()
