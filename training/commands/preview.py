"""`training preview`: the run's previews from a state, or pictures from given weights."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from training.commands.common import add_run_arguments, run_config_if_any
from training.exit_codes import DONE

if TYPE_CHECKING:
    from training.config import RunConfig

SUMMARY = "make the run's previews from the newest state, or pictures from given weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    add_run_arguments(parser, needs_config=False, needs_run_dir=False)
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--chunk", help="a finished chunk whose state is kept; default: the newest state")
    state.add_argument("--best", action="store_true", help="the state that the verdict of a DreamBooth run keeps")
    parser.add_argument("--output", type=Path, help="folder; default: RUN/previews, with --from previews")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="WEIGHTS",
        help="no state, but these: a file or folder in any layout, a hub id; drawn as diffusers does, with 40 steps at "
        "guidance 8, where a prompt names none",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="with --from: kohya's prompt file")
    parser.add_argument(
        "--decoder", metavar="FOLDER", help="with --from: a decoder pipeline or hub id, 10 steps; else the previewer"
    )
    parser.add_argument("--previewer", type=Path, metavar="FILE", help="with --from; default: stage_c.previewer")
    parser.add_argument("--text-encoder", metavar="FOLDER", help="with --from, when no text model comes with them")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    config = run_config_if_any(options)
    if options.source is None:
        return _of_state(options, config)
    output = options.output or Path("previews")
    if options.dry_run:
        print(f"would draw {options.source} into {output}")
        return DONE
    from training.dreambooth.use_given import draw_given_sd, recipe_of
    from training.use_given import draw_given, prompts_of_given

    if recipe_of(options.source, config) == "dreambooth":
        prompts = prompts_of_given(config, options.prompts, recipe="dreambooth")
        for line in draw_given_sd(options.source, output, config=config, prompts=prompts):
            print(line)
        return DONE
    for line in draw_given(
        options.source,
        output,
        config=config,
        prompts_file=options.prompts,
        decoder=options.decoder,
        previewer=options.previewer,
        text_encoder=options.text_encoder,
    ):
        print(line)
    return DONE


def _of_state(options: argparse.Namespace, config: "RunConfig | None") -> int:
    if config is None or options.run_dir is None:
        raise ValueError("what to draw? Give --run-dir, or weights with --from")
    for name in ("prompts", "decoder", "previewer", "text_encoder"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --from: a state is drawn as its run does")
    output = options.output or options.run_dir / "previews"
    if options.dry_run:
        print(f"would draw the previews of {options.run_dir} into {output}")
        return DONE
    from training.use_state import make_previews

    for line in make_previews(config, options.run_dir, output, chunk_name=options.chunk, best=options.best):
        print(line)
    return DONE
