"""Class images: which are wanted, what makes them, and that none is made twice."""

import os
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image

from tests.training.dreambooth.test_sampling import V, networks_of
from training.config.concepts import ConceptConfig
from training.dreambooth.class_images.making import is_made, make_class_images, path_of
from training.dreambooth.class_images.model import digest
from training.dreambooth.class_images.prompts import class_prompt, instance_prompt
from training.dreambooth.class_images.wanted import ClassImage, Instance, class_images_of, key

INSTANCES = (Instance("a", "sks girl, smile", 16, 24), Instance("b", "sks girl, frown", 24, 16))
OTHERS = {
    "prompt": "boy", "negative": "dark", "width": 24, "height": 24, "sampler": "euler", "guidance": 5.0, "steps": 3,
    "seed": 2,
}  # fmt: skip
"""Another value for each part of a class image."""


@pytest.fixture(scope="module")
def networks():
    return networks_of("sd1")


def concept(classes=None, **changes):
    made = {"prompt": "[filewords]", "token": "girl", "images_per_image": 2, "steps": 2, **(classes or {})}
    return ConceptConfig(**{"name": "hitori", "folder": "x", "token": "sks girl", "class_images": made, **changes})


def image(**changes):
    return replace(ClassImage("girl", "blurry", 16, 16, "ddim", 7.5, 2, 1), **changes)


def make(wanted, folder, networks, **changes):
    return make_class_images(wanted, folder, **{"networks": networks, "model_digest": "m", **changes})


# --- words ---


def test_a_class_image_has_the_class_token_where_the_caption_has_the_concepts():
    assert class_prompt(concept({"prompt": "photo of [filewords]"}), "sks girl, smile") == "photo of girl, smile"


def test_an_instance_has_the_concepts_token_in_place_of_the_class_token():
    assert instance_prompt(concept(), "girl, schoolgirl") == "sks girl, schoolgirl"
    assert instance_prompt(concept(), "sks girl, schoolgirl") == "sks girl, schoolgirl"


def test_tokens_with_signs_are_taken_as_they_are():
    assert class_prompt(concept(token="saber (fate)"), r"saber (fate), \1 sabers") == r"girl, \1 sabers"


def test_the_concepts_own_prompt_serves_when_both_tokens_are_given():
    alone = concept({"prompt": "", "token": "girl"}, token="sks", prompt="photo of sks girl")
    assert class_prompt(alone, "") == "photo of girl"
    both = concept({"prompt": ""}, prompt="photo of sks girl, [filewords]")

    assert class_prompt(both, "smile") == "photo of girl, smile"


def test_without_words_for_a_class_image_the_concept_is_named():
    with pytest.raises(ValueError, match=r"'hitori': class_images.prompt is empty; say what"):
        class_prompt(concept({"prompt": "", "token": ""}), "smile")


def test_the_instances_own_prompt_is_refused_as_a_class_images():
    with pytest.raises(ValueError, match="'smile', which is what the picture itself is trained with"):
        class_images_of(concept(), [Instance("a", "smile", 16, 16)], seed=1)


# --- what is wanted ---


def test_each_picture_gets_its_number_of_class_images_at_its_size():
    wanted = class_images_of(concept({"sampler": "euler_a", "negative": "dark"}), INSTANCES, seed=1)

    assert [(one.prompt, one.width, one.height) for one in wanted] == [
        ("girl, smile", 16, 24), ("girl, frown", 24, 16), ("girl, smile", 16, 24), ("girl, frown", 24, 16),
    ]  # fmt: skip
    assert {(one.sampler, one.negative, one.steps) for one in wanted} == {("euler_a", "dark", 2)}
    assert len({one.seed for one in wanted}) == 4


def test_seeds_do_not_depend_on_other_pictures_or_numbers():
    wanted = class_images_of(concept(), INSTANCES, seed=1)

    assert class_images_of(concept({"images_per_image": 1}), INSTANCES[1:], seed=1) == [wanted[1]]
    assert class_images_of(concept(), INSTANCES, seed=2)[0].seed != wanted[0].seed
    assert class_images_of(concept(name="ryou"), INSTANCES, seed=1)[0].seed != wanted[0].seed
    assert [one.seed for one in wanted] == [97180675, 1764547239, 974386983, 4263332908]


# --- what makes them ---


def test_everything_that_makes_a_class_image_makes_its_key():
    keys = {key(image(**{name: value}), "m") for name, value in OTHERS.items()}

    assert set(OTHERS) == {field.name for field in fields(ClassImage)}
    assert len(keys | {key(image(), "m"), key(image(), "another model")}) == len(OTHERS) + 2
    assert key(image(guidance=7), "m") == key(image(guidance=7.0), "m")


def test_a_models_digest_tells_weights_vae_text_and_their_use_apart(networks):
    def changed(part):
        others = networks_of("sd1")
        with torch.no_grad():
            next(iter(getattr(others, part).parameters())).view(-1)[0] += 1e-3
        return others

    others = [
        *(changed(part) for part in ("unet", "vae", "text")), replace(networks, prediction=V),
        replace(networks, max_tokens=150), replace(networks, strict_tokens=True), networks_of("sd1", clip_skip=2),
    ]  # fmt: skip

    assert digest(networks_of("sd1")) == digest(networks)
    assert len({digest(each) for each in (networks, *others)}) == 8


# --- making them ---


def test_class_images_are_made_once_and_say_what_made_them(networks, tmp_path):
    wanted = class_images_of(concept(), INSTANCES, seed=1)
    made = []
    paths = make([*wanted, wanted[0]], tmp_path, networks, on_made=made.append)

    again = make(wanted, tmp_path, None, on_made=made.append)

    assert paths == [*again, again[0]] and sorted(made) == sorted(again) == sorted(tmp_path.iterdir())
    with Image.open(paths[1]) as picture:
        assert picture.size == (24, 16)
        assert picture.info["parameters"].startswith("girl, frown\nSteps: 2, Sampler: ddim, CFG scale: 7.5, Seed: ")


def test_a_changed_wish_is_made_beside_the_old_one(networks, tmp_path):
    (old,) = make([image()], tmp_path, networks)
    before = old.read_bytes()

    (new,) = make([image(seed=2)], tmp_path, networks)
    (of_another_model,) = make([image()], tmp_path, networks, model_digest="another")

    assert len({old, new, of_another_model}) == 3 and old.read_bytes() == before
    assert of_another_model.read_bytes() == before and new.read_bytes() != before


def test_bits_do_not_depend_on_what_else_is_made(networks, tmp_path):
    wanted = [image(seed=seed) for seed in range(3)]
    alone = [make([one], tmp_path / "alone", networks)[0].read_bytes() for one in reversed(wanted)]

    together = make(wanted, tmp_path / "together", networks, batch_size=3)

    assert [path.read_bytes() for path in together] == alone[::-1]


def test_processes_share_the_work(networks, tmp_path):
    wanted, made = [image(seed=seed) for seed in range(5)], ([], [])
    for rank in (1, 0):
        paths = make(wanted, tmp_path, networks, rank=rank, world_size=2, on_made=made[rank].append)

    assert (len(made[0]), len(made[1])) == (3, 2)
    assert all(is_made(one, path) for one, path in zip(wanted, paths, strict=True))


def test_a_killed_writers_left_over_goes_and_a_live_ones_stays(networks, tmp_path):
    old, new = (tmp_path / f"{number}.png.partial-1-{number}" for number in range(2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))

    make([image()], tmp_path, networks)

    assert new.exists() and not old.exists()


def test_stopped_half_way_nothing_is_half_made(networks, tmp_path):
    wanted = [image(seed=seed) for seed in range(3)]

    def killed(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(wanted, tmp_path, networks, on_made=killed)
    (first,) = tmp_path.iterdir()
    time = first.stat().st_mtime_ns
    paths = make(wanted, tmp_path, networks)

    assert first == paths[0] and first.stat().st_mtime_ns == time
    assert sorted(paths) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-40] + bytes(20) + data[-20:]],
    ids=["cut", "empty", "altered"],
)
def test_a_broken_file_is_made_again(networks, tmp_path, damage):
    (path,) = make([image()], tmp_path, networks)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))

    make([image()], tmp_path, networks)

    assert path.read_bytes() == whole


def test_a_picture_of_anothers_name_or_without_its_text_is_not_taken(networks, tmp_path):
    (path,) = make([image()], tmp_path, networks)
    other = path_of(image(seed=2), tmp_path, model_digest="m")
    other.write_bytes(path.read_bytes())
    plain = path_of(image(seed=3), tmp_path, model_digest="m")
    Image.new("RGB", (16, 16)).save(plain)

    assert is_made(image(), path)
    assert not is_made(image(seed=2), other) and not is_made(image(seed=3), plain)
