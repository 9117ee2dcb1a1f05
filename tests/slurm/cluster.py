"""A real Slurm of two nodes on this machine, for the time of a test session.

Every node is a slurmd in namespaces of its own: its host name, its /etc/hosts and its process numbers are not those of
the other node, so that a run sees two hosts. Whatever a node ever started dies with its namespace, and the namespaces
die with the process that made the cluster, even if that one is killed: nothing can be left behind.

Debian: ``apt-get install --no-install-recommends slurmctld slurmd slurm-client munge``; root.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

NODES = ("node1", "node2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "scontrol", "unshare", "setpriv")
START_SECONDS = 60.0
COMMAND_SECONDS = 60.0

CONFIGURATION = """\
ClusterName=two_nodes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
# A requeued job waits for its old credential to expire: 120 seconds by default, 5 at least.
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
MailProg=/bin/true
StateSaveLocation={root}/controller
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/controller/pid
SlurmdPidFile={root}/%n/pid
SlurmctldLogFile={root}/log/slurmctld
SlurmdLogFile={root}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
{gres_types}
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=8000 {gres}\n"


def missing() -> str | None:
    """Return the reason why no cluster can be started, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    tried = subprocess.run(
        ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    return f"no namespaces here ({tried.stderr.strip()})" if tried.returncode else None


class Cluster:
    """Two nodes, up while the context lasts.

    Each has ``cpus`` CPUs and ``gpus`` GPUs in Slurm's books; what it really has are this machine's cores, and no GPU.
    """

    def __init__(self, *, cpus: int = 2, gpus: int = 0) -> None:
        self.cpus, self.gpus = cpus, gpus
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            # A short path: those of sockets have at most 107 characters.
            self.root = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True))
            )
            self._write_configuration()
            socket_path = self.root / "munge" / "socket"
            files = [f"--{name}-file={self.root / 'munge' / name}" for name in ("key", "pid", "log", "seed")]
            self._start(stack, "munged", "munged", "--foreground", "--force", f"--socket={socket_path}", *files)
            self._wait_until(socket_path.exists, "munged")
            self._start(stack, "slurmctld", "slurmctld", "-D", "-c")
            for name in NODES:
                # bash stays the namespace's first process, which must reap orphans.
                enter = 'hostname "$1"; mount --bind "$2" /etc/hosts; slurmd -D -c -N "$1"; exit'
                namespaces = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
                node = self._start(
                    stack, name, *namespaces, "bash", "-c", enter, "node", name, str(self.root / "hosts")
                )
                self._nodes[name] = node
            self._wait_until(lambda: self._idle() == set(NODES), "the nodes")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Slurm's commands find this cluster."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def command(self, *command: object, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """Run a command of Slurm and return its output."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env={**(os.environ if environment is None else environment), **self.environment},
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        assert done.returncode == 0, f"{command[0]}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """Return Slurm's record of a job: JobState, ExitCode ("2:0": exit code, signal), Restarts ..."""
        parts = self.command("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in parts if "=" in word)

    def wait(self, number: int, *states: str, seconds: float, restarts: int = 0) -> dict[str, str]:
        """Wait until the job, restarted at least that often, is in one of the states; return it.

        Wait for states that last: a short job is RUNNING for less time than passes between two looks.
        """
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states or int(job["Restarts"]) < restarts:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']} after {seconds:.0f} s, not {states}"
            time.sleep(0.2)
        return job

    def lose(self, node: str) -> None:
        """Kill a node with all its processes, for good, as a loss of power does, and tell Slurm."""
        _end(self._nodes[node])
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def logs(self) -> str:
        """The ends of the daemons' logs, for the message of a failure."""
        paths = sorted((self.root / "log").iterdir())
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in paths)

    def _write_configuration(self) -> None:
        for name in ("controller", "log", "munge", *NODES):
            (self.root / name).mkdir()
        (self.root / "munge").chmod(0o700)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.root / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(NODES)}\n")
        # One plugin must be named, and none is used.
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        gres, gres_types = "", ""
        if self.gpus:
            for number in range(self.gpus):
                (self.root / f"gpu{number}").symlink_to("/dev/null")
            (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-{self.gpus - 1}]\n")
            gres, gres_types = f"Gres=gpu:{self.gpus}", "GresTypes=gpu"
        host = socket.gethostname().partition(".")[0]
        controller_port, *ports = free_ports(1 + len(NODES))
        nodes = "".join(
            NODE.format(name=name, host=host, port=port, cpus=self.cpus, gres=gres)
            for name, port in zip(NODES, ports, strict=True)
        )
        text = CONFIGURATION.format(
            host=host, root=self.root, controller_port=controller_port, nodes=nodes, gres_types=gres_types
        )
        (self.root / "slurm.conf").write_text(text)

    def _start(self, stack: ExitStack, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a daemon that is killed with this process, and at the end of the stack."""
        with (self.root / "log" / f"{name}.out").open("wb") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        stack.callback(_end, process)
        return process

    def _idle(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--states", "idle", "--format", "%N"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        return set(done.stdout.split())

    def _wait_until(self, condition, what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come up in {START_SECONDS:.0f} s\n{self.logs()}"
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return different free ports of this machine."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
