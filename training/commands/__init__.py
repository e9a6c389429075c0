"""Subcommands of `python -m training`, a file each: SUMMARY, `add_arguments(parser)`, `run(options)`. None loads torch.

A new one is a file here and its name in `training.cli.COMMANDS`.
"""
