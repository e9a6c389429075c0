"""The demo's models are the same for the same seed, small, and tell pictures apart."""

from pathlib import Path

import pytest

from sharding.files import sha256_file


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_files_and_less_than_five_megabytes(tmp_path, demo_models):
    from scripts.demo_models.captioning import make_captioning_models

    first = demo_models["wd"].parent
    again = make_captioning_models(tmp_path / "again", seed=0)

    assert hashes(tmp_path / "again") == hashes(first)
    assert set(again) == {"wd", "aesthetic", "clip", "head"}
    assert sum(path.stat().st_size for path in first.rglob("*") if path.is_file()) < 5_000_000


def test_another_seed_gives_another_tagger(tmp_path, demo_models):
    from scripts.demo_models.captioning import make_tagger

    other = make_tagger(tmp_path / "wd", seed=1)

    assert sha256_file(other / "model.onnx") != sha256_file(demo_models["wd"] / "model.onnx")
    assert (other / "selected_tags.csv").read_text() == (demo_models["wd"] / "selected_tags.csv").read_text()


@pytest.mark.parametrize("model", ["aesthetic", "quality"])
def test_scores_differ_from_picture_to_picture(lab, model_tables, model):
    from captioning.annotate import annotate

    lab.keep(lab.save(*(lab.png(120, 90, seed=seed) for seed in range(8))))

    annotate(lab.annotate_config({model: model_tables[model]}), lab.workspace)

    scores = [row["score"] for row in lab.rows(model).values()]
    assert max(scores) - min(scores) > 0.2
