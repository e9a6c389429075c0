"""Use weights that somebody gives us, in any layout and of no run: export them anew, make pictures.

The run's settings, where there are any, give what does not come with the weights: text model, tokenizer, previewer.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from training.config import Prompt, RunConfig, dreambooth, stage_c
from training.config.saving import SaveConfig
from training.exports import write_export
from training.precision import DTYPES, choose_device
from training.preview import write_pictures
from training.preview_prompts import FILEWORDS
from training.prompt_file import read_prompts
from training.recipes.base import ExportFile
from training.stage_c.cascade import draw_pictures, with_inference_settings
from training.stage_c.export import StageCWeights, export_stage_c
from training.stage_c.formats import file_in_folder
from training.stage_c.given_weights import load_given
from training.stage_c.modelspec import modelspec
from training.stage_c.previewer import load_previewer
from training.weight_files import open_weights

_KEPT_ENTRIES = ("modelspec.", "ss_", "chunkline.run", "chunkline.chunk", "chunkline.global_step", "chunkline.images_")


def export_given(
    source: str,
    output: Path,
    *,
    config: RunConfig | None,
    save: SaveConfig,
    dtype_name: str | None,
    text_encoder: str | None,
) -> list[ExportFile]:
    """Write given weights in the formats of `save`, with the header entries they came with.

    dtype_name: None keeps their number formats.

    Raises FileNotFoundError, WeightsError, ValueError when they have no text model.
    """
    text_encoder, tokenizer = _text_of(config, text_encoder)
    given = load_given(source, text_encoder=text_encoder, tokenizer=tokenizer, dtype=None)
    weights = StageCWeights(
        network=given.network,
        text_model=given.text_model,
        tokenizer=given.tokenizer,
        text_is_trained=given.has_own_text,
    )
    title = config.name if config is not None else Path(source).stem
    header = {
        **modelspec(title=title, width=1024, height=1024),
        **_metadata(source),
        **{f"modelspec.{key}": value for key, value in save.modelspec.items()},
    }
    title, dtype = header["modelspec.title"], DTYPES[dtype_name] if dtype_name is not None else None
    return write_export(
        output,
        lambda partial: export_stage_c(weights, partial, save=save, dtype=dtype, title=title, header=header),
        licences=save.licence_files,
    )


def draw_given(
    source: str,
    output: Path,
    *,
    config: RunConfig | None,
    prompts_file: Path | None,
    decoder: str | None,
    previewer: Path | None,
    text_encoder: str | None,
) -> Iterator[str]:
    """Make pictures from given weights with the published inference settings; yield the files.

    Raises FileNotFoundError, WeightsError, ConfigError for the prompt file, ValueError when something is missing.
    """
    prompts = [with_inference_settings(prompt) for prompt in prompts_of_given(config, prompts_file, recipe="stage_c")]
    if previewer is None and config is not None and config.of_stage_c.previewer is not None:
        previewer = Path(config.of_stage_c.previewer)
    if decoder is None and previewer is None:
        raise ValueError("no picture can be made: name a decoder pipeline with --decoder, or a --previewer")
    device = choose_device(config.device if config is not None else "auto")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    text_encoder, tokenizer = _text_of(config, text_encoder)
    pictures = draw_pictures(
        load_given(source, text_encoder=text_encoder, tokenizer=tokenizer, dtype=dtype),
        prompts,
        decoder=decoder,
        previewer=load_previewer(previewer) if decoder is None and previewer is not None else None,
        device=device,
    )
    global_step = int(_metadata(source).get("chunkline.global_step", 0))
    for path in write_pictures(output, global_step, pictures, prompts):
        yield str(path)


def _text_of(config: RunConfig | None, text_encoder: str | None) -> tuple[str | None, str | None]:
    if config is None:
        return text_encoder, None
    return text_encoder or config.of_stage_c.text_encoder, config.of_stage_c.tokenizer


def prompts_of_given(
    config: RunConfig | None, prompts_file: Path | None, *, recipe: Literal["stage_c", "dreambooth"]
) -> tuple[Prompt, ...]:
    """Return what to draw from given weights. Raises ConfigError for the file, ValueError when there is nothing."""
    problems = stage_c.prompt_problems if recipe == "stage_c" else dreambooth.prompt_problems
    if prompts_file is not None:
        prompts = read_prompts(prompts_file, problems=problems)
    elif config is not None:
        file = config.preview.file
        prompts = config.preview.prompts + (read_prompts(file, problems=problems) if file is not None else ())
    else:
        prompts = ()
    if not prompts:
        raise ValueError("there is nothing to draw: give --prompts FILE, or a RUN.toml with preview.prompts")
    if any(FILEWORDS in prompt.text + prompt.negative for prompt in prompts):
        raise ValueError(f"{FILEWORDS} stands for a caption of a run; it has no meaning for given weights")
    return tuple(prompts)


def _metadata(source: str) -> dict[str, str]:
    """Return what the header of given weights says about their making, if they are one file."""
    path = file_in_folder(Path(source))
    if not path.is_file():
        return {}
    with open_weights(path) as file:
        return {key: value for key, value in file.metadata.items() if key.startswith(_KEPT_ENTRIES)}
