"""`training export`: weights from a state, or given ones, as other programs load them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.files import write_bytes
from training.commands.card import add_card_arguments
from training.commands.common import add_run_arguments, run_config_if_any
from training.exit_codes import DONE

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.config.saving import SaveConfig

SUMMARY = "write weights from the newest state, or convert others, for ComfyUI, kohya and diffusers"
FORMATS = ("original", "ckpt", "diffusers", "combined")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser, needs_config=False, needs_run_dir=False)
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--chunk", help="a finished chunk whose state is kept; default: the newest state")
    state.add_argument("--best", action="store_true", help="the state that the verdict of a DreamBooth run keeps")
    parser.add_argument(
        "--from", dest="source", metavar="WEIGHTS", help="no state, but these: a file or folder in any layout, a hub id"
    )
    parser.add_argument("--text-encoder", metavar="FOLDER", help="with --from, when no text model comes with them")
    parser.add_argument("--output", type=Path, help="folder; default: RUN/export")
    parser.add_argument(
        "--format",
        action="append",
        choices=FORMATS,
        dest="formats",
        help="may be repeated; default: save.export_formats",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="default: save.export_dtype; with --from what they have"
    )
    parser.add_argument("--merged", action="store_true", help="of a run with [lora]: whole weights, adapters in them")
    parser.add_argument(
        "--decoder-from", metavar="FOLDER", help="with diffusers: copy this decoder pipeline (or hub id) and link both"
    )
    parser.add_argument(
        "--old-diffusers", action="store_true", help="the copied decoder is for diffusers 0.35 to 0.37, not later ones"
    )
    parser.add_argument(
        "--push", metavar="REPO", help="then write the card and upload both to this hub repository; token: HF_TOKEN"
    )
    parser.add_argument("--push-decoder", metavar="REPO", help="upload the decoder of --decoder-from there")
    add_card_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.config.saving import SaveConfig, formats_of

    config = run_config_if_any(options)
    if options.source is None and (config is None or options.run_dir is None):
        raise ValueError("what to export? Give --run-dir, or weights with --from")
    save = _save_config(options, config.save if config is not None else SaveConfig())
    if options.push or options.push_decoder or options.notes or options.dataset:
        _check_push(options, save)
    config = _with_lora_as_asked(options, config)
    if config is not None and (other := sorted({*save.export_formats} - {*formats_of(config.recipe_name)})):
        own = ", ".join(formats_of(config.recipe_name))
        raise ValueError(f"--format {', '.join(other)}: the recipe {config.recipe_name} writes {own}")
    output = options.output or (options.run_dir / "export" if options.run_dir is not None else Path("export"))
    if options.dry_run:
        print(f"would write {', '.join(save.export_formats)} to {output}")
        if options.push:
            _print_pushes(options, output)
        return DONE
    if options.decoder_from is not None:
        from training.stage_c.export import copy_decoder_beside

        title = config.name if config is not None else Path(options.source).stem
        decoder = copy_decoder_beside(output, options.decoder_from, save, title=title, old=options.old_diffusers)
        print(decoder)
        save = save.model_copy(update={"hub_decoder": save.hub_decoder or str(decoder.resolve())})
    if options.source is not None:
        _export_given(options, config, save, output)
        return DONE
    from training.use_state import export_weights

    assert config is not None
    config = config.model_copy(update={"save": save})
    for line in export_weights(config, options.run_dir, output, chunk_name=options.chunk, best=options.best):
        print(line)
    if options.push:
        _push(options, config, output)
    return DONE


def _export_given(options: argparse.Namespace, config: "RunConfig | None", save: "SaveConfig", output: Path) -> None:
    from training.dreambooth.use_given import export_given_sd, recipe_of
    from training.use_given import export_given

    if recipe_of(options.source, config) == "dreambooth":
        files = export_given_sd(options.source, output, config=config, save=save, dtype_name=options.dtype)
    else:
        files = export_given(
            options.source, output, config=config, save=save, dtype_name=options.dtype,
            text_encoder=options.text_encoder,
        )  # fmt: skip
    for file in files:
        print(file)


def _with_lora_as_asked(options: argparse.Namespace, config: "RunConfig | None") -> "RunConfig | None":
    """Return the run's settings; with --merged, adapters become whole weights."""
    lora = config.lora if config is not None and options.source is None else None
    if options.merged and lora is None:
        raise ValueError("--merged is for a run with [lora]; there are no adapters here, or --from names the weights")
    if config is None or lora is None:
        return config
    if options.merged:
        return config.model_copy(update={"lora": lora.model_copy(update={"formats": ("merged",)})})
    if options.formats and "merged" not in lora.formats:
        raise ValueError("--format is about whole weights, this run trains adapters: add --merged, or leave it out")
    return config


def _check_push(options: argparse.Namespace, save: "SaveConfig") -> None:
    from training.card.notes import read_notes
    from training.card.settings import require_licence
    from training.push import require_repository, require_token

    if not options.push:
        raise ValueError(
            "--push-decoder, --notes and --dataset go with --push; `python -m training card` writes a card"
        )
    if options.source is not None or options.run_dir is None:
        raise ValueError("--push is for the weights of a run, whose card goes with them: give --run-dir, not --from")
    if options.push_decoder and options.decoder_from is None:
        raise ValueError("--push-decoder: which decoder? Name it with --decoder-from and --format diffusers")
    require_repository(options.push, "--push")
    if options.push_decoder:
        require_repository(options.push_decoder, "--push-decoder")
    require_licence(save)
    if options.notes is not None:
        read_notes(options.notes)
    if not options.dry_run:
        require_token()


def _print_pushes(options: argparse.Namespace, output: Path) -> None:
    from training.push import pushes_of

    if not output.is_dir():
        print(f"would push them with a README.md to {options.push}; {output} holds nothing yet")
        return
    decoder = options.push_decoder if (output / "diffusers-decoder").is_dir() else None
    for push in pushes_of(output, options.push, decoder):
        print(f"would push what lies there now, written anew, to {push.text()}")


def _push(options: argparse.Namespace, config: "RunConfig", output: Path) -> None:
    from training.commands.card import card_text
    from training.push import CARD, push_all, pushes_of, require_token

    write_bytes(output / CARD, card_text(config, options, repository=options.push).encode())
    pushes = pushes_of(output, options.push, options.push_decoder)
    for line in push_all(pushes, token=require_token(), message=f"{config.name}, by chunkline"):
        print(line)


def _save_config(options: argparse.Namespace, save: "SaveConfig") -> "SaveConfig":
    changes = {}
    if options.formats:
        changes["export_formats"] = tuple(dict.fromkeys(options.formats))
    if options.dtype:
        changes["export_dtype"] = options.dtype
    if options.push:
        changes["hub_prior"] = options.push
    if options.push_decoder:
        changes["hub_decoder"] = options.push_decoder
    save = save.model_copy(update=changes)
    if options.decoder_from is not None and "diffusers" not in save.export_formats:
        raise ValueError("--decoder-from goes with --format diffusers: a decoder alone has no prior")
    if options.old_diffusers and options.decoder_from is None:
        raise ValueError("--old-diffusers is about the decoder that --decoder-from copies")
    return save
