"""`captioning edit DATASET.toml OPERATION …`: its options, and which operation they mean."""

import argparse
import getpass
import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioning.config import CaptioningConfig
    from captioning.edit_operations import Operation
    from captioning.edits import EditListReport, EditReport, UndoReport
    from sharding.schema import Workspace


def run_edit(
    options: argparse.Namespace, config: "CaptioningConfig", workspace: "Workspace", *, policy: str
) -> "EditReport | EditListReport | UndoReport":
    """Edit, list edits or undo one. Raises EditError for what cannot be done."""
    from captioning.composed import known_policy
    from captioning.edit_table import EditError
    from captioning.edits import edit_captions, edit_list, undo

    if options.operation == "list":
        return edit_list(config, workspace, policy=policy)
    if options.operation == "undo":
        return undo(config, workspace, options.number, policy=policy, dry_run=not options.yes)
    groups = known_policy(config, policy).groups
    group = getattr(options, "group", "")
    if group and group not in groups:
        raise EditError(f"--group {group!r}: unknown; policy {policy!r} has {', '.join(groups)}")
    if options.show < 0:
        raise EditError(f"--show {options.show}: must be 0 or more")
    is_coloured = options.colour == "always" or (
        options.colour == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    return edit_captions(
        config,
        workspace,
        _operation(options),
        policy=policy,
        description=_description(options),
        where=options.where,
        who=options.who or getpass.getuser(),
        why=options.why,
        dry_run=not options.yes,
        num_shown=options.show,
        is_coloured=is_coloured,
    )


def _operation(options: argparse.Namespace) -> "Operation":
    from captioning import edit_operations as operations
    from captioning.edit_table import EditError

    match options.operation:
        case "replace" if options.scope == "caption":
            if options.group:
                raise EditError("--group: has no meaning with --in caption, which replaces text anywhere")
            return operations.replace_in_caption(options.old, options.new, is_regex=options.regex)
        case "replace":
            return operations.replace_tags(options.old, options.new, is_regex=options.regex, group=options.group)
        case "set":
            return operations.set_caption(options.text)
        case "add":
            return operations.add_tags(options.tags, group=options.group, place=options.at)
        case "remove":
            return operations.remove_tags(options.tags, is_regex=options.regex, group=options.group)
        case "sort":
            return operations.sort_tags(group=options.group, by=options.by)
        case "dedupe":
            return operations.drop_doubles
        case "truncate":
            return operations.truncate(options.num_words)
    raise AssertionError(options.operation)


def _description(options: argparse.Namespace) -> str:
    """Return the operation as it was asked for."""
    words = [options.operation]
    for name in ("old", "new", "text", "tags", "num_words"):
        value = getattr(options, name, None)
        if value is not None:
            words += [str(it) for it in value] if isinstance(value, list) else [str(value)]
    if getattr(options, "regex", False):
        words.append("--regex")
    for flag, name in (("--in", "scope"), ("--group", "group"), ("--at", "at"), ("--by", "by"), ("--where", "where")):
        if value := getattr(options, name, ""):
            words += [flag, value]
    return shlex.join(words)


def add_edit_options(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Add the operations with their options, and return them."""
    operations = parser.add_subparsers(dest="operation", required=True, metavar="OPERATION")
    replace = operations.add_parser("replace", help="replace words, or text in the whole caption")
    replace.add_argument("old", metavar="OLD", help="a whole word; with --regex what is found in a word")
    replace.add_argument("new", metavar="NEW", help="nothing removes, commas make several words; with --regex \\1 …")
    replace.add_argument("--in", dest="scope", choices=("tag", "caption"), default="tag", help="default: tag")
    set_ = operations.add_parser("set", help="put a new text in place of the whole caption")
    set_.add_argument("text", metavar="TEXT")
    add = operations.add_parser("add", help="add words that are not there")
    add.add_argument("--at", choices=("head", "tail"), default="tail", help="of the group (default: tail)")
    remove = operations.add_parser("remove", help="remove words")
    for command in (add, remove):
        command.add_argument("tags", nargs="+", metavar="TAG")
    for command in (replace, remove):
        command.add_argument("--regex", action="store_true", help="a regular expression of Python's")
        command.add_argument("--group", default="", help="only in this group of words (default: everywhere)")
    sort = operations.add_parser("sort", help="sort the words of a group")
    sort.add_argument("--by", choices=("alphabet", "length"), default="alphabet", help="default: alphabet")
    for command in (add, sort):
        command.add_argument("--group", default="rest", help="group of words (default: rest)")
    dedupe = operations.add_parser("dedupe", help="drop words that differ in case or underscores only")
    truncate = operations.add_parser("truncate", help="keep the first N words")
    truncate.add_argument("num_words", type=int, metavar="N")
    undo = operations.add_parser("undo", help="take an edit back")
    undo.add_argument("number", type=int, nargs="?", metavar="N", help="its number in `list` (default: the last)")
    edits = (replace, set_, add, remove, sort, dedupe, truncate)
    for command in edits:
        command.add_argument(
            "--where", default="", metavar="FILTER",
            help="only where this holds: 'tag = solo and not (source = pixiv or score.aesthetic < 0.5)'",
        )  # fmt: skip
        command.add_argument("--who", default="", help="who edits (default: the user)")
        command.add_argument("--why", default="", help="a note, shown by `list`")
        command.add_argument("--show", type=int, default=20, metavar="N", help="captions in the preview (default: 20)")
        command.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    for command in (*edits, undo):
        writes = command.add_mutually_exclusive_group()
        writes.add_argument("--yes", action="store_true", help="write it, and compose anew")
        writes.add_argument("--dry-run", dest="yes", action="store_false", help="only show (default)")
    return [*edits, undo, operations.add_parser("list", help="list the edits")]
