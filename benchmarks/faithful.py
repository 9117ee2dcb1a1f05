"""faithful: which samples do tools read, on 1 to 4 processes, after a kill, in evaluation?

1. Each rank of a launch is a real process with torchrun's variables and a gloo group. It writes the ids of each step to
   a file: `run_rank`.
2. For each tool and number of ranks: a run of two epochs and an evaluation; a run that saves its state in the second
   epoch, trains some steps more and is killed with SIGKILL; its resume on as many ranks, and on another number.
3. One judge counts for all tools, from the files alone: ``faithful_judge``. The tools are in ``faithful_tools``.
"""

import atexit
import contextlib
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import shlex
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from benchmarks.faithful_judge import (
    KILL_AT,
    QUESTIONS,
    SAVE_AT,
    Answer,
    Record,
    compare,
    judge_ends,
    judge_evaluation,
    judge_once,
    judge_order,
    judge_resume,
    read_record,
)
from benchmarks.faithful_tools import BATCH, EPOCHS, SAMPLES, SEED, SHARDS, TOOLS, WORKERS, Tool
from benchmarks.options import Faithful
from mnistm_dist.errors import UserError

# A launch that takes longer hangs; in lockstep a rank waits so long for another one, in seconds.
TIMEOUT, COLLECTIVE_TIMEOUT = 120, 10
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the processes of a launch do: train, and evaluate unless they are killed or in lockstep."""

    world_size: int
    kill: bool = False  # Save in mid-epoch, then kill all processes.
    resume: int | None = None  # Continue from the states of a launch of so many ranks.
    lockstep: bool = False  # An all-reduce after each step, as in DDP.


def ask(tool: type[Tool], run: Callable[[Launch], Record], ranks: Sequence[int]) -> Iterator[tuple[str, int, Answer]]:
    """Yield question, number of ranks and answer of a tool, whose launches ``run`` starts."""
    reference: Record | None = None
    for world_size in ranks:
        whole = run(Launch(world_size=world_size))
        equal = len({len(rank) for rank in whole.steps}) == 1
        lockstep = None if equal else run(Launch(world_size=world_size, lockstep=True))
        yield "ends", world_size, judge_ends(whole, lockstep)
        if whole.error:
            yield "once", world_size, Answer(answer="no", counts={"error": whole.error})
            continue
        yield "once", world_size, judge_once(whole)
        if tool.evaluate is not Tool.evaluate:
            yield "evaluation", world_size, judge_evaluation(whole)
        if reference:
            yield "batches", world_size, compare(whole.global_steps(), reference.global_steps())
        reference = reference or whole
        killed = run(Launch(world_size=world_size, kill=True))
        yield "order", world_size, judge_order(killed, whole)
        for question, other in (("resume", world_size), ("elastic", world_size % 4 + 1)):
            resumed = run(Launch(world_size=other, resume=world_size))
            answer = judge_resume(resumed, whole, SAVE_AT if tool.saves_mid_epoch else 0)
            more: dict[str, Any] = {"ranks_at_the_resume": other}
            if resumed.error:
                more["error"] = resumed.error
            yield question, world_size, Answer(answer=answer.answer, counts={**answer.counts, **more})


def run_rank(tool: type[Tool], job: Launch, data: Path, folder: Path, rank: int, port: int) -> None:
    """Be one rank of a launch: write what it reads to ``folder/rank-R.jsonl``, a line per step."""
    os.setsid()
    # The functions that the parent has registered are not those of this process.
    atexit._clear()
    log_to(folder / f"rank-{rank}.log")
    sizes = {"WORLD_SIZE": job.world_size, "LOCAL_WORLD_SIZE": job.world_size, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in {**sizes, "MASTER_PORT": port}.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    # The lock files of a tool, too, are removed with the folder of the launch.
    tempfile.tempdir = str(folder)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT if job.lockstep else TIMEOUT)
    states = data / f"states-{job.resume or job.world_size}"
    with (folder / f"rank-{rank}.jsonl").open("w", buffering=1) as file:
        try:
            dist.init_process_group("gloo", timeout=timeout)
            if rank == 0:
                tool.clean(data)
            dist.barrier()
            user = tool(data, rank, job.world_size)
            if job.resume:
                user.load_from(states)
            train(user, job, states, file)
            if not job.lockstep and tool.evaluate is not Tool.evaluate:
                file.writelines(json.dumps({"evaluated": ids}) + "\n" for ids in user.evaluate())
            dist.barrier()
            file.write(json.dumps({"ended": True}) + "\n")
        except Exception as error:  # noqa: BLE001  # whatever a tool raises is the result
            traceback.print_exc()
            file.write(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}) + "\n")
    dist.destroy_process_group()
    # A forked process does not by itself call what its tools have registered.
    atexit._run_exitfuncs()


def train(user: Tool, job: Launch, states: Path, file: TextIO) -> None:
    """Train all epochs, or up to the kill."""
    done = 0
    for epoch, epochs, ids in user.train():
        file.write(json.dumps({"step": [epoch, epochs, ids]}) + "\n")
        done += epoch == 1
        if job.lockstep:
            dist.all_reduce(torch.ones(1))
        if job.kill and epoch == 1 and done == SAVE_AT:
            states.mkdir(exist_ok=True)
            user.save_to(states)
        if job.kill and epoch == 1 and done == KILL_AT:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def launch(tool: type[Tool], job: Launch, data: Path, folder: Path) -> Record:
    """Run a launch to its end, or to the time-out, and read what its ranks wrote."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = range(job.world_size)
    processes = [FORK.Process(target=run_rank, args=(tool, job, data, folder, rank, port)) for rank in ranks]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        # Its workers, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return read_record([folder / f"rank-{rank}.jsonl" for rank in ranks])


def log_to(path: Path) -> None:
    """Write what this process prints to a file."""
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)


def measure(tool: type[Tool], ranks: Sequence[int], folder: Path) -> None:
    """Ask all questions of a tool in a process of its own, and write the rows to ``folder/rows.json``."""
    log_to(folder / "log.txt")
    torch.set_num_threads(1)
    # One for all launches: that of a rank would be killed with it, in the middle of its work.
    resource_tracker.ensure_running()
    for module in tool.modules:
        importlib.import_module(module)
    data, launches = folder / "data", count()
    data.mkdir()
    # In a process of its own: what is forked later has no threads of a library in it.
    writing = FORK.Process(target=tool.write, args=(data,))
    writing.start()
    writing.join()
    assert writing.exitcode == 0, "the samples could not be written"
    answers = ask(tool, lambda job: launch(tool, job, data, folder / f"launch-{next(launches)}"), ranks)
    rows = [{"question": question, "ranks": world_size, **vars(answer)} for question, world_size, answer in answers]
    tool.clean(data)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def measure_all(tools: Sequence[type[Tool]], ranks: Sequence[int], folders: Sequence[Path]) -> None:
    """Measure tools, as many at once as there are cores: their processes wait for one another most of the time."""
    running: list[Any] = []
    for tool, folder in zip(tools, folders, strict=True):
        folder.mkdir()
        running.append(FORK.Process(target=measure, args=(tool, ranks, folder)))
        running[-1].start()
        while sum(process.is_alive() for process in running) >= len(os.sched_getaffinity(0)):
            time.sleep(0.1)
    for process in running:
        process.join()


def faithful(options: Faithful) -> dict[str, Any]:
    """Measure the tools that are installed and selected. Raises `UserError`."""
    chosen = [tool for tool in TOOLS if not options.only or any(part in tool.name for part in options.only)]
    if not chosen:
        names = "; ".join(tool.name for tool in TOOLS)
        raise UserError(f"--only: no tool is named {options.only[0]!r}; choose from: {names}")
    rows: list[dict[str, Any]] = []
    installed = [tool for tool in chosen if tool.version()]
    with tempfile.TemporaryDirectory(prefix="faithful-") as temporary:
        folders = [Path(temporary) / str(number) for number in range(len(installed))]
        measure_all(installed, options.ranks, folders)
        for tool in chosen:
            about = {"tool": tool.name, "version": tool.version(), "source": tool.source}
            if tool not in installed:
                note = f"pip install {tool.package}; '.[faithful]' installs all tools"
                missing = {"question": "installed", "ranks": 0, "answer": "no", "counts": {}, "note": note}
                rows.append({**about, **missing})
                continue
            folder = folders[installed.index(tool)]
            if not (folder / "rows.json").exists():
                log = (folder / "log.txt").read_text(errors="replace").splitlines()
                raise UserError(f"{tool.name}: could not be measured: {log[-1] if log else 'no message'}")
            for row in json.loads((folder / "rows.json").read_text(encoding="utf-8")):
                limited = row["answer"] != "yes" or row["counts"].get("of_the_next_epoch")
                rows.append({**about, **row, "note": tool.notes.get(row["question"]) if limited else None})
    conditions = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "samples": SAMPLES,
        "global_batch": BATCH,
        "epochs": EPOCHS,
        "seed": SEED,
        "workers_of_a_rank": WORKERS,
        "shards": SHARDS,
        "kill": f"saved after step {SAVE_AT} of the second epoch, killed after step {KILL_AT}",
        "resumed": "on as many ranks, and on one more (from 4: on 1)",
        "questions": QUESTIONS,
    }
    return {"rows": rows, "conditions": conditions}


def print_answers(result: dict[str, Any]) -> None:
    """Print a table with a letter for each number of ranks, then the counts of what is not answered with yes."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 80)
    table = Table(box=None, pad_edge=False)
    for column in ("tool", *QUESTIONS):
        table.add_column(column.replace("evaluation", "eval"), no_wrap=True)
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        rows_of.setdefault(row["tool"], []).append(row)
    for tool, rows in rows_of.items():
        cells = ("".join(row["answer"][0] for row in rows if row["question"] == question) for question in QUESTIONS)
        table.add_row(tool, *(cell or "-" for cell in cells))
    console.print(table)
    console.print("\nA letter for each number of ranks: y yes, p partly, n no. -: not asked.")
    for question, text in QUESTIONS.items():
        console.print(f"{question}: {text}")
    for tool, rows in rows_of.items():
        console.print(f"\n{tool} {rows[0]['version'] or 'is not installed'}\n  {rows[0]['source']}", soft_wrap=True)
        limited = [row for row in rows if row["note"] or row["answer"] != "yes"]
        for question in dict.fromkeys(row["question"] for row in limited):
            asked = [row for row in limited if row["question"] == question]
            ranks_of: dict[str, list[str]] = {}
            for row in asked:
                ranks_of.setdefault(describe(row["counts"]), []).append(label(row))
            texts = (f"{text} ({', '.join(ranks)} ranks)" for text, ranks in ranks_of.items() if text)
            console.print(Padding(f"{question}: {'; '.join(texts)}", (0, 0, 0, 2)))
            for note in dict.fromkeys(row["note"] for row in asked if row["note"]):
                console.print(Padding(note, (0, 0, 0, 4)))
    console.print()
    for name, value in result["conditions"].items():
        if name != "questions":
            console.print(f"{name}: {value}", soft_wrap=True)


def label(row: dict[str, Any]) -> str:
    """Return the number of ranks of a row, and on how many others a run was resumed."""
    other = row["counts"].get("ranks_at_the_resume", row["ranks"])
    return f"{row['ranks']} to {other}" if other != row["ranks"] else str(other)


def describe(counts: dict[str, Any]) -> str:
    """Return counts as text, without zeros."""
    left = {name: value for name, value in counts.items() if name != "ranks_at_the_resume"}
    texts = [f"{left.pop('equal_steps')} of {left.pop('steps')} steps equal"] if "steps" in left else []
    return ", ".join(texts + [f"{value} {name.replace('_', ' ')}" for name, value in left.items() if value])
