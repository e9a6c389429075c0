"""scan: camera-size pictures read once (SHA-256, header, perceptual hash), beside Pillow + imagehash and czkawka.

The pictures are those of --data, else the demo's, brought to 12 MP and encoded at quality 92 and 95: as they are
(`baseline`), with the grain of a sensor (`grainy`), progressive, and as PNG. Ratios are of CPU seconds on one core, in
one fresh process, picture by picture, the best of three each. czkawka is asked on two cores, by the clock, in rounds
that alternate with ours. It is looked for in this environment, then in the one of the Python that the environment
variable CHUNKLINE_CZKAWKA_PYTHON names (PyPI: czkawka 0.1.2).
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps

from scripts.bench.result import Bar, Result
from sharding.config import DedupeConfig, FilterConfig
from sharding.images import EXTENSIONS, ImageError, decode_grey, decode_rgb, probe
from sharding.pictures.phash import enough_pixels, hash_picture, is_flat, perceptual_hash
from sharding.scanning.record import FileTask, Rules, make_record
from sharding.workers import make_pool

CZKAWKA_PYTHON = "CHUNKLINE_CZKAWKA_PYTHON"

_DEMO = Path(__file__).parents[1] / "demo_pictures"
_SIZE = (4000, 3000)
_GRAIN = 3.0  # standard deviation, grey levels: ISO 400 on a phone
_REPEATS = 3
_RULES = Rules(filters=FilterConfig(), dedupe=DedupeConfig())
_ASK_CZKAWKA = """
import sys, time
from pathlib import Path
from czkawka import ImageSimilarity
finder = ImageSimilarity()
finder.set_directories([Path(sys.argv[1])])
finder.set_similarity(2)
start = time.perf_counter()
finder.find_similar()
print(time.perf_counter() - start)
"""


def run(*, full: bool, data: Path | None) -> Result:
    """Measure and return the figures. full: 24 pictures instead of 6. Raises ValueError if data has no pictures."""
    figures: dict[str, float] = {}
    notes = ["the ratio falls with bits per pixel: what is left is libjpeg's Huffman decoding, which nothing skips"]
    bars = [Bar("ratio_baseline", at_least=4), Bar("bits_of_64_max", at_most=2), Bar("bits_of_256_max", at_most=8)]
    with tempfile.TemporaryDirectory() as folder:
        files = make_pictures(Path(folder), data or _DEMO, num_pictures=24 if full else 6)
        with make_pool(1) as pool:  # this process has made the pictures: its memory would be warm for large ones
            for kind, paths in files.items():
                figures |= pool.submit(_compare_on_one_core, kind, paths).result()
            figures["decoder_fraction_baseline"] = pool.submit(_decoder_fraction, files["baseline"]).result()
        figures |= deviations(files["baseline"] + files["progressive"] + files["grainy"])
        python = find_czkawka()
        if python is None:
            notes.append(f"czkawka is not installed here, and {CZKAWKA_PYTHON} names no Python that has it")
        else:
            figures |= _compare_with_czkawka(python, files["baseline"])
            bars.append(Bar("ratio_czkawka_two_workers", at_least=2))
    peer = f"Pillow {version('pillow')} + imagehash {version('imagehash')}" + (", czkawka" if python else "")
    return Result("scan", figures, bars, full_size=full, peer=peer, notes=notes)


def make_pictures(folder: Path, source: Path, *, num_pictures: int, seed: int = 0) -> dict[str, list[Path]]:
    """Write camera-size pictures made from those below `source`, and return their paths by kind.

    num_pictures: baseline JPEGs; of each other kind there are a third as many, at least 2. Every kind has a folder.
    """
    files: dict[str, list[Path]] = {kind: [] for kind in ("baseline", "grainy", "progressive", "png")}
    for kind in files:
        (folder / kind).mkdir()
    for number, image in enumerate(_camera_size(source, num_pictures)):
        rng = np.random.default_rng((seed, number))
        kinds = list(files) if number < max(2, num_pictures // 3) else ["baseline"]
        for kind in kinds:
            path = folder / kind / f"{number:03}.{'png' if kind == 'png' else 'jpg'}"
            if kind == "png":
                image.save(path, compress_level=1)
            else:
                pixels = _add_grain(image, rng) if kind == "grainy" else image
                pixels.save(path, quality=(92, 95)[number % 2], progressive=kind == "progressive")
            files[kind].append(path)
    return files


def deviations(paths: Iterable[Path]) -> dict[str, float]:
    """Return by how many bits our hashes differ from imagehash's of the full decode, flat pictures left out."""
    figures: dict[str, float] = {}
    differences: dict[int, list[int]] = {8: [], 16: []}
    for path in paths:
        data = path.read_bytes()
        full = decode_rgb(data)
        if is_flat(full):
            continue
        for hash_size, bits in differences.items():
            image = decode_grey(data, min_side=enough_pixels(hash_size))
            ours = hash_picture(image, algorithm="phash", hash_size=hash_size)
            expected = perceptual_hash(full, algorithm="phash", hash_size=hash_size)
            bits.append((int.from_bytes(ours) ^ int.from_bytes(expected)).bit_count())
    for hash_size, bits in differences.items():
        figures[f"bits_of_{hash_size**2}_p99"] = float(np.percentile(bits, 99))
        figures[f"bits_of_{hash_size**2}_max"] = float(max(bits))
    return figures


def find_czkawka() -> str | None:
    """Return a Python that can import czkawka's binding, or None."""
    for python in (sys.executable, os.environ.get(CZKAWKA_PYTHON, "")):
        if python:
            try:
                subprocess.run([python, "-c", "import czkawka"], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            return python
    return None


# --- pictures ---


def _camera_size(source: Path, num_pictures: int) -> Iterable[Image.Image]:
    candidates = sorted(path for path in source.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    images = []
    for path in candidates:
        try:
            facts = probe(path.read_bytes())
        except ImageError:
            continue
        images.append((-facts.width * facts.height, path))
    chosen = [path for _, path in sorted(images)[:num_pictures]]
    if not chosen:
        raise ValueError(f"{source}: no pictures; name a folder with some")
    for number in range(num_pictures):
        image = decode_rgb(chosen[number % len(chosen)].read_bytes())
        size = _SIZE if image.width >= image.height else _SIZE[::-1]
        yield ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _add_grain(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    grain = rng.normal(0, _GRAIN, (image.height, image.width, 1)).astype(np.float32)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


# --- measuring ---


def _ours(data: bytes) -> None:
    hashlib.sha256(data).hexdigest()
    probe(data)
    hash_picture(decode_grey(data, min_side=enough_pixels(16)), algorithm="phash", hash_size=16)


def _naive(data: bytes) -> None:
    hashlib.sha256(data).hexdigest()
    with Image.open(io.BytesIO(data)) as image:
        imagehash.phash(image, hash_size=16)


def _decode_only(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", (256, 256))
        image.load()


def _cpu_seconds(work: Callable[[bytes], None], data: bytes) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.process_time()
        work(data)
        best = min(best, time.process_time() - start)
    return best


def _compare_on_one_core(kind: str, paths: list[Path]) -> dict[str, float]:
    ours = naive = num_bytes = num_pixels = 0.0
    for path in paths:
        data = path.read_bytes()
        facts = probe(data)
        num_bytes += len(data)
        num_pixels += facts.width * facts.height
        ours += _cpu_seconds(_ours, data)
        naive += _cpu_seconds(_naive, data)
    return {
        f"ratio_{kind}": naive / ours,
        f"ours_{kind}_seconds": ours / len(paths),
        f"bits_per_pixel_{kind}": 8 * num_bytes / num_pixels,
    }


def _decoder_fraction(paths: list[Path]) -> float:
    """Return the share of our time in which libjpeg decodes at 1/8 scale, which is nearly all Huffman decoding."""
    contents = [path.read_bytes() for path in paths]
    return sum(_cpu_seconds(_decode_only, data) for data in contents) / sum(_cpu_seconds(_ours, d) for d in contents)


def _compare_with_czkawka(python: str, paths: list[Path]) -> dict[str, float]:
    ours, theirs = float("inf"), float("inf")
    tasks = [FileTask("bench", "bench", "folder", path.parent, path.name, path.stat().st_size) for path in paths]
    with make_pool(2) as pool:
        list(pool.map(_record_status, tasks))  # starts the workers and what they import
        for _ in range(_REPEATS):
            start = time.perf_counter()
            statuses = set(pool.map(_record_status, tasks))
            ours = min(ours, time.perf_counter() - start)
            assert statuses == {"kept"}, statuses
            theirs = min(theirs, _czkawka_seconds(python, paths[0].parent))
    return {"ratio_czkawka_two_workers": theirs / ours, "ours_two_workers_seconds": ours, "czkawka_seconds": theirs}


def _record_status(task: FileTask) -> str:
    return str(make_record(task, _RULES)["status"])


def _czkawka_seconds(python: str, folder: Path) -> float:
    """Return the seconds of its search, without what it has cached, on at most two cores."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "XDG_CACHE_HOME": home, "XDG_CONFIG_HOME": home}
        environment["RAYON_NUM_THREADS"] = "2"
        done = subprocess.run(
            [python, "-c", _ASK_CZKAWKA, str(folder)], check=True, capture_output=True, text=True, env=environment
        )
    return float(done.stdout.split()[-1])
