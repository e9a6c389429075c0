"""Files of the text model: names and prefixes of other programs, stray entries, folders."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from training.stage_c.formats import load_stage_c
from training.stage_c.layouts import from_original
from training.stage_c.text_files import load_text_model, save_text_model
from training.weight_files import WeightsError


@pytest.fixture(scope="module")
def text_model():
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=49_408, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=8, hidden_act="gelu", bos_token_id=49_406, eos_token_id=49_407, pad_token_id=49_407,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def config_path(text_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    save_text_model(text_model, folder)
    return folder


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def flattened(tensors):
    """As CLIPTextModel names its weights since transformers 5.6."""
    return {key.removeprefix("text_model."): value for key, value in tensors.items()}


def with_position_ids(tensors):
    return {**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def prefixed(prefix):
    return lambda tensors: {prefix + key: value for key, value in tensors.items()} | {"unet.other": torch.zeros(1)}


def of_early_comfyui(tensors):
    """The projection turned over and outside of `transformer.`, and the scale of CLIP's logits."""
    rest = {key: value for key, value in tensors.items() if key != "text_projection.weight"}
    return {
        **prefixed("text_encoder.clip_g.transformer.")(rest),
        "text_encoder.clip_g.text_projection": tensors["text_projection.weight"].T.contiguous(),
        "text_encoder.clip_g.logit_scale": torch.tensor(4.6),
    }


@pytest.mark.parametrize(
    "renamed",
    [
        dict, flattened, with_position_ids, prefixed("text_encoder."), prefixed("clip_g.transformer."),
        prefixed("text_encoder.clip_g.transformer."), of_early_comfyui,
        lambda tensors: prefixed("text_encoder.")(flattened(with_position_ids(tensors))),
    ],
)  # fmt: skip
def test_names_of_other_programs_are_read_without_a_changed_bit(text_model, config_path, renamed, tmp_path):
    expected = dict(text_model.state_dict())
    save_file({key: value.clone() for key, value in renamed(expected).items()}, tmp_path / "text.safetensors")

    loaded = load_text_model(tmp_path / "text.safetensors", config_path=config_path)

    assert equal(loaded.state_dict(), expected)


def test_a_state_folder_of_kohya_gives_both_models(text_model, config_path, tmp_path):
    from training.stage_c.network import StageCConfig, StageCNetwork

    config = StageCConfig(
        c_cond=24, c_hidden=(64, 64), num_heads=(1, 1), blocks_down=(1, 1), blocks_up=(1, 1), c_clip_text=16,
        c_clip_text_pooled=8, c_clip_img=8,
    )  # fmt: skip
    network = StageCNetwork(config)
    state = {key: value.clone() for key, value in from_original(network.state_dict(), "kohya").items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file(dict(text_model.state_dict()), tmp_path / "model_1.safetensors", metadata={"format": "pt"})

    loaded, text = load_stage_c(tmp_path), load_text_model(tmp_path, config_path=config_path)

    assert equal(loaded.state_dict(), network.state_dict())
    assert equal(text.state_dict(), text_model.state_dict())


def test_our_folder_loads_in_transformers_and_gives_the_same(text_model, config_path):
    loaded, info = transformers.CLIPTextModelWithProjection.from_pretrained(config_path, output_loading_info=True)
    ids = torch.tensor([[49_406, 320, 1125, 49_407]])

    assert not any(info.values())
    assert torch.equal(loaded.eval()(ids).text_embeds, text_model(ids).text_embeds)
    assert sorted(load_file(config_path / "model.safetensors")) == sorted(text_model.state_dict())


def test_a_text_model_without_projection_or_of_two_kinds_is_refused(text_model, config_path, tmp_path):
    tensors = dict(text_model.state_dict())
    two = {**prefixed("clip_g.")(tensors), **prefixed("clip_l.")(tensors)}
    save_file({key: value.clone() for key, value in two.items()}, tmp_path / "two.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "none.safetensors")

    with pytest.raises(WeightsError, match=r"several prefixes: \['clip_g.text_model.', 'clip_l.text_model.'\]"):
        load_text_model(tmp_path / "two.safetensors", config_path=config_path)
    with pytest.raises(WeightsError, match=r"1 missing: text_projection\.weight"):
        load_text_model(tmp_path / "none.safetensors", config_path=config_path)
