"""`training export --push`, against a hub that is made up."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from sharding.config import ConfigError
from tests.training.paper_run import PaperRun
from training import push as push_module
from training.cli import main
from training.push import PushError, push_all, pushes_of, require_repository

TOKEN = "hf_secret"


class Response:
    """What an HTTP client gives; HfHubHTTPError reads it."""

    def __init__(self, status_code):
        self.status_code, self.headers, self.request, self.text = status_code, {}, None, ""


class FakeHub:
    """Keeps what is uploaded. breaks_at: names of files that fail once; status: what any call answers then."""

    def __init__(self, *, breaks_at=(), status=None):
        self.breaks_at, self.status = set(breaks_at), status
        self.blobs, self.sent, self.commits, self.repositories = set(), [], [], {}

    def create_repo(self, repository, *, exist_ok, private, repo_type):
        if self.status:
            raise HfHubHTTPError(f"{self.status} for url with {TOKEN}", response=Response(self.status))
        assert exist_ok and repo_type == "model"
        self.repositories.setdefault(repository, private)

    def preupload_lfs_files(self, repository, additions, *, repo_type):
        for one in additions:
            if one.path_in_repo in self.breaks_at:
                self.breaks_at.discard(one.path_in_repo)
                raise ConnectionError("the line is down")
            if one.upload_info.sha256 not in self.blobs:
                self.blobs.add(one.upload_info.sha256)
                self.sent.append((repository, one.path_in_repo))

    def create_commit(self, repository, operations, *, commit_message, repo_type):
        files = {one.path_in_repo: one.path_or_fileobj for one in operations}
        self.commits.append((repository, files, commit_message))
        return type("Commit", (), {"commit_url": f"hub/{repository}/1"})()

    def text(self, repository, name):
        [files] = [files for one, files, _ in self.commits if one == repository]
        return Path(files[name]).read_text(encoding="utf-8")


def write_export(folder, *, decoder=True):
    """Write what an export of stage C looks like."""
    for name in (
        "stage_c.safetensors",
        "diffusers/prior/model.safetensors",
        "diffusers-decoder/decoder/model.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": torch.full((4,), float(len(name)))}, folder / name)
    for part in ("diffusers", "diffusers-decoder"):
        (folder / part / "model_index.json").write_text(json.dumps({"_class_name": part}))
        (folder / part / "README.md").write_text(f"the {part}'s own")
    for part in ("", "diffusers"):
        (folder / part / "LICENSE").write_text("faipl")
    (folder / ".partial-7").mkdir(exist_ok=True)
    (folder / ".partial-7" / "stage_c.safetensors").write_bytes(b"half")
    (folder / "README.md").write_text("the card")


def test_the_diffusers_folder_lies_at_the_top_and_the_card_is_its_readme(tmp_path):
    write_export(tmp_path)

    prior, decoder = pushes_of(tmp_path, "me/prior", "me/decoder")

    names = ["LICENSE", "README.md", "model_index.json", "prior/model.safetensors", "stage_c.safetensors"]
    assert [one.name for one in prior.files] == names
    assert prior.files[1].path.read_text() == "the card"
    assert [one.name for one in decoder.files] == ["README.md", "decoder/model.safetensors", "model_index.json"]
    assert decoder.files[0].path.read_text() == "the diffusers-decoder's own"


def test_all_files_of_a_repository_come_in_one_commit_and_a_new_one_is_private(tmp_path):
    write_export(tmp_path)
    hub = FakeHub()

    lines = list(push_all(pushes_of(tmp_path, "me/prior", "me/decoder"), token=TOKEN, message="m", api=hub))

    assert hub.repositories == {"me/prior": True, "me/decoder": True}
    assert [(repository, len(files)) for repository, files, _ in hub.commits] == [("me/prior", 5), ("me/decoder", 3)]
    assert lines == ["me/prior: 5 files, hub/me/prior/1", "me/decoder: 3 files, hub/me/decoder/1"]


def test_an_upload_that_broke_goes_on_where_it_was(tmp_path):
    write_export(tmp_path)
    hub, pushes = FakeHub(breaks_at=["prior/model.safetensors"]), pushes_of(tmp_path, "me/prior", None)

    with pytest.raises(PushError, match=r"push to me/prior: ConnectionError: the line is down; run the same command"):
        list(push_all(pushes, token=TOKEN, message="m", api=hub))
    assert hub.commits == []
    list(push_all(pushes, token=TOKEN, message="m", api=hub))

    assert len(hub.commits) == 1
    assert len(hub.sent) == len(set(hub.sent)) == 5


@pytest.mark.parametrize(
    ("status", "said"), [(401, "no write access"), (403, "no write access"), (500, "run the same")]
)
def test_what_the_hub_refuses_is_said_without_the_token(tmp_path, status, said):
    write_export(tmp_path)

    with pytest.raises(PushError, match=said) as caught:
        list(push_all(pushes_of(tmp_path, "me/prior", None), token=TOKEN, message="m", api=FakeHub(status=status)))

    assert TOKEN not in str(caught.value) and caught.value.__cause__ is None


def test_damaged_and_missing_files_are_not_pushed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to push to me/prior: no weights are exported"):
        pushes_of(tmp_path, "me/prior", None)
    write_export(tmp_path)
    (tmp_path / "diffusers" / "LICENSE").write_text("another")
    with pytest.raises(ValueError, match=r"LICENSE .*would have the same name in me/prior"):
        pushes_of(tmp_path, "me/prior", None)
    (tmp_path / "diffusers" / "LICENSE").write_text("faipl")
    whole = (tmp_path / "stage_c.safetensors").read_bytes()
    (tmp_path / "stage_c.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"stage_c\.safetensors: damaged .*; export again"):
        pushes_of(tmp_path, "me/prior", None)


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mo del", "--"])
def test_a_name_that_is_no_repository_is_refused(name):
    with pytest.raises(ConfigError, match=r"--push"):
        require_repository(name, "--push")


# --- the command ---


@pytest.fixture
def run(run_toml, tmp_path, monkeypatch):
    """A trained run whose export is the one above; the command, and the hub that it reaches."""
    (tmp_path / "LICENSE").write_text("faipl")
    sets = [
        "save.model_card.license=mit", "save.export_formats=['original', 'diffusers']",
        f"save.licence_files=['{tmp_path / 'LICENSE'}']",
    ]  # fmt: skip
    paper = PaperRun(run_toml, tmp_path / "run", *sets)
    paper.train_all()
    hub, links = FakeHub(), {}

    def export(config, root, output, **_):
        links.update(hub_prior=config.save.hub_prior, hub_decoder=config.save.hub_decoder)
        write_export(output)
        yield "stage_c.safetensors"

    def copy_decoder(output, base, save, **_):
        links.update(of_decoder=save.hub_prior)
        return output / "diffusers-decoder"

    monkeypatch.setattr("training.use_state.export_weights", export)
    monkeypatch.setattr("training.stage_c.export.copy_decoder_beside", copy_decoder)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["export", str(run_toml), "--run-dir", str(tmp_path / "run")]
    command += [word for one in sets for word in ("--set", one)]
    return command, hub, links, tmp_path


def test_prior_and_decoder_name_each_other(run):
    command, hub, links, _ = run

    code = main([*command, "--push", "me/prior", "--decoder-from", "some/decoder", "--push-decoder", "me/decoder"])

    assert code == 0
    assert links == {"hub_prior": "me/prior", "hub_decoder": "me/decoder", "of_decoder": "me/prior"}
    card = hub.text("me/prior", "README.md")
    assert card.startswith("---\npipeline_tag: text-to-image\nlicense: mit\ndecoder:\n- me/decoder\n---\n# tiny\n")
    assert "| **Total** | 2 | 0 |" in card and 'model = "me/decoder"' in card


def test_nothing_is_pushed_unless_asked_for(run):
    command, hub, _, _ = run

    assert main(command) == 0

    assert hub.commits == []


def test_a_dry_run_lists_what_would_go_and_sends_nothing(run, capsys, monkeypatch):
    command, hub, _, tmp_path = run
    monkeypatch.delenv("HF_TOKEN")

    assert main([*command, "--push", "me/prior", "--dry-run"]) == 0
    assert "holds nothing yet" in capsys.readouterr().out
    write_export(tmp_path / "run" / "export")
    assert main([*command, "--push", "me/prior", "--dry-run"]) == 0

    said = capsys.readouterr().out
    assert "me/prior: 5 files" in said and "  prior/model.safetensors" in said
    assert hub.repositories == {} and hub.commits == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--push", "me/prior", "--push-decoder", "me/decoder"], "--push-decoder: which decoder?"),
        (["--push-decoder", "me/decoder"], "go with --push"),
        (["--push", "me/prior", "--from", "x.safetensors"], "--push is for the weights of a run"),
        (["--push", "prior"], "give the owner, too, as in OWNER/prior"),
        (["--push", "me/prior", "--set", "save.model_card={}"], "save.model_card.license: missing"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_written(run, capsys, options, said):
    command, hub, links, tmp_path = run

    assert main([*command, *options]) == 2

    assert said in capsys.readouterr().err
    assert hub.repositories == links == {} and not (tmp_path / "run" / "export").exists()


def test_without_a_token_nothing_is_exported(run, capsys, monkeypatch):
    command, _, links, _ = run
    monkeypatch.delenv("HF_TOKEN")

    assert main([*command, "--push", "me/prior"]) == 2

    assert "HF_TOKEN: not set" in capsys.readouterr().err and links == {}


def test_a_push_that_fails_ends_with_1_and_one_line_and_can_be_run_again(run, capsys):
    command, hub, _, _ = run
    hub.breaks_at = {"stage_c.safetensors"}

    assert main([*command, "--push", "me/prior"]) == 1
    error = capsys.readouterr().err
    assert "error: push to me/prior: ConnectionError: the line is down" in error and "Traceback" not in error
    assert TOKEN not in error
    assert main([*command, "--push", "me/prior"]) == 0

    assert len(hub.commits) == 1


@pytest.mark.parametrize("words", [["--merged"], ["--merged", "--dry-run"], ["--merged", "--from", "w.safetensors"]])
def test_merged_without_adapters_is_refused_before_anything_is_written(run, capsys, words):
    command, _, links, tmp_path = run

    assert main([*command, *words]) == 2

    assert "--merged is for a run with [lora]" in capsys.readouterr().err
    assert links == {} and not (tmp_path / "run" / "export").exists()


def test_the_token_is_in_no_file(run):
    command, _, _, tmp_path = run
    main([*command, "--push", "me/prior"])

    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert push_module.TOKEN_VARIABLE == "HF_TOKEN"
