"""Where models are found: local folders, the hub, and what stands in for a version; devices and libraries."""

import sys

import pytest

from captioning.model_files import locate, locate_file
from captioning.plugin import MissingExtraError, ModelError
from captioning.torch_models import import_torch, torch_device


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, owner/model, at commit abc123; anything else is not there."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "snapshots" / "abc123"
    (snapshot / "models").mkdir(parents=True)
    (snapshot / "models" / "head.pth").write_bytes(b"weights")

    def snapshot_download(repository, *, revision, allow_patterns):
        if (repository, revision) != ("owner/model", "main"):
            raise OSError("404 not found\nmore")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return snapshot


def test_a_hub_models_revision_is_the_commit_that_its_branch_stands_for(hub):
    assert locate("owner/model", revision="main", patterns=["*"]) == (hub, "abc123")
    assert locate_file("owner/model/models/head.pth", revision="main", key="head") == (
        hub / "models" / "head.pth",
        "abc123/models/head.pth",
    )


def test_what_the_hub_does_not_have_is_an_error_that_names_it(hub):
    with pytest.raises(ModelError, match=r"model = 'owner/model': no such folder here, and 'v2' .* \(404 not found\)"):
        locate("owner/model", revision="v2", patterns=["*"])
    with pytest.raises(ModelError, match=r"head = .* has no file other\.pth"):
        locate_file("owner/model/other.pth", revision="main", key="head")
    with pytest.raises(ModelError, match="not a hub id OWNER/NAME"):
        locate("no/such/folder", revision="main", patterns=["*"])


def test_a_subfolder_of_a_repository_is_another_model_than_its_neighbour(hub, monkeypatch):
    asked = []
    import huggingface_hub

    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: (asked.append(options["allow_patterns"]), original(name, **options))[1],
    )

    found = [locate("owner/model", revision="main", patterns=["*.onnx"], subfolder=name) for name in ("a", "b")]

    assert found == [(hub / "a", "abc123/a"), (hub / "b", "abc123/b")]
    assert asked == [["a/*.onnx"], ["b/*.onnx"]]


def test_a_local_folder_comes_before_the_hub_and_changes_with_its_bytes(tmp_path, monkeypatch):
    folder = tmp_path / "owner" / "model"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"one")
    monkeypatch.chdir(tmp_path)

    _, first = locate("owner/model", revision="main", patterns=["model.onnx"])
    (folder / "model.onnx").write_bytes(b"two")
    _, second = locate("owner/model", revision="main", patterns=["model.onnx"])

    assert first.startswith("sha256:") and first != second
    with pytest.raises(ModelError, match=r"holds none of \*\.csv"):
        locate("owner/model", revision="main", patterns=["*.csv"])


def test_a_device_that_torch_does_not_see_is_an_error():
    torch = pytest.importorskip("torch")

    assert torch_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="sees no such device"):
            torch_device("cuda")


def test_a_missing_library_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(MissingExtraError, match=r"torch is not installed: run `pip install -e '\.\[caption,cpu\]'`"):
        import_torch()
