"""`training dashboard`: the run as a web page, served from this machine, or as one file."""

import argparse
import sys
from pathlib import Path

from training.exit_codes import DONE

SUMMARY = "show the run as a web page: curves, chunks, previews, disk; reads only files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See `training.commands`."""
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1: this machine only"
    )
    parser.add_argument("--port", type=int, default=6007, help="default 6007; 0: any that is free")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one file that needs no server, and end")


def run(options: argparse.Namespace) -> int:
    """See `training.commands`."""
    from training.dashboard.page import write_static_page
    from training.dashboard.server import DashboardServer
    from training.dashboard.view import RunView

    view = RunView(options.run_dir)
    if options.dry_run:
        overview = view.read()
        print(f"{overview.title}: {len(overview.campaign.names):,} chunks, {len(overview.lines):,} ledger lines")
        return DONE
    if options.html is not None:
        write_static_page(view, options.html)
        print(f"{options.html}: {options.html.stat().st_size / 1e6:,.1f} MB")
        return DONE
    try:
        server = DashboardServer(view, host=options.host, port=options.port)
    except OSError as error:
        raise ValueError(
            f"--host {options.host} --port {options.port}: cannot listen there ({error.strerror}); name another --port"
        ) from error
    with server:
        print(f"{server.url}  (Ctrl-C ends it; from elsewhere: ssh -L {server.server_port}:localhost:"
              f"{server.server_port} THIS-MACHINE)", flush=True)  # fmt: skip
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return DONE
