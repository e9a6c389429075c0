"""All phases of the launch doctor, in order, on every rank. Rank 0 makes the report; a silent rank ends it early."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.config import RunConfig
from training.launch_doctor.clock import Skew, clock_rows, measure_skew
from training.launch_doctor.data import DataFindings, data_rows, look_at_data
from training.launch_doctor.folder import look_at_folder
from training.launch_doctor.folder_findings import FolderFindings, file_clock, folder_rows
from training.launch_doctor.network import Network, measure_network, network_rows, slowest
from training.launch_doctor.process import (
    Process,
    alone_row,
    process_rows,
    scouts,
    silent_row,
    this_process,
)
from training.launch_doctor.report import Report, Row
from training.launch_doctor.room import room_rows
from training.launch_doctor.team import Answer, SilentRanksError, Team
from training.precision import choose_device

logger = logging.getLogger(__name__)


def examine(config: RunConfig, root: Path, *, num_processes: int | None, timeout_seconds: float) -> Report | None:
    """Look at a launch; every process of it has to call this. Returns the report on rank 0, None on the others.

    num_processes: how many there should be, where that is known. timeout_seconds: how long a phase may take; ranks
    that do not end it by then are named in the report.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        is_first = os.environ.get("SLURM_PROCID", "0") == "0"
        return Report((alone_row(tasks),)) if is_first else None
    examination = _Examination(config, root, num_processes)
    try:
        team = Team.join(timeout_seconds=timeout_seconds)
    except SilentRanksError as error:
        return Report((silent_row(error.ranks, error.phase, [], timeout_seconds),), is_hung=True)
    is_hung = False
    try:
        examination.look(team)
    except SilentRanksError as error:
        is_hung = True
        examination.rows.append(silent_row(error.ranks, error.phase, examination.processes, timeout_seconds))
    if team.is_main and examination.processes:
        examination.add_room()
    team.end()
    if dist.is_initialized() and not is_hung:
        dist.destroy_process_group()
    return Report(tuple(examination.rows), is_hung=is_hung) if team.is_main or is_hung else None


class _Examination:
    """What is known so far; rows only on rank 0."""

    def __init__(self, config: RunConfig, root: Path, num_processes: int | None) -> None:
        self.rows: list[Row] = []
        self.processes: list[Process] = []
        self._config, self._root, self._wanted = config, root, num_processes
        self._data: dict[int, DataFindings] = {}
        self._bytes_per_second: float | None = None

    def look(self, team: Team) -> None:
        """Go through all phases. Raises SilentRanksError; rows of the phases before it are there then."""
        device = self._introduce(team)
        if device is None:
            return
        ranks: list[int] = team.read("scouts")
        nodes = {process.rank: process.node for process in self.processes}
        network = team.phase(
            "network", lambda: asdict(measure_network(device, timeout_seconds=2 * team.timeout_seconds))
        )
        if team.is_main:
            measured = [Answer(None if one.value is None else _network(one.value), one.problem) for one in network]
            self.rows += network_rows(measured)
            self._bytes_per_second = slowest(measured)
        folder = team.phase("run folder", lambda: look_at_folder(team, self._root, ranks))
        clocks = team.phase("clocks", lambda: measure_skew(team, ranks))
        if team.is_main:
            self.rows += self._folder_rows(folder, clocks[0].value or {}, nodes)
        data = team.phase(
            "data", lambda: asdict(look_at_data(self._config, self._root, device, is_scout=team.rank in ranks))
        )
        if team.is_main:
            read = [Answer(None if one.value is None else DataFindings(**one.value), one.problem) for one in data]
            self._data = {rank: one.value for rank, one in enumerate(read) if one.value is not None}
            self.rows += data_rows(read, nodes)

    def add_room(self) -> None:
        """Add what is reckoned from the settings."""
        try:
            rows = room_rows(
                self._config, self._root, self.processes, self._data, bytes_per_second=self._bytes_per_second
            )
            for row in rows:
                self.rows.append(row)
        except (ValueError, OSError) as error:
            self.rows.append(Row("settings", str(error), "a run that may start", "fail", "see `training plan`"))

    def _introduce(self, team: Team) -> torch.device | None:
        """Let every rank say who it is; None where this launch has no device that the settings ask for."""

        def describe() -> dict[str, Any]:
            return asdict(this_process(_device(self._config), num_same_rank=team.count(f"rank/{team.rank}")))

        answers = team.phase("processes", describe)
        if not team.is_main:
            return _device(self._config) if team.read("go on") else None
        problems = {rank: answer.problem for rank, answer in enumerate(answers) if answer.problem}
        self.processes = [Process.of(answer.value) for answer in answers if answer.value is not None]
        team.post("scouts", scouts(self.processes))
        team.post("go on", not problems)
        if problems:
            text = "; ".join(f"rank {rank}: {problem}" for rank, problem in problems.items())
            self.rows.append(Row("devices", text, "the run's device on every rank", "fail", "see nvidia-smi there"))
            return None
        self.rows += process_rows(self.processes, wanted=self._wanted)
        return _device(self._config)

    def _folder_rows(
        self, folder: Sequence[Answer[Any]], clocks: Mapping[str, Sequence[float]], nodes: Mapping[int, str]
    ) -> Iterator[Row]:
        if problems := [f"{nodes[rank]}: {one.problem}" for rank, one in enumerate(folder) if one.problem]:
            advice = "the folder above the run's must be there, and writable from all nodes"
            yield Row("run folder", problems[0], "one folder for all nodes", "fail", advice)
        found = FolderFindings(**folder[0].value) if folder[0].value else None
        if found is not None:
            yield from folder_rows(found, self._root, nodes)
        skews = {int(rank): Skew(*skew) for rank, skew in clocks.items()}
        yield from clock_rows(skews, nodes, file_clock(found) if found is not None else None)


def _device(config: RunConfig) -> torch.device:
    """Return this rank's own device: each phase has a thread of its own, and the chosen GPU is a thread's."""
    device = choose_device(config.device)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def _network(values: Mapping[str, Any]) -> Network:
    return Network(**{**values, "speeds": [(int(size), float(speed)) for size, speed in values["speeds"]]})
