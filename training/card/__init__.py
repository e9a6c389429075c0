"""`training card`: the README.md of a model repository, from ledger, run.toml and workspace; nothing is typed.

hours      GPU hours by device             status     what is trained and what remains
dataset    images, chunks, tags            settings   licence, command, parameters
guides     how to use it                   notes      what only people know, from a file of theirs
card       all of it together
"""
