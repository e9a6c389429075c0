"""Concepts → chunks: what a run's stages show, and that nothing is written without need."""

import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sharding.chunk import HELD_OUT_NAME, ChunkError, iterate_samples, list_chunks, open_chunk, seal
from sharding.config import ConfigError, parse_config
from sharding.schema import Workspace
from sharding.verify import verify
from tests.training.dreambooth.test_sampling import networks_of
from training.cli import main
from training.config import RunConfig
from training.dreambooth.packing import chunks, drawing
from training.dreambooth.packing.pack import pack_concepts
from training.errors import BrokenDataError
from training.frozen_config import to_toml
from training.plan_totals import run_totals
from training.plans import batch_plan, caption_settings
from training.stages import stage_config, stages_of


def paint(seed, width=96, height=64):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder, number, *, seed=0, caption="girl, smile", suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for one in range(number):
        sides = [(96, 64), (64, 96), (64, 64)][one % 3]
        paint(seed + one, *sides).save(folder / f"{one:02d}{suffix}")
        if caption is not None:
            (folder / f"{one:02d}.txt").write_text(f"{caption}, {one}")


class Project:
    """A workspace, concepts, and a run on them. Class images are painted; `drawn` counts how often they are asked."""

    def __init__(self, root):
        self.root = root
        self.drawn = []
        self.concepts = []
        self.options = {}
        self.stages = []
        self.recipe = {"model": "none", "concepts": str(root / "concepts.toml")}
        self.changes = {}

    def concept(self, name, number=6, *, seed=0, caption="girl, smile", **values):
        folder = self.root / "pictures" / name
        if number:
            write_pictures(folder, number, seed=seed, caption=caption)
        self.concepts.append({"name": name, "folder": str(folder), **values})
        return folder

    @property
    def config(self):
        values = {
            "name": "toy", "device": "cpu", "data": {"workspace": str(self.root / "ws"), "chunks": ["concepts/*"]},
            "batch": {"batch_size": 2, "micro_batch_size": 2}, "buckets": {"resolution": [64, 64], "step": 32},
            "schedule": {"name": "constant"}, "dreambooth": {**self.recipe, "stages": self.stages},
        }  # fmt: skip
        for key, value in self.changes.items():
            values[key] = {**values.get(key, {}), **value}
        return parse_config(values, RunConfig, name="run.toml")

    def write_concepts(self):
        path = self.root / "concepts.toml"
        text = to_toml(self.options)
        for concept in self.concepts:
            tables = {key: value for key, value in concept.items() if isinstance(value, dict)}
            text += "[[concepts]]\n" + to_toml({key: one for key, one in concept.items() if key not in tables})
            text += "".join(f"[concepts.{key}]\n{to_toml(table)}" for key, table in tables.items())
        path.write_text(text)

    def draw(self, config, wanted, folder, *, dry_run):
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{hashlib.sha256(repr(image).encode()).hexdigest()}.png" for image in wanted]
        if dry_run:
            return [path if path.exists() else None for path in paths]
        for image, path in zip(wanted, paths, strict=True):
            if not path.exists():
                self.drawn.append(image)
                paint(image.seed, image.width, image.height).save(path)
        return paths

    def pack(self, **options):
        self.write_concepts()
        return pack_concepts(self.config, draw=self.draw, **options)

    @property
    def chunks(self):
        return Workspace(self.root / "ws").chunks

    def rows(self, chunk="concepts/01-all"):
        return open_chunk(self.chunks / chunk).read_index().to_pylist()

    def files(self):
        return {
            path.relative_to(self.chunks).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(self.chunks.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }

    def per_epoch(self, chunk="concepts/01-all"):
        """Return a Counter of (concept, key) for each epoch of a chunk."""
        config = stage_config(self.config, chunk)
        index = open_chunk(self.chunks / chunk).read_index()
        plans = [batch_plan(index, chunk, config=config, epoch=epoch) for epoch in range(config.data.epochs)]
        return [
            Counter((one.concept, one.key) for micro in plan.micro_batches() for one in micro.samples) for plan in plans
        ]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


CLASSES = {"prompt": "girl", "images_per_image": 2, "steps": 2}


# --- rows ---


def test_each_picture_is_a_row_with_the_prompt_its_caption_repeats_and_weight(project):
    project.concept("hitori", 4, prompt="photo of hitori, [filewords]", repeats=3, loss_weight=0.5)

    project.pack()

    rows = project.rows()
    assert [row["caption"] for row in rows] == [f"photo of hitori, girl, smile, {number}" for number in range(4)]
    assert {row["concept"] for row in rows} == {row["dataset"] for row in rows} == {"hitori"}
    assert {(row["repeats"], row["loss_weight"], row["every_epochs"], row["epoch_offset"]) for row in rows} == {
        (3, 0.5, 1, 0)
    }
    folder = project.root / "pictures" / "hitori"
    packed = {hashlib.sha256(data).hexdigest() for _, data, _, _ in iterate_samples(list_chunks(project.chunks)[0])}
    assert packed == {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}


def test_folders_below_count_and_hidden_files_do_not(project):
    folder = project.concept("hitori", 2)
    write_pictures(folder / "more", 2, seed=50)
    write_pictures(folder / ".thumbnails", 2, seed=90)
    shutil.copyfile(folder / "00.png", folder / "._00.png")

    project.pack()

    facts = [json.loads(json.dumps(facts)) for _, _, facts, _ in iterate_samples(list_chunks(project.chunks)[0])]
    assert [one["source_path"] for one in facts] == ["00.png", "01.png", "more/00.png", "more/01.png"]
    assert str(project.root) not in json.dumps(facts)


def test_the_concepts_token_takes_the_place_of_the_class_token(project):
    classes = {"token": "girl (human)"}
    project.concept("hitori", 1, caption=r"a girl (human), \1 girls", token="hitori (btr)", class_images=classes)

    project.pack()

    assert [row["caption"] for row in project.rows()] == [r"a hitori (btr), \1 girls, 0"]


def test_an_empty_caption_leaves_no_comma_and_nothing_at_all_is_refused(project):
    folder = project.concept("hitori", 1, prompt="photo of hitori, [filewords]")
    (folder / "00.txt").write_text("  \n")

    project.pack()

    assert [row["caption"] for row in project.rows()] == ["photo of hitori"]
    project.concepts[0]["prompt"] = "[filewords]"
    project.concept("nijika", 1, seed=9, class_images=dict(CLASSES))
    with pytest.raises(ConfigError, match=r"nothing is said of .*00\.png: its caption is empty"):
        project.pack()
    assert not project.drawn


def test_each_line_of_a_caption_gets_the_prompt_where_one_is_drawn(project):
    folder = project.concept("hitori", 1, prompt="hitori, [filewords]")
    (folder / "00.txt").write_bytes(b"\xef\xbb\xbfsmile\r\n\r\nlooking up\r\n")
    project.changes["caption"] = {"lines": "random"}

    project.pack()

    assert [row["caption"] for row in project.rows()] == ["hitori, smile\nhitori, looking up"]


def test_a_concepts_own_first_tags_are_marked_where_the_run_shuffles(project):
    project.concept("hitori", 1, keep_first_tags=2)
    project.concept("nijika", 1, seed=9)
    project.concept("ryo", 1, seed=19, prompt="ryo", keep_first_tags=1)

    with pytest.raises(ConfigError, match=r"'hitori': keep_first_tags 2 is not the run's 0: .*keep_separator='\|\|\|'"):
        project.pack()
    project.changes["caption"] = {"keep_separator": "|||"}
    project.pack()
    marked = [row["caption"] for row in project.rows()]
    project.changes["caption"] = {"shuffle": False}
    project.pack()

    assert marked == ["girl, smile|||0", "girl, smile, 0", "ryo"]
    assert [row["caption"] for row in project.rows()] == ["girl, smile, 0", "girl, smile, 0", "ryo"]


def test_marked_tags_stay_in_front(project):
    from training.caption_text import training_caption
    from training.randomness import SampleIdentity

    project.concept("hitori", 1, keep_first_tags=1, caption=", ".join("abcdefgh"))
    project.changes["caption"] = {"keep_separator": "|||"}
    project.pack()
    row = project.rows()[0]

    captions = [
        training_caption(
            row["caption"], row["groups"], settings=caption_settings(project.config),
            identity=SampleIdentity(0, epoch, "c", row["key"]), global_step=0,
        )
        for epoch in range(6)
    ]  # fmt: skip

    assert len(set(captions)) > 1
    assert all(caption.startswith("a, ") and sorted(caption.split(", ")) == [*"0abcdefgh"] for caption in captions)


def test_what_not_every_reader_takes_is_stored_as_png_or_jpeg(project):
    folder = project.concept("hitori", 0, prompt="hitori")
    folder.mkdir(parents=True)
    clear = paint(1)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "alpha.png")
    paint(2).save(folder / "lossy.webp", quality=80)
    paint(3).convert("P").save(folder / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(4).save(folder / "turned.jpg", exif=exif)

    project.pack()

    rows = {row["key"]: row for row in project.rows()}
    stored = {
        facts["source_path"]: (rows[key]["image_name"].partition(".")[2], rows[key]["width"], rows[key]["height"])
        for key, _, facts, _ in iterate_samples(list_chunks(project.chunks)[0])
    }
    assert stored == {
        "alpha.png": ("png", 96, 64), "lossy.webp": ("jpg", 96, 64), "palette.gif": ("png", 96, 64),
        "turned.jpg": ("jpg", 64, 96),
    }  # fmt: skip
    assert verify(Workspace(project.root / "ws")) == []


# --- bad input ---


def test_a_concept_without_a_picture_names_its_folder(project):
    folder = project.concept("hitori", 0)

    with pytest.raises(FileNotFoundError, match=f"{folder}: no such folder"):
        project.pack()
    folder.mkdir(parents=True)
    (folder / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(
        ConfigError, match=rf"'hitori': {folder}: there is no picture to train in it; 1 are broken, first"
    ):
        project.pack()
    assert list_chunks(project.chunks) == []


def test_broken_pictures_are_named_and_left_out(project):
    folder = project.concept("hitori", 3)
    whole = (folder / "00.png").read_bytes()
    (folder / "01.png").write_bytes(whole[: len(whole) // 2])
    (folder / "02.png").write_bytes(b"")

    report = project.pack()

    assert [row["caption"] for row in project.rows()] == ["girl, smile, 0"]
    assert [one.partition(": ")[0] for one in report.broken] == [str(folder / "01.png"), str(folder / "02.png")]
    assert f"broken, left out: {folder / '02.png'}: empty_file: 0 bytes" in report.text()


def test_missing_captions_stop_it_only_where_the_prompt_needs_them(project):
    folder = project.concept("hitori", 3)
    (folder / "01.txt").unlink()

    with pytest.raises(BrokenDataError, match=rf"'hitori': 1 of 3 pictures have no caption, first {folder}/01\.png"):
        project.pack()
    project.concepts[0]["prompt"] = "hitori"
    project.pack()

    assert {row["caption"] for row in project.rows()} == {"hitori"}


def test_a_caption_that_is_no_text_is_named(project):
    folder = project.concept("hitori", 1)
    (folder / "00.txt").write_bytes("平沢".encode("utf-16"))

    with pytest.raises(BrokenDataError, match=rf"{folder}/00\.txt: not UTF-8"):
        project.pack()


def test_two_pictures_with_one_caption_and_equal_files_are_told(project):
    folder = project.concept("hitori", 2)
    paint(77).save(folder / "00.jpg")
    shutil.copyfile(folder / "01.png", folder / "copy.png")

    text = project.pack().text()

    assert f"{folder / '00.txt'}: 00.jpg and 00.png share this caption" in text
    assert f"{folder / 'copy.png'}: the same bytes as 01.png; left out" in text
    assert len(project.rows()) == 3


def test_a_stage_with_an_unknown_concept_is_refused(project):
    project.concept("hitori", 1)
    project.stages = [{"name": "parts", "epochs": 1, "concepts": ["hands"]}]

    with pytest.raises(ConfigError, match=r"stage 'parts': there is no concept 'hands' in .*; there are hitori"):
        project.pack()


def test_a_class_folder_that_is_the_concepts_own_is_refused(project):
    folder = project.concept("hitori", 1, class_images={**CLASSES})
    project.concepts[0]["class_images"]["folder"] = str(folder)

    with pytest.raises(ConfigError, match=r"folder .*hitori is also a class_images\.folder"):
        project.pack()


# --- class images ---


def test_every_epoch_shows_as_many_class_images_as_pictures_and_all_evenly(project):
    project.concept("hitori", 6, repeats=2, class_images={**CLASSES, "images_per_image": 6})
    project.stages = [{"name": "all", "epochs": 6}]

    project.pack()

    assert len(project.drawn) == 36
    shown = Counter()
    for epoch in project.per_epoch():
        instances = {key: times for (concept, key), times in epoch.items() if concept == "hitori"}
        classes = {key: times for (concept, key), times in epoch.items() if concept == "hitori/class"}
        assert set(instances.values()) == {2} and sum(classes.values()) == 12 == len(classes)
        shown.update(classes)
    assert set(shown.values()) == {2} and len(shown) == 36


def test_class_images_have_the_words_and_the_size_of_a_pictures_bucket(project):
    project.concept("hitori", 3, token="hitori", class_images={"token": "girl", "images_per_image": 1})

    project.pack()

    rows = {row["concept"]: row for row in project.rows()}
    plan = batch_plan(open_chunk(project.chunks / "concepts/01-all").read_index(), "c", config=project.config, epoch=0)
    buckets = {
        (one.concept, one.key): (str(micro.bucket), placed.crop_loss_fraction)
        for micro in plan.micro_batches()
        for one, placed in zip(micro.samples, micro.placements, strict=True)
    }
    own = {row["caption"][-1]: buckets["hitori", row["key"]][0] for row in project.rows() if row["concept"] == "hitori"}
    made = {image.prompt[-1]: f"{image.width}x{image.height}" for image in project.drawn}
    assert made == own and len(set(made.values())) == 3
    assert {lost for (concept, _), (_, lost) in buckets.items() if concept == "hitori/class"} == {0}
    assert rows["hitori"]["caption"].startswith("hitori, smile")
    assert rows["hitori/class"]["caption"].startswith("girl, smile")
    assert rows["hitori/class"]["dataset"] == "hitori/class"


def test_given_class_images_are_packed_as_they_are_and_topped_up(project):
    classes = project.root / "classes"
    write_pictures(classes, 5, seed=300, caption="woman")
    before = {path.name: path.read_bytes() for path in classes.iterdir()}
    project.concept("hitori", 4, class_images={**CLASSES, "prompt": "photo, [filewords]", "folder": str(classes)})

    report = project.pack()

    rows = [row for row in project.rows() if row["concept"] == "hitori/class"]
    assert len(rows) == 8 and len(project.drawn) == 3
    assert Counter(row["caption"].startswith("photo, woman") for row in rows) == {True: 5, False: 3}
    assert {path.name: path.read_bytes() for path in classes.iterdir()} == before
    assert (report.chunks[0].concepts[0].num_given, report.chunks[0].concepts[0].num_made) == (5, 3)


def test_class_images_in_a_folder_below_are_no_pictures_of_the_concept(project):
    folder = project.concept("hitori", 2)
    write_pictures(folder / "class", 4, seed=300, caption="woman")
    project.concepts[0]["class_images"] = {**CLASSES, "folder": str(folder / "class")}

    project.pack()

    assert Counter(row["concept"] for row in project.rows()) == {"hitori": 2, "hitori/class": 4}
    assert not project.drawn


def test_equal_words_for_picture_and_class_are_refused(project):
    project.concept("hitori", 2, prompt="[filewords] ", class_images={**CLASSES, "prompt": "[filewords]"})

    with pytest.raises(ValueError, match="class images would pull the concept back"):
        project.pack()


def test_a_prior_without_class_images_shows_the_pictures_with_the_classs_words(project):
    project.concept("hitori", 3, repeats=2, token="hitori", class_images={"token": "girl"})
    project.concept("style", 1, seed=30)
    project.recipe |= {"prior_target": "base_model"}

    text = project.pack().text()

    rows = project.rows()
    assert Counter(row["concept"] for row in rows) == {"hitori": 3, "hitori/class": 3, "style": 1}
    by_picture = {}
    for row in rows:
        by_picture.setdefault(row["sha256"], {})[row["concept"]] = (row["caption"], row["repeats"])
    own = [one for one in by_picture.values() if "hitori" in one]
    assert all(one["hitori"][0].replace("hitori", "girl") == one["hitori/class"][0] for one in own)
    assert {one["hitori/class"][1] for one in own} == {2}
    assert "concept style: nothing holds it to what the model knew" in text


def test_a_prior_that_no_concept_has_words_for_is_refused(project):
    project.concept("hitori", 1)
    project.recipe |= {"prior_target": "base_model"}

    with pytest.raises(ConfigError, match="no concept has class images, and none says what it is one of"):
        project.pack()


# --- stages, held-out pictures, balance ---


def test_each_stage_has_its_chunk_with_its_concepts(project):
    project.concept("hands", 2)
    project.concept("hitori", 3, seed=40)
    project.stages = [
        {"name": "parts", "epochs": 3, "concepts": ["hands"]},
        {"name": "all of it", "epochs": 2},
    ]

    report = project.pack()

    assert [chunk.name for chunk in list_chunks(project.chunks)] == ["concepts/01-parts", "concepts/02-all of it"]
    assert [stage.chunk for stage in stages_of(project.config)] == [chunk.name for chunk in list_chunks(project.chunks)]
    assert {row["concept"] for row in project.rows("concepts/01-parts")} == {"hands"}
    assert len(project.rows("concepts/02-all of it")) == 5
    assert [line.in_all for chunk in report.chunks for line in chunk.concepts] == [6, 4, 6]
    assert verify(Workspace(project.root / "ws")) == []


def test_held_out_pictures_are_trained_nowhere_and_stay_the_same(project):
    project.concept("hitori", 8)
    project.concept("nijika", 6, seed=4)  # four of its pictures are hitori's
    project.options = {"held_out": 2}

    project.pack()

    held_out = open_chunk(project.chunks / "concepts" / HELD_OUT_NAME)
    out = {row["sha256"] for row in held_out.read_index().to_pylist()}
    assert held_out.info.is_held_out
    assert Counter(row["concept"] for row in held_out.read_index().to_pylist()) == {"hitori": 2, "nijika": 2}
    assert out.isdisjoint(row["sha256"] for row in project.rows())
    assert [chunk.name for chunk in list_chunks(project.chunks)] == ["concepts/01-all"]
    assert verify(Workspace(project.root / "ws")) == []
    paint(999).save(project.root / "pictures" / "hitori" / "new.png")
    (project.root / "pictures" / "hitori" / "new.txt").write_text("new")
    project.pack()
    assert len(out & {row["sha256"] for row in open_chunk(held_out.folder).read_index().to_pylist()}) >= len(out) - 1
    project.options = {"held_out": 8}
    with pytest.raises(ConfigError, match="all of its"):
        project.pack()


def test_balance_shows_concepts_about_equally_often(project):
    for number, name in enumerate(("a", "b", "c")):
        project.concept(name, (2, 5, 9)[number], seed=100 * number, class_images={**CLASSES, "images_per_image": 1})
    project.options = {"balance": True}

    report = project.pack()

    assert [(line.name, line.repeats, line.per_epoch) for line in report.chunks[0].concepts] == [
        ("a", 5, 20), ("b", 2, 20), ("c", 1, 18)
    ]  # fmt: skip
    shown = Counter(concept for concept, _ in project.per_epoch()[0].elements())
    assert shown == {"a": 10, "a/class": 10, "b": 10, "b/class": 10, "c": 9, "c/class": 9}


def test_what_is_odd_is_told(project):
    hands = project.concept("hands", 2, token="hands", class_images={**CLASSES, "images_per_image": 5})
    project.concept("hitori", 2, class_images={"folder": str(hands)[:-1]})
    project.concept("unused", 1, seed=70)
    paint(5, 200, 20).save(hands / "long.png")
    (hands / "long.txt").write_text("long")
    project.stages = [{"name": "all", "epochs": 4, "concepts": ["hands", "hitori"]}]
    project.changes["data"] = {"chunks": ["newest/*"]}

    notes = "\n".join(project.pack().notes)

    assert "concept hands: token 'hands' is not looked at" in notes
    assert f"concept hitori: class_images.folder {str(hands)[:-1]} is not looked at: images_per_image is 0" in notes
    assert f"concept hands: 1 pictures have no bucket and are not trained, first {hands / 'long.png'}" in notes
    assert "concept unused: is in no stage" in notes
    assert "2 pictures belong to several concepts, first to hands and hitori" in notes
    assert "concepts/01-all: class images need 5 epochs to come round, there are 4" in notes
    assert "concepts/01-all: not in data.chunks ['newest/*']; set data.chunks = [\"concepts/*\"]" in notes
    assert {sum(number for (concept, _), number in epoch.items() if concept == "hands/class")
            for epoch in project.per_epoch()} == {2}  # fmt: skip


# --- the command ---


def run_toml(project, **changes):
    project.write_concepts()
    project.changes.update(changes)
    path = project.root / "run.toml"
    path.write_text(to_toml(project.config.model_dump(mode="json", exclude_unset=True, exclude_none=True)))
    return str(path)


def test_the_command_packs_and_says_what_to_run_next(project, capsys):
    project.concept("hitori", 2)
    path = run_toml(project)

    codes = [main(["pack-concepts", path, *more]) for more in ([], ["--dry-run"], ["--set", "data.epochs=7"])]

    assert codes == [0, 0, 0]
    out = capsys.readouterr().out
    assert "concepts/01-all: 1 epochs, packed" in out and "concepts/01-all: 7 epochs, nothing has changed" in out
    assert f"then: python -m training run {path} --run-dir RUN_DIR" in out


def test_the_command_tells_bad_settings_from_bad_data(project, capsys):
    folder = project.concept("hitori", 2)
    path = run_toml(project)
    (folder / "01.txt").unlink()

    bad_data = main(["pack-concepts", path])
    bad_path = main(["pack-concepts", path, "--set", "dreambooth.concepts=none.toml"])
    project.recipe.pop("concepts")
    no_concepts = main(["pack-concepts", run_toml(project)])

    assert (bad_data, bad_path, no_concepts) == (3, 2, 2)
    errors = capsys.readouterr().err
    assert "1 of 2 pictures have no caption" in errors and "none.toml: no such config file" in errors
    assert "dreambooth.concepts is not set" in errors


# --- class images that the model draws ---


@pytest.fixture
def toy_model(project, monkeypatch):
    """A model file that stands for toy networks; the list grows with each time they are loaded."""
    loaded, networks = [], networks_of("sd1")

    def load(config):
        loaded.append(config.of_dreambooth.model)
        return networks

    monkeypatch.setattr(drawing, "_load", load)
    (project.root / "model.safetensors").write_bytes(b"weights")
    project.recipe |= {"model": str(project.root / "model.safetensors")}
    project.draw = drawing.draw_class_images
    return loaded


def test_the_model_is_loaded_only_when_a_class_image_is_missing(project, toy_model):
    project.concept("hitori", 2, class_images={**CLASSES, "images_per_image": 1})
    project.pack(dry_run=True)
    assert not toy_model
    project.pack()
    folder = project.root / "ws" / "class_images"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}

    project.pack()
    project.pack(dry_run=True)
    assert len(toy_model) == 1 and len(before) == 2
    next(folder.glob("*.png")).unlink()
    assert "1 class images are to be drawn" in project.pack(dry_run=True).text()
    project.pack()
    assert len(toy_model) == 2 and {path.name for path in folder.glob("*.png")} == set(before)
    (project.root / "model.safetensors").write_bytes(b"other weights")
    project.pack()
    assert len(toy_model) == 3


# --- writing ---


def test_packing_again_writes_nothing_and_elsewhere_the_same_bytes(project, tmp_path):
    project.concept("hitori", 5, class_images=dict(CLASSES))
    project.options = {"held_out": 1}
    project.stages = [{"name": "one", "epochs": 2}, {"name": "two", "epochs": 2}]
    project.pack()
    before = project.files()

    report = project.pack()

    assert {line.what for line in report.chunks} == {"nothing has changed"}
    assert project.files() == before and len(project.drawn) == 8
    shutil.move(project.root / "ws", project.root / "first")
    project.pack()
    assert {name: data for name, (data, _) in project.files().items()} == {
        name: data for name, (data, _) in before.items()
    }


def test_only_chunks_that_changed_are_written_and_of_removed_stages_none_is_left(project):
    hands = project.concept("hands", 2)
    project.concept("hitori", 2, seed=40)
    project.stages = [
        {"name": "parts", "epochs": 3, "concepts": ["hands"]},
        {"name": "whole", "epochs": 2, "concepts": ["hitori"]},
    ]
    project.pack()
    before = project.files()
    (hands / "00.txt").write_text("other words")

    project.pack()
    after = project.files()

    assert {name for name in before if "02-whole" in name} == {name for name in after if "02-whole" in name}
    assert all(after[name] == before[name] for name in after if "02-whole" in name)
    assert not {name for name in after if "01-parts/index" in name} & set(before)
    assert sum("01-parts" in name for name in after) == 3
    project.stages = project.stages[:1]
    report = project.pack()
    assert report.removed == ("concepts/02-whole",)
    assert [path.name for path in sorted((project.chunks / "concepts").glob("[!.]*"))] == ["01-parts"]


def test_what_a_run_has_started_keeps_its_tars(project):
    folder = project.concept("hitori", 2)
    project.pack()
    chunk = list_chunks(project.chunks)[0]
    old = {shard.path for shard in chunk.info.shards}
    seal(chunk, "run")
    (folder / "00.txt").write_text("other words")

    project.pack()
    replaced = {path.name for path in chunk.folder.glob("*.tar")}
    project.stages = [{"name": "other", "epochs": 1}]
    project.pack()

    assert old < replaced and len(replaced) == 2
    assert {path.name for path in chunk.folder.glob("*.tar")} == replaced
    assert [one.name for one in list_chunks(project.chunks)] == ["concepts/01-other"]


def test_a_chunk_of_somebody_else_is_left_alone(project):
    project.concept("hitori", 2)
    project.pack()
    path = project.chunks / "concepts" / "01-all" / "chunk.json"
    path.write_text(path.read_text().replace('"policy": "concepts"', '"policy": "default"'))

    with pytest.raises(ChunkError, match=r"concepts/01-all: .*was not made of concepts"):
        project.pack()
    project.stages = [{"name": "other", "epochs": 1}]
    project.pack()
    assert [one.name for one in list_chunks(project.chunks)] == ["concepts/01-all", "concepts/01-other"]


def test_a_killed_pack_goes_on_to_the_same_bytes(project, monkeypatch):
    project.concept("hitori", 4)
    project.pack()
    before = project.files()
    shutil.rmtree(project.root / "ws")

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chunks, "commit_chunk", killed)
        project.pack()
    assert list_chunks(project.chunks) == [] and list(project.chunks.rglob("*.tar"))
    project.pack()

    assert {name: data for name, (data, _) in project.files().items()} == {
        name: data for name, (data, _) in before.items()
    }


def test_a_picture_that_changes_while_it_is_packed_is_named(project):
    folder = project.concept("hitori", 2, class_images=dict(CLASSES))
    draw = project.draw

    def changing(*arguments, **options):
        paint(99).save(folder / "00.png")
        return draw(*arguments, **options)

    project.draw = changing
    with pytest.raises(BrokenDataError, match=r"00\.png: it changed while it was packed"):
        project.pack()
    project.pack()

    assert not list(project.chunks.rglob("*.partial-*")) and len(project.rows()) == 6


@pytest.mark.parametrize("name", ["*.tar", "index-*"])
def test_what_is_damaged_is_written_again(project, name):
    project.concept("hitori", 2)
    project.pack()
    before = project.files()
    next((project.chunks / "concepts" / "01-all").glob(name)).write_bytes(b"damaged")

    project.pack()

    assert {name: data for name, (data, _) in project.files().items()} == {
        name: data for name, (data, _) in before.items()
    }


def test_a_dry_run_tells_all_and_writes_nothing(project):
    project.concept("hitori", 20, class_images=dict(CLASSES))

    report = project.pack(dry_run=True)

    assert not project.chunks.exists() and not project.drawn
    assert report.chunks[0].what == "would be packed"
    text = report.text()
    assert "40 class images are to be drawn" in text and "60 to 100" in text
    assert "next: python -m training plan RUN.toml" in text
    project.pack()
    assert project.pack(dry_run=True).chunks[0].what == "nothing has changed"


def test_totals_of_the_run_are_those_of_the_real_plans(project):
    project.concept("hitori", 5, class_images={**CLASSES, "images_per_image": 3})
    project.concept("nijika", 4, seed=60, repeats=2, class_images={**CLASSES, "images_per_image": 1})
    project.stages = [{"name": "one", "epochs": 4}, {"name": "two", "epochs": 3, "concepts": ["nijika"]}]

    report = project.pack()

    totals = run_totals(list_chunks(project.chunks), config=project.config)
    assert totals.num_exposures == sum(line.in_all for chunk in report.chunks for line in chunk.concepts)
    shown = [sum(epoch.values()) for chunk in list_chunks(project.chunks) for epoch in project.per_epoch(chunk.name)]
    assert shown == [2 * (5 + 8)] * 4 + [2 * 8] * 3
