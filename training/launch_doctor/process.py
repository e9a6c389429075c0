"""What a process says of itself, and what all of them together say: processes, devices, versions."""

import hashlib
import os
import platform
import socket
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sharding.files import size_text
from training.launch_doctor.report import Row, listing

_MUST_AGREE = ("python", "torch", "cuda", "nccl", "chunkline", "source", "accelerate", "deepspeed")
_SHOULD_AGREE = (
    "diffusers", "transformers", "numpy", "pyarrow", "pillow", "safetensors", "bitsandbytes", "peft", "pydantic"
)  # fmt: skip
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU: then its bytes are the host's memory."""

    name: str
    total_bytes: int
    free_bytes: int
    driver: str
    identity: str
    """Of the card; two processes with the same one share it."""

    @property
    def is_gpu(self) -> bool:
        return bool(self.identity)


@dataclass(frozen=True)
class Process:
    """node: as Slurm names it, else the host; num_same_rank: how many have said to be this rank so far."""

    rank: int
    local_rank: int
    local_world_size: int
    node: str
    pid: int
    num_cpus: int
    num_same_rank: int
    device: Device
    versions: Mapping[str, str]

    @classmethod
    def of(cls, values: Mapping[str, object]) -> "Process":
        """Make it from what JSON made of it."""
        return cls(**{**values, "device": Device(**values["device"])})  # type: ignore[arg-type]


def this_process(device: torch.device, *, num_same_rank: int) -> Process:
    """Describe this process; device: its own, with its number."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Process(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        pid=os.getpid(),
        num_cpus=cpus,
        num_same_rank=num_same_rank,
        device=_gpu(device) if device.type == "cuda" else _cpu(),
        versions=_versions(),
    )


def scouts(processes: Sequence[Process]) -> list[int]:
    """Return the lowest rank of each node; rank 0 is one."""
    lowest: dict[str, int] = {}
    for process in processes:
        lowest.setdefault(process.node, process.rank)
    return sorted(lowest.values())


def process_rows(processes: Sequence[Process], *, wanted: int | None) -> Iterator[Row]:
    """Yield rows about processes, devices and versions. wanted: how many processes there should be."""
    yield _count_row(processes, wanted)
    yield from _device_rows(processes)
    yield _version_row(processes)


def alone_row(tasks: int) -> Row:
    """Return the row for tasks that srun started and that each believe to be a whole launch."""
    return Row(
        "processes",
        f"srun started {tasks} tasks, each believes itself alone (WORLD_SIZE is not set)",
        f"one launch of {tasks}",
        "fail",
        "each would train the whole run; let srun start one launcher per node (accelerate launch --machine_rank "
        "$SLURM_NODEID --num_machines $SLURM_NNODES …), or export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS "
        "LOCAL_RANK=$SLURM_LOCALID MASTER_ADDR MASTER_PORT in each task",
    )


def silent_row(ranks: Mapping[int, str], phase: str, processes: Sequence[Process], seconds: float) -> Row:
    """Return the row for ranks that do not answer. processes: what is known of the launch."""
    per_node = processes[0].local_world_size if processes else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = {process.rank // per_node: process.node for process in processes}
    by_node = defaultdict[str, list[int]](list)
    for rank in ranks:
        by_node[nodes.get(rank // per_node, f"node number {rank // per_node}")].append(rank)
    where = "; ".join(f"rank {listing(numbers)} of {node}" for node, numbers in by_node.items())
    return Row(
        "silent ranks",
        f"{phase}: {where}: {', '.join(sorted(set(ranks.values())))}",
        f"an answer within {seconds:.0f} s",
        "fail",
        "look at that node's log: is it up, does it reach MASTER_ADDR:MASTER_PORT (firewall, NCCL_SOCKET_IFNAME, "
        "GLOO_SOCKET_IFNAME), does `ls` of the run folder hang there, has every node its own --machine_rank?",
    )


def _count_row(processes: Sequence[Process], wanted: int | None) -> Row:
    nodes = Counter(process.node for process in processes)
    on = "; ".join(f"{number} on {node}" for node, number in nodes.items())
    found = f"{len(processes)} of {len(nodes)} node{'s' * (len(nodes) > 1)}: {on}"
    doubled = [process.rank for process in processes if process.num_same_rank > 1]
    if doubled:
        advice = "two processes have the same rank: give every node its own --machine_rank ($SLURM_NODEID)"
        return Row("processes", f"{found}; rank {listing(doubled)} twice", "every rank once", "fail", advice)
    if wanted is not None and wanted != len(processes):
        advice = (
            "`accelerate launch --cpu --num_processes N` starts one: use ACCELERATE_USE_CPU=true with "
            "configs/accelerate/ddp.yaml; on GPUs name --num_processes, --num_machines and --machine_rank"
        )
        return Row("processes", found, f"{wanted} (--processes)", "fail", advice)
    if len(set(nodes.values())) > 1:
        return Row("processes", found, "as many on each node", "warn", "give every node as many processes")
    return Row("processes", found, "every rank once" if wanted is None else f"{wanted}, every rank once")


def _device_rows(processes: Sequence[Process]) -> Iterator[Row]:
    devices = [process.device for process in processes]
    kinds = Counter(
        f"{device.name}, {size_text(device.total_bytes)}" + f", driver {device.driver}" * bool(device.driver)
        for device in devices
    )
    found = "; ".join(f"{number} x {kind}" for kind, number in kinds.items())
    if len(kinds) > 1:
        advice = "the slowest and smallest one decides: ask Slurm for one kind (--constraint), or plan for the smallest"
        yield Row("devices", found, "one kind", "warn", advice)
    else:
        yield Row("devices", found, "one kind")
    cards = Counter((process.node, process.device.identity) for process in processes if process.device.is_gpu)
    shared = [process.rank for process in processes if cards[process.node, process.device.identity] > 1]
    if shared:
        advice = "start one process per card, and do not give every task the same CUDA_VISIBLE_DEVICES"
        yield Row("one card each", f"rank {listing(shared)} share a card", "a card per rank", "fail", advice)
    used = {
        process.rank: process.device
        for process in processes
        if process.device.is_gpu and process.device.free_bytes < 0.9 * process.device.total_bytes
    }
    if used:
        least = min(used.values(), key=lambda device: device.free_bytes)
        found = f"rank {listing(list(used))}: {size_text(least.free_bytes)} of {size_text(least.total_bytes)} free"
        yield Row(
            "free cards", found, "nobody else's memory", "warn", "see nvidia-smi on that node: who uses the card?"
        )


def _version_row(processes: Sequence[Process]) -> Row:
    first = processes[0].versions
    differing = {
        name: {process.versions.get(name, "missing") for process in processes}
        for name in (*_MUST_AGREE, *_SHOULD_AGREE)
        if len({process.versions.get(name) for process in processes}) > 1
    }
    if not differing:
        shown = ", ".join(f"{name} {first[name]}" for name in ("python", "torch", "cuda", "chunkline") if name in first)
        return Row("versions", shown, "the same on all nodes")
    odd = {
        name: [p.rank for p in processes if p.versions.get(name) != first.get(name)] for name in differing
    }  # fmt: skip
    found = "; ".join(f"{name} {' / '.join(sorted(differing[name]))} (rank {listing(odd[name])})" for name in differing)
    is_bad = any(name in _MUST_AGREE for name in differing)
    return Row(
        "versions", found, "the same on all nodes", "fail" if is_bad else "warn",
        "install the same environment everywhere: one on the shared disk, or one container image",
    )  # fmt: skip


def _gpu(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    identity = str(getattr(properties, "uuid", device))
    return Device(properties.name, total, free, _driver(), identity)


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return next((word for word in words if word[0].isdecimal() and "." in word), "")


def _cpu() -> Device:
    name, free, total = f"CPU {platform.processor() or platform.machine()}", 0, 0
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key == "MemTotal":
            total = 1024 * int(value.split()[0])
        elif key == "MemAvailable":
            free = 1024 * int(value.split()[0])
    return Device(name, total, free, "", "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "source": _source_digest()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for name in ("chunkline", *_MUST_AGREE[-2:], *_SHOULD_AGREE):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if commit := _commit():
        found["chunkline"] = f"{found.get('chunkline', '')} {commit}".strip()
    return found


def _commit() -> str:
    if not (_ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


def _source_digest() -> str:
    """Return a digest of this program: a commit does not show what was edited since."""
    digest = hashlib.sha256()
    for package in ("sharding", "training"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
