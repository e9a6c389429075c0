"""Exports appear whole, with their licences, or not at all."""

import pytest

from training.exports import write_export
from training.recipes.base import ExportFile


def weights_and_folder(partial):
    (partial / "model.safetensors").write_bytes(b"new")
    (partial / "diffusers").mkdir()
    (partial / "diffusers" / "model_index.json").write_text("{}")
    (partial / "config").mkdir()
    return [ExportFile(partial / "model.safetensors")]


def test_licences_lie_beside_the_weights_and_in_the_diffusers_folder(tmp_path):
    licences = [tmp_path / "LICENSE", tmp_path / "LICENSE_INHERIT"]
    for path in licences:
        path.write_text(path.name)

    write_export(tmp_path / "out", weights_and_folder, licences=licences)

    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("LICENSE*"))
    assert found == ["LICENSE", "LICENSE_INHERIT", "diffusers/LICENSE", "diffusers/LICENSE_INHERIT"]
    assert (tmp_path / "out" / "diffusers" / "LICENSE_INHERIT").read_text() == "LICENSE_INHERIT"


def test_without_its_licence_nothing_is_exported(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")

    with pytest.raises(FileNotFoundError, match=r"save\.licence_files: .*NONE: no such file"):
        write_export(tmp_path / "out", weights_and_folder, licences=[tmp_path / "NONE"])

    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"old"]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
