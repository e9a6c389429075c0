"""keep_variants and find_crops, from files to what stays."""

from collections.abc import Callable

import pytest
from PIL import Image, ImageDraw

from sharding.config import DatasetConfig
from sharding.dedupe import dedupe
from sharding.scan import scan
from sharding.schema import Workspace
from sharding.tables import read_parts


@pytest.fixture
def decide(make_config: Callable[..., DatasetConfig], workspace: Workspace) -> Callable[..., dict[str, str]]:
    """Scan and dedupe with these [dedupe] settings; return the reason of each dropped path."""

    def run(**settings: bool) -> dict[str, str]:
        config = make_config(dedupe=settings)
        scan(config, workspace, workers=0)
        dedupe(config, workspace)
        drops = read_parts(workspace.dedupe / "drops", ["path", "reason"])
        return dict(zip(drops.column("path").to_pylist(), drops.column("reason").to_pylist(), strict=True))

    return run


@pytest.fixture
def pictures(paint: Callable[..., Image.Image], save: Callable[..., object]) -> None:
    """A picture, its copy, its variant, a portrait part of it, and another picture."""
    picture = paint(1, 640, 400)
    variant = picture.copy()
    ImageDraw.Draw(variant).ellipse((300, 180, 345, 200), fill="white", outline="black", width=5)
    save("picture.png", picture)
    save("copy.jpg", picture, quality=40)
    save("variant.jpg", variant)
    save("portrait.jpg", picture.crop((200, 0, 425, 400)))
    save("other.png", paint(2, 640, 400))


@pytest.mark.usefixtures("pictures")
def test_without_the_switches_variants_go_and_crops_stay(decide):
    assert decide() == {"copy.jpg": "near_duplicate", "variant.jpg": "near_duplicate"}


@pytest.mark.usefixtures("pictures")
def test_keep_variants_keeps_them_apart(decide):
    assert decide(keep_variants=True) == {"copy.jpg": "near_duplicate"}


@pytest.mark.usefixtures("pictures")
def test_find_crops_drops_them_for_the_larger_picture(decide):
    dropped = decide(find_crops=True)

    assert dropped.pop("portrait.jpg") == "cropped_copy"
    assert sorted(dropped) == ["copy.jpg", "variant.jpg"]


@pytest.mark.usefixtures("pictures")
def test_both_switches_together_do_not_find_a_variant_as_a_crop(decide):
    assert decide(find_crops=True, keep_variants=True) == {"copy.jpg": "near_duplicate", "portrait.jpg": "cropped_copy"}


@pytest.mark.usefixtures("pictures")
def test_a_switch_turned_on_later_scans_the_pixels_again_and_decides_anew(decide):
    decide()

    assert "portrait.jpg" in decide(find_crops=True)
    assert "portrait.jpg" not in decide()
