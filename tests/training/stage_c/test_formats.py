"""Weights files: bit-exact round trips between the three layouts, detection, reports, errors."""

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training.stage_c.formats import load_stage_c, save_stage_c
from training.stage_c.layouts import detect_layout, from_original, to_original
from training.stage_c.modelspec import modelspec
from training.stage_c.network import StageCConfig, StageCNetwork
from training.stage_c.network_config import config_from_diffusers, config_to_diffusers
from training.weight_files import WeightsError, write_tensors

CONFIG = StageCConfig(
    c_cond=24,
    c_hidden=(32, 64),
    num_heads=(4, 2),
    blocks_down=(1, 2),
    blocks_up=(2, 1),
    c_clip_text=20,
    c_clip_text_pooled=12,
    c_clip_img=8,
)


@pytest.fixture(scope="module")
def network() -> StageCNetwork:
    torch.manual_seed(0)
    network = StageCNetwork(CONFIG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return network


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("layout", ["original", "kohya", "diffusers"])
def test_every_layout_goes_there_and_back_without_a_changed_bit(network, layout, tmp_path):
    original = network.state_dict()

    renamed = from_original(original, layout)
    path = tmp_path / ("prior" if layout == "diffusers" else "stage_c.safetensors")
    save_stage_c(network, path, layout=layout)

    assert detect_layout(renamed) == layout
    assert equal(to_original(renamed), original)
    loaded = load_stage_c(path)
    assert loaded.config == CONFIG and equal(loaded.state_dict(), original)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    if layout == "diffusers":
        assert equal(load_stage_c(tmp_path).state_dict(), original)  # the folder of a pipeline


def test_layouts_have_the_names_of_the_other_programs(network):
    kohya, diffusers = (from_original(network.state_dict(), layout) for layout in ("kohya", "diffusers"))
    packed = network.state_dict()["down_blocks.0.2.attention.attn.in_proj_weight"]

    assert torch.equal(kohya["down_blocks.0.2.attention.attn.to_k.weight"], packed[32:64])
    assert torch.equal(diffusers["down_blocks.0.2.attention.to_v.weight"], packed[64:])
    assert "down_blocks.0.2.attention.attn.out_proj.bias" in kohya
    assert "down_blocks.0.2.attention.to_out.0.bias" in diffusers


def test_diffusers_itself_loads_the_folder_we_write(network, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_stage_c(network, tmp_path / "prior", layout="diffusers", dtype=torch.float16)

    model = diffusers.models.StableCascadeUNet.from_pretrained(tmp_path / "prior")

    expected = from_original(network.state_dict(), "diffusers")
    assert equal(model.state_dict(), {key: value.half().float() for key, value in expected.items()})
    assert config_from_diffusers(dict(model.config), source="config.json") == CONFIG
    assert config_from_diffusers(config_to_diffusers(StageCConfig.lite()), source="") == StageCConfig.lite()


def test_diffusers_folders_load_in_shards_and_as_a_single_variant(network, tmp_path):
    save_stage_c(network, tmp_path / "whole", layout="diffusers")
    tensors = load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    config = (tmp_path / "whole" / "config.json").read_text()
    names = sorted(tensors)
    sharded, variant = tmp_path / "sharded", tmp_path / "variant"
    for folder in (sharded, variant):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file_name = f"diffusion_pytorch_model-0000{index}.safetensors"
        save_file({name: tensors[name] for name in part}, sharded / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(tensors, variant / "diffusion_pytorch_model.fp32.safetensors")

    for folder in (sharded, variant):
        assert equal(load_stage_c(folder).state_dict(), network.state_dict())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "state_dict."])
def test_stage_c_is_found_behind_a_prefix_and_beside_other_models(network, prefix, tmp_path):
    tensors = {prefix + key: value for key, value in network.state_dict().items()}
    if prefix:
        tensors["text_encoder.text_projection.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "combined.safetensors")

    loaded = load_stage_c(tmp_path / "combined.safetensors", config=CONFIG, dtype=torch.bfloat16)

    assert equal(loaded.state_dict(), {key: value.bfloat16() for key, value in network.state_dict().items()})


def test_a_saved_file_is_readable_elsewhere_and_has_the_same_bytes_each_time(network, tmp_path):
    header = modelspec(title="test", width=1024, height=768, extra={"author": "nobody"})

    digests = set()
    for name in ("one", "two"):
        path = tmp_path / f"{name}.safetensors"
        report = save_stage_c(network, path, dtype=torch.float16, metadata=header)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())

    assert len(digests) == 1
    assert report.num_bytes == path.stat().st_size
    assert equal(load_file(path), {key: value.half() for key, value in network.state_dict().items()})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "stable-cascade"
    assert metadata["modelspec.resolution"] == "1024x768"
    assert metadata["modelspec.author"] == "nobody"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_values_lost_in_the_saved_dtype_are_counted(network, tmp_path):
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    tensors["clf.1.bias"][:3] = torch.tensor([70_000.0, -1e6, 1e-9])
    tensors["clf.1.bias"][3] = 0.0

    report = save_stage_c(network, tmp_path / "c.safetensors", dtype=torch.float16, state_dict=tensors)

    assert (report.num_overflowed, report.overflowed_keys) == (2, ("clf.1.bias",))
    assert report.num_vanished >= 1
    assert save_stage_c(network, tmp_path / "d.safetensors", state_dict=tensors).num_vanished == 0


def test_writing_keeps_every_dtype_and_shape(tmp_path):
    tensors = {
        "scalar": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 1).bfloat16(),
        "turned": torch.randn(4, 3).T,
        "empty": torch.empty(0, 2),
    }

    write_tensors(tmp_path / "t.safetensors", tensors)

    assert equal(dict(sorted(load_file(tmp_path / "t.safetensors").items())), dict(sorted(tensors.items())))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(network, tmp_path):
    path = tmp_path / "c.safetensors"
    save_stage_c(network, path)
    before = path.read_bytes()

    class Broken(torch.Tensor):
        def detach(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.zeros(2).as_subclass(Broken)})

    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_errors_name_what_does_not_fit(network, tmp_path):
    state_dict = dict(network.state_dict())
    del state_dict["clf.1.bias"]
    state_dict["clf.9.bias"] = torch.zeros(1)
    write_tensors(tmp_path / "bad.safetensors", state_dict)
    write_tensors(tmp_path / "other.safetensors", {"unet.conv.weight": torch.zeros(1)})
    (tmp_path / "text.safetensors").write_text("not weights")

    with pytest.raises(WeightsError, match=r"1 missing: clf\.1\.bias; 1 unexpected: clf\.9\.bias"):
        load_stage_c(tmp_path / "bad.safetensors", config=CONFIG)
    with pytest.raises(WeightsError, match=r"wrong shape: .*clip_txt_mapper"):
        load_stage_c(tmp_path / "bad.safetensors", config=dataclasses.replace(CONFIG, c_clip_text=21))
    with pytest.raises(WeightsError, match=r"file of another model; it starts with unet\.conv\.weight"):
        load_stage_c(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_stage_c(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load_stage_c(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no config\.json here or in prior/"):
        load_stage_c(tmp_path)
    with pytest.raises(ValueError, match="is written as a folder"):
        save_stage_c(network, tmp_path / "c.safetensors", layout="diffusers")
    with pytest.raises(WeightsError, match="is this stage B"):
        config_from_diffusers({**config_to_diffusers(CONFIG), "effnet_in_channels": 16}, source="config.json")


def test_an_unreachable_hub_id_is_reported_as_not_found(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(FileNotFoundError, match="neither a local path nor a reachable hub id"):
        load_stage_c("nobody/nothing-of-this-name")
