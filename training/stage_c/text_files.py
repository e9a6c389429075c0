"""Load and save the CLIP text model: bare weights files as trainers write them, and Hugging Face folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.stage_c.hub import load_component
from training.stage_c.text import BOS_ID, EOS_ID
from training.weight_files import (
    WeightsError,
    WeightsReport,
    converted,
    load_into,
    open_weights,
    write_tensors,
)

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

CONFIG_METADATA_KEY = "chunkline.text_config"
ANCHOR = "embeddings.token_embedding.weight"
"""A key of every CLIP text model, behind `text_model.` or, from transformers 5.6 on, without."""
EXPORT_FILE = "text_model.safetensors"
STATE_FILE = "model_1.safetensors"
"""The text model in a `-state` folder of kohya's trainer."""
_INNER = ("embeddings.", "encoder.", "final_layer_norm.")


def load_text_model(
    path_or_id: str | Path, dtype: torch.dtype | None = torch.float32, *, config_path: Path | None = None
) -> "CLIPTextModelWithProjection":
    """Load CLIPTextModelWithProjection from a folder, a hub id or a bare weights file, in evaluation mode.

    A hub id or folder of a whole pipeline is read from its `text_encoder/`, a model's own as it is; `owner/name/sub`
    names another subfolder.
    A bare file (.safetensors, as trainers export it), a combined checkpoint, a folder of our exports or kohya's
    `-state` takes its config from config_path, else from its own metadata, else from its shapes: heads of 64 and exact
    GELU, right for CLIP bigG only. Names are those of `read_text_tensors`. dtype: None keeps the file's.

    Raises FileNotFoundError if nothing is there, WeightsError if keys do not fit or the config cannot be known.
    """
    from transformers import CLIPTextModelWithProjection

    path = text_file_in_folder(Path(path_or_id))
    if path.is_file():
        return _load_bare_file(path, dtype, config_path)
    try:
        model, info = load_component(
            CLIPTextModelWithProjection.from_pretrained, path_or_id, "text_encoder", file_name="config.json",
            dtype="auto" if dtype is None else dtype, output_loading_info=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileNotFoundError(f"text model {str(path_or_id)!r}: could not be loaded ({error})") from error
    problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys") if info[key]}
    if problems:
        raise WeightsError(f"text model {str(path_or_id)!r}: {problems}; these weights would be random")
    return model.eval()


def text_file_in_folder(path: Path) -> Path:
    """Return the weights file in a folder of our exports or one of kohya's `-state` folders, else the path itself."""
    return next((path / name for name in (EXPORT_FILE, STATE_FILE) if (path / name).is_file()), path)


def read_text_tensors(path: Path, *, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a text model's tensors by the names of CLIPTextModelWithProjection, and the file's metadata.

    Any prefix goes (`text_encoder.`, `text_encoder.clip_g.transformer.`); `text_model.` is added where it is missing,
    as in CLIPTextModel since transformers 5.6. Dropped: `position_ids` of old transformers, ComfyUI's `logit_scale`.
    The projection of ComfyUI's first checkpoints, `clip_g.text_projection`, is turned over.
    """
    with open_weights(path) as file:
        prefix = file.prefix(ANCHOR).removesuffix("text_model.")
        names = {key: key.removeprefix(prefix) for key in file.keys if key.startswith(prefix)}
        tensors = {
            f"text_model.{name}" if name.startswith(_INNER) else name: converted(file.tensor(key), dtype)
            for key, name in names.items()
            if not name.endswith("position_ids") and name not in ("logit_scale", "text_projection")
        }
        turned = f"{prefix.removesuffix('transformer.')}text_projection"
        if turned in file.keys and "text_projection.weight" not in tensors:
            tensors["text_projection.weight"] = converted(file.tensor(turned), dtype).T.contiguous()
        return tensors, dict(file.metadata)


def _load_bare_file(path: Path, dtype: torch.dtype | None, config_path: Path | None) -> "CLIPTextModelWithProjection":
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    state_dict, metadata = read_text_tensors(path, dtype=dtype)
    if config_path is not None:
        values = json.loads((config_path / "config.json" if config_path.is_dir() else config_path).read_text("utf-8"))
    elif CONFIG_METADATA_KEY in metadata:
        values = json.loads(metadata[CONFIG_METADATA_KEY])
    else:
        values = _config_from_shapes(state_dict, path)
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(CLIPTextConfig(**values))
    load_into(model, state_dict, source=path)
    # The only buffer is not part of the file, so loading leaves it on the meta device.
    embeddings = model.text_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model.eval()


def _config_from_shapes(state_dict: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    try:
        vocabulary, hidden = state_dict[f"text_model.{ANCHOR}"].shape
        intermediate = state_dict["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        positions = state_dict["text_model.embeddings.position_embedding.weight"].shape[0]
        projection = state_dict["text_projection.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(
            f"{path}: key {error.args[0]!r} is missing; a CLIP text model with projection is needed"
        ) from None
    if hidden != 1280:
        raise WeightsError(
            f"{path}: hidden width {hidden} is not CLIP bigG's 1280, so heads and activation are unknown; "
            "pass config_path with its config.json"
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": sum(key.endswith("mlp.fc1.weight") for key in state_dict),
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": positions,
        "projection_dim": projection,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }


def save_text_model(
    text_model: "CLIPTextModelWithProjection",
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> WeightsReport:
    """Write the bare weights file that other programs read, with the config in its metadata.

    A path without suffix is a folder instead: config.json and model.safetensors, as transformers reads it.
    state_dict replaces the module's own weights where those are sharded or an average is to be saved.
    """
    tensors = dict(state_dict if state_dict is not None else text_model.state_dict())
    if path.suffix == ".safetensors":
        extra = {**(metadata or {}), **config_to_metadata(text_model)}
        return write_tensors(path, tensors, dtype=dtype, metadata=extra)
    report = write_tensors(path / "model.safetensors", tensors, dtype=dtype, metadata=metadata)
    values = {**_config_values(text_model), "architectures": ["CLIPTextModelWithProjection"]}
    (path / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return report


def config_to_metadata(text_model: "CLIPTextModelWithProjection") -> dict[str, str]:
    """Return the header entry that makes a bare file load again at any width."""
    return {CONFIG_METADATA_KEY: json.dumps(_config_values(text_model), sort_keys=True)}


def _config_values(text_model: "CLIPTextModelWithProjection") -> dict[str, Any]:
    dropped = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
    values = text_model.config.to_dict()
    return {key: value for key, value in sorted(values.items()) if key not in dropped and value is not None}
