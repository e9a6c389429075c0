"""Options and runs of `compose` and `traits` on the command line. No work is done here."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from captioning.config import CaptioningConfig
    from sharding.schema import Workspace


class _Report(Protocol):
    def summary(self) -> str: ...


@dataclass(frozen=True)
class _Text:
    text: str

    def summary(self) -> str:
        return self.text


def add_compose_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="write nothing; show what policy B changes against policy A"
    )
    parser.add_argument(
        "--examples", type=int, default=5, metavar="N", help="with --diff: captions to show (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="with --diff: print JSON")


def add_traits_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="TRAITS.csv", help="the table to write")
    parser.add_argument(
        "--kinds", default="hair,eyes,body", metavar="A,B", help="of hair, eyes, body, outfit (default: hair,eyes,body)"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of a character's pictures, at least (default: 0.5)")
    parser.add_argument("--min-pictures", type=int, default=10, help="of a character alone, at least (default: 10)")


def run_compose(
    options: argparse.Namespace, config: "CaptioningConfig", workspace: "Workspace", *, policy: str
) -> _Report:
    """Compose, or compare two policies. Raises as those do, ConfigError for options that do not go together."""
    from sharding.config import ConfigError

    part = {"part_index": options.part_index, "num_parts": options.num_parts}
    if options.diff is None:
        from captioning.compose import compose

        if options.json:
            raise ConfigError("--json goes with --diff A B only")
        return compose(config, workspace, policy=policy, dry_run=options.dry_run, **part)
    from captioning.policy_diff import diff_policies

    if options.policy:
        raise ConfigError("--diff A B names both policies; leave --policy out")
    before, after = options.diff
    report = diff_policies(config, workspace, before=before, after=after, num_examples=max(options.examples, 0), **part)
    return _Text(report.as_json()) if options.json else report


def run_traits(
    options: argparse.Namespace, config: "CaptioningConfig", workspace: "Workspace", *, policy: str
) -> _Report:
    """Measure traits. Raises as `measure_traits`."""
    from captioning.traits import measure_traits

    return measure_traits(
        config,
        workspace,
        policy=policy,
        output=options.output,
        kinds=[kind.strip() for kind in options.kinds.split(",")],
        share=options.share,
        min_pictures=options.min_pictures,
    )
