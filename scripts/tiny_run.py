"""A tiny stage C run on real pictures, and launches of it as processes that can be killed. For tests and benches.

Launches are forked from a server that has torch and diffusers imported already: a launch then takes a second or two
instead of fifteen, and is still a process of its own that SIGKILL ends at any instruction.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.chunk import Sample, ShardFile, commit_chunk, write_shard
from sharding.images import decode_rgb, encode_jpeg
from sharding.schema import Workspace

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "scripts" / "demo_pictures"
DEMO = ROOT / "configs" / "training" / "demo.toml"
NUM_SAMPLES = 18
PRELOAD = [
    "training.session", "training.recipes.stage_c", "training.recipes.dreambooth", "training.exit_codes",
    "torch.utils.tensorboard", "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip",
    "transformers.models.auto.tokenization_auto",
]  # fmt: skip


def _launch(arguments: list[str], log: str, environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    with Path(log).open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.setsid()
    # The server may have been started by a loader, which blocks them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT})
    os.environ.pop("WANDB_SERVICE", None)  # of a W&B run in the test's own process: that one would lock this run's id
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    from training.cli import main

    sys.exit(main(arguments))


class Launch:
    """One `python -m training …` process. prepare: called in it first, to break something."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.log = log
        self.process = context.Process(target=_launch, args=(arguments, str(log), environment or {}, prepare))
        self.process.start()

    def wait(self, timeout_seconds: float = 300) -> int:
        self.process.join(timeout_seconds)
        if self.process.exitcode is None:
            raise TimeoutError(f"still running after {timeout_seconds} s:\n{self.log.read_text()}")
        return self.process.exitcode

    def kill_when(self, condition: Callable[[], bool], number: int = signal.SIGKILL) -> int:
        """Send a signal as soon as the condition holds; return the exit code. Fails if the process ends before."""
        deadline = time.monotonic() + 120
        while not condition():
            if not self.process.is_alive():
                raise RuntimeError(f"ended before it could be killed:\n{self.log.read_text()}")
            if time.monotonic() > deadline:
                raise TimeoutError("the moment to kill never came")
            time.sleep(0.001)
        self.send(number)
        return self.wait()

    def send(self, number: int) -> None:
        """Send a signal; SIGKILL goes to its loader workers, too, as the kernel's OOM killer's would not."""
        assert self.process.pid is not None
        try:
            (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)
        except ProcessLookupError:
            self.process.kill()  # it has no group of its own yet, or is gone


class TinyRun:
    """A run folder with the command line that trains its chunks."""

    def __init__(self, root: Path, overrides: list[str], *, config: Path = DEMO) -> None:
        self.root = root
        self.overrides = overrides
        self.config = config

    def arguments(self, command: str, *extra: str) -> list[str]:
        words = [word for override in self.overrides for word in ("--set", override)]
        return [command, str(self.config), "--run-dir", str(self.root), *words, *extra]

    @property
    def log(self) -> Path:
        return self.root.with_suffix(".log")

    def launch(self, *extra: str, prepare: Callable[[], None] | None = None) -> Launch:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        return Launch(self.arguments("run", *extra), self.log, prepare=prepare)

    def train(self, *extra: str, prepare: Callable[[], None] | None = None) -> int:
        return self.launch(*extra, prepare=prepare).wait()

    def launch_on(self, num_processes: int, *extra: str, prepare: Callable[[], None] | None = None) -> list[Launch]:
        """Start several processes as a launcher would."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [
            Launch(
                self.arguments("run", "--processes", str(num_processes), *extra),
                self.root.with_name(f"{self.root.name}.{rank}.log"),
                environment={
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
                },
                prepare=prepare,
            )
            for rank in range(num_processes)
        ]  # fmt: skip

    def train_on(self, num_processes: int, *extra: str) -> list[int]:
        """Train with several processes; return their exit codes."""
        return [launch.wait() for launch in self.launch_on(num_processes, *extra)]

    def errors(self) -> list[str]:
        """The lines for the user in the log of all launches."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("error: ")]

    def last_exit(self) -> int:
        return int(json.loads((self.root / "last_exit.json").read_text())["code"])

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line["fields"] for line in self.rows("ledger.jsonl") if line["event"] == name]

    def train_all(self) -> None:
        for chunk in ("real/0000", "real/0001"):
            code = self.train("--chunk", chunk)
            if code != 0:
                raise RuntimeError(f"chunk {chunk}: exit code {code}:\n{self.log.read_text()}")

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.root / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def last_step(self) -> int:
        lines = (self.root / "metrics.jsonl").read_text().splitlines() if (self.root / "metrics.jsonl").exists() else []
        return len(lines)

    def final_files(self, chunk: str) -> dict[str, bytes]:
        folder = self.root / "chunks" / chunk / "final"
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def make_workspace(root: Path, *, num_chunks: int) -> None:
    """Write chunks real/0000 … of NUM_SAMPLES real pictures from the demo each, small, in two shards."""
    files = sorted(path for path in PICTURES.rglob("*.jpg") if path.stat().st_size > 30_000)
    for number in range(num_chunks):
        folder = Workspace(root).chunks / "real" / f"{number:04d}"
        rows: list[dict[str, Any]] = []
        shards: list[ShardFile] = []
        keys = 0
        for shard_number in range(2):
            samples: list[Sample] = []
            for path in files[number * NUM_SAMPLES + shard_number * 9 :]:
                try:
                    picture = decode_rgb(path.read_bytes(), min_side=256)
                except ValueError:
                    continue  # the demo brings broken files on purpose
                if len(samples) == NUM_SAMPLES // 2:
                    break
                key = f"{number * 1000 + keys:016x}"
                keys += 1
                tags = [f"tag {key[-2:]}", "scenery", path.stem, "sky"]
                row = {
                    "width": picture.width, "height": picture.height, "groups": [{"group": "rest", "tags": tags}],
                    "dataset": "boards" if keys % 2 else "photos", "period": "mid", "repeats": 1, "loss_weight": 1.0,
                }  # fmt: skip
                image = encode_jpeg(picture, quality=90)
                samples.append(Sample(key, f"{key}.jpg", image, {"key": key}, ", ".join(tags), row))
            shard, shard_rows = write_shard(folder, shard_number, samples)
            shards.append(shard)
            rows += shard_rows
        facts: dict[str, Any] = {"policy": "p", "shard_policy": "p", "made_from": "scripts.tiny_run", "seed": 0}
        commit_chunk(folder, rows, name=f"real/{number:04d}", shards=shards, **facts)


def tiny_overrides(workspace: Path, models: Path) -> list[str]:
    """Return the `--set` overrides of configs/training/demo.toml that make a TinyRun."""
    return [
        f"data.workspace='{workspace}'",
        "data.chunks=['real/*']",
        "data.epochs=2",
        "data.workers=0",
        f"stage_c.network='{models}/stage_c.safetensors'",
        f"stage_c.text_encoder='{models}/text_encoder'",
        f"stage_c.tokenizer='{models}/tokenizer'",
        f"stage_c.effnet='{models}/effnet_encoder.safetensors'",
        f"stage_c.previewer='{models}/previewer.safetensors'",
        "trackers.tensorboard=false",
        "buckets.resolution=[256, 256]",
        "buckets.step=32",
    ]
