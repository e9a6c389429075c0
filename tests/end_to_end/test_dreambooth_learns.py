"""What a DreamBooth run teaches: the concept's prompt draws the concept, and another's does not.

A toy model that draws real pictures in the colour that a prompt names is taught names whose pictures are red (ada) and
blue (bob). It knows neither before, and draws both grey. Class images of its own making hold it to that. Colours are
means over previews with fixed seeds, losses those of the verdict, with fixed noise.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from scripts.tiny_dreambooth import make_run, make_sd
from scripts.tiny_run import Launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = (
    "optimizer.learning_rate=2e-3", "latents.use=true", "latents.text=true", "caption.shuffle=false",
    "save.every_steps=1000", "batch.micro_batch_size=8", "dreambooth.sanity_prompt=''",
    "preview.prompts=[" + ", ".join(
        f'{{text="{name}", width=64, height=64, steps=6, guidance=1, seed={seed}, sampler="ddim"}}'
        for name in ("ada", "bob") for seed in (1, 2)
    ) + "]",
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a run showed of itself. colours: mean red - mean blue of previews, 0 to 255, by (prompt, is trained)."""

    redness: dict[tuple[str, bool], float]
    losses: list[dict[str, float]]
    """Of the verdict, before and after."""
    trained: list[float]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_sd(tmp_path_factory.mktemp("colours"), "sd1", num_steps=100)


@pytest.fixture(scope="module")
def train(model, tmp_path_factory):
    """Return a function that trains concepts and tells how it went."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")

        def told(names, epochs, *more):
            root = tmp_path_factory.mktemp("-".join(names))
            run = make_run(root, model, *SETTINGS, f"data.epochs={epochs}", *more, names=names)
            words = [word for override in run.overrides for word in ("--set", override)]
            for command in ("pack-concepts", "encode-latents"):
                assert Launch([command, str(run.config), *words], run.log).wait() == 0, run.log.read_text()
            assert run.train("--chunks", ":") == 0, run.log.read_text()
            return read(run)

        yield told


def read(run):
    pictures: dict[tuple[str, bool], list[float]] = {}
    for path in run.root.rglob("previews/step-*-[0-9][0-9].png"):
        picture = Image.open(path)
        red, _, blue = np.asarray(picture, dtype=float).mean(axis=(0, 1))
        key = (picture.info["parameters"].partition("\n")[0], not path.name.startswith("step-00000000"))
        pictures.setdefault(key, []).append(red - blue)
    rows = run.rows("metrics.jsonl")
    losses = [
        {name.removeprefix("verdict/"): value for name, value in row.items() if name.startswith("verdict/")}
        for row in rows
    ]
    return Told(
        {key: sum(values) / len(values) for key, values in pictures.items()},
        [row for row in losses if "trained/ada" in row],
        [row["train/loss"] for row in rows if "train/loss" in row],
    )


@pytest.fixture(scope="module")
def ada(train):
    told = train(("ada",), 20)
    print(told)  # shown when a threshold fails
    return told


@pytest.fixture(scope="module")
def both(train):
    told = train(("ada", "bob"), 27)
    print(told)
    return told


def test_before_training_both_names_draw_the_same_grey(ada):
    assert abs(ada.redness["ada", False]) < 25
    assert abs(ada.redness["bob", False]) < 25


def test_the_loss_falls(ada, both):
    for told in (ada, both):
        quarter = len(told.trained) // 4
        assert np.mean(told.trained[-quarter:]) < 0.8 * np.mean(told.trained[:quarter])
        before, *_, after = told.losses
        assert all(after[name] < 0.75 * before[name] for name in before if name.startswith("trained/"))


def test_the_concepts_prompt_reacts_and_the_others_does_not(ada):
    moved = {name: ada.redness[name, True] - ada.redness[name, False] for name in ("ada", "bob")}

    assert moved["ada"] > 50
    assert abs(moved["bob"]) < moved["ada"] / 2


def test_class_images_are_drawn_as_before(ada):
    before, *_, after = ada.losses

    assert after["prior/ada"] < 1.15 * before["prior/ada"]


def test_two_concepts_are_told_apart(both):
    moved = {name: both.redness[name, True] - both.redness[name, False] for name in ("ada", "bob")}

    assert moved["ada"] > 15
    assert moved["bob"] < -15
    assert both.redness["ada", True] - both.redness["bob", True] > 40
