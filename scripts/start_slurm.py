"""Start or stop a private Slurm of two nodes on this machine, for tests: no systemd, nothing outside one folder.

    python -m scripts.start_slurm start /tmp/slurm      prints the line that makes sbatch, squeue … use it
    python -m scripts.start_slurm stop /tmp/slurm

Nodes n1 and n2 have 4 CPUs, 8 GB and two pretended GPUs each; jobs of partition `high` preempt (requeue) those of
`low`, the default. There is no accounting: `sacct` does not work, log/jobcomp.txt says how jobs ended.
Needs Debian's packages slurm-wlm and munge (`apt-get install --no-install-recommends slurm-wlm munge`).
"""

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")
_TIMEOUT_SECONDS = 30.0
_MAX_SOCKET_PATH = 107

_SLURM_CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/pids/slurmctld
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/pids/slurmd-%n
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdSpoolDir={folder}/spool/%n
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=3
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 MaxTime=INFINITE
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 Gres=gpu:2"


def missing_programs() -> list[str]:
    """Return the programs that are needed and not installed."""
    return [program for program in PROGRAMS if _which(program) is None]


def start(folder: Path) -> Path:
    """Start munge, the controller and both nodes, with all their files in `folder`; return its slurm.conf.

    Programs use this Slurm when SLURM_CONF in their environment names that file. Raises FileNotFoundError when
    programs are missing, ValueError when something runs in `folder` already, RuntimeError with the end of the logs
    when the nodes do not become idle.
    """
    folder = folder.absolute()
    if missing := missing_programs():
        raise FileNotFoundError(f"{', '.join(missing)}: not installed; apt-get install slurm-wlm munge")
    if _pids(folder):
        raise ValueError(f"{folder}: a Slurm was started here; stop it first")
    socket_path = folder / "munge" / "socket"
    if len(str(socket_path)) > _MAX_SOCKET_PATH:
        raise ValueError(f"{folder}: too long for a socket's path; choose a shorter one")
    _write_settings(folder)
    conf = folder / "slurm.conf"
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    munge = folder / "munge"
    _run([
        "munged", "--force", f"--key-file={munge / 'key'}", f"--socket={socket_path}",
        f"--pid-file={folder / 'pids' / 'munged'}", f"--log-file={folder / 'log' / 'munged.log'}",
        f"--seed-file={munge / 'seed'}",
    ], environment)  # fmt: skip
    _run(["slurmctld", "-c"], environment)
    for node in NODES:
        _run(["slurmd", "-N", node], environment)
    try:
        _wait_until_idle(folder, environment)
    except RuntimeError:
        stop(folder)
        raise
    return conf


def stop(folder: Path) -> None:
    """Cancel all jobs and end what `start` started in `folder`, by process id. Nothing else is touched."""
    folder = folder.absolute()
    pids = _pids(folder)
    if "slurmctld" in pids:
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        subprocess.run([_which("scancel") or "scancel", f"--user={getpass.getuser()}"], env=environment, check=False)
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while _answer(["squeue", "--noheader"], environment) and time.monotonic() < deadline:
            time.sleep(0.1)
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        for pid in pids.values():
            if _is_alive(pid):
                os.kill(pid, wanted)
        while any(map(_is_alive, pids.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
    for name in pids:
        (folder / "pids" / name).unlink(missing_ok=True)


def _write_settings(folder: Path) -> None:
    for name in ("munge", "pids", "state", "log", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "key"
    key.unlink(missing_ok=True)
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "munge").chmod(0o700)
    host = socket.gethostname().partition(".")[0]
    controller_port, *node_ports = _free_ports(1 + len(NODES))
    nodes = [_NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, node_ports, strict=True)]
    text = _SLURM_CONF.format(
        host=host, user=getpass.getuser(), folder=folder, controller_port=controller_port, nodes="\n".join(nodes)
    )
    (folder / "slurm.conf").write_text(text)
    for number in (0, 1):
        (folder / f"gpu{number}").touch()  # without a file behind it, a GPU makes its node invalid
    (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-2] Name=gpu Count=2 File={folder}/gpu[0-1]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _run(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run([_which(command[0]) or command[0], *command[1:]], env=environment, check=True)


def _answer(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _wait_until_idle(folder: Path, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while (state := _answer(["sinfo", "--noheader", "--partition=low", "--format=%T %D"], environment)) != "idle 2":
        if time.monotonic() > deadline:
            logs = "\n".join("\n".join(path.read_text().splitlines()[-5:]) for path in (folder / "log").glob("*.log"))
            raise RuntimeError(f"{folder}: nodes are {state or 'not there'!r} after {_TIMEOUT_SECONDS:g} s:\n{logs}")
        time.sleep(0.05)


def _pids(folder: Path) -> dict[str, int]:
    """Return the running processes that were started in `folder`, by the name of their pid file; nodes first."""
    found = {}
    for path in sorted(
        (folder / "pids").glob("*"), key=lambda path: ("slurmd", "slurmc", "munged").index(path.name[:6])
    ):
        text = path.read_text().strip()
        if text.isdigit() and _is_alive(int(text)) and _name_of(int(text)) == path.name.partition("-")[0]:
            found[path.name] = int(text)
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def _name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def main(arguments: list[str] | None = None) -> int:
    """Start or stop; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.start_slurm", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds all its files")
    options = parser.parse_args(arguments)
    try:
        if options.action == "stop":
            stop(options.folder)
        else:
            print(f"export SLURM_CONF={start(options.folder)}")
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
