"""A real Slurm on this machine: a controller and several nodes, for tests.

    with SlurmCluster(2) as cluster:
        job = cluster.sbatch("slurm/evaluate.sh", "recipe=tiny")
        assert cluster.wait(job)["JobState"] == "COMPLETED"

It needs root and Debian's packages `slurm-wlm slurm-wlm-basic-plugins munge`, no systemd. Ports,
folders and munge's socket belong to one cluster, so several run side by side. Every wait has a
limit, and a cluster that does not come up shows its logs.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm slurm-wlm-basic-plugins munge"
FINAL_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "TIMEOUT"),
}
PATIENCE_S = 400
"""Seconds that a job may take; a few dozen do on a machine that has nothing else to do."""
_LOG_LINES = 30
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=3
ReturnToService=2
MinJobAge=3600
MpiDefault=none
MessageTimeout=30
SlurmdTimeout=8
KillWait=10
JobRequeue=1
{gres_types}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not() -> str | None:
    """Why no cluster can be started here, in words; None where it can."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests is started as root; this is another user"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing): {INSTALL}"
    return None


def skip_without_slurm() -> None:
    """Skip the calling test, with the reason, where no cluster can be started."""
    if reason := why_not():
        pytest.skip(reason)


class SlurmCluster:
    """Controller and nodes `node1`, `node2`, …, up and idle inside the `with` block.

    Attributes:
        env: environment for Slurm's commands; jobs inherit it (`SLURM_CONF` names the cluster).
        folder: configuration, logs and state.
        nodes: the nodes' names.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        cpus_per_node: int = 8,
        gpus_per_node: int = 0,
        gpu_type: str = "h100",
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the cluster; entering the `with` block starts it.

        Args:
            num_nodes: nodes, each a `slurmd`.
            cpus_per_node: CPUs that a node claims to have, whatever the machine has.
            gpus_per_node: character devices that stand in for GPUs (`--gpus-per-node` works; there
                is nothing to compute on). They need the right to make device files.
            gpu_type: what the GPUs are called.
            env: variables beside those of this process, for all commands and jobs.
        """
        self.nodes = [f"node{index}" for index in range(1, num_nodes + 1)]
        self.cpus_per_node = cpus_per_node
        self.gpus_per_node, self.gpu_type = gpus_per_node, gpu_type
        # a session that is itself a Slurm job must not lend its variables to ours
        outer = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC)_")
        self.env = {key: value for key, value in os.environ.items() if not outer.match(key)}
        self.env |= dict(env or {})
        self.folder = Path()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # Start and stop

    def __enter__(self) -> SlurmCluster:
        """Start everything and wait until all nodes are idle.

        Raises:
            RuntimeError: it did not come up, three times; with the logs.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env["SLURM_CONF"] = str(self.folder / "slurm.conf")
        failures = []
        for _ in range(3):  # another process may have taken a port
            try:
                self._start()
                return self
            except RuntimeError as error:
                failures.append(f"{error}\n{self.logs()}")
                self._stop_daemons()
        self.__exit__()
        raise RuntimeError("no Slurm:\n" + "\n".join(failures))

    def __exit__(self, *_: object) -> None:
        """Cancel all jobs, stop all processes, remove the folder."""
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            self.run("scancel", "--full", "--user=root", check=False)
            self._poll(lambda: not self.processes(daemons=False), timeout_s=5)
        self._stop_daemons()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self._configure()
        folder = self.folder
        munge = [
            "munged --foreground --force --num-threads=2",
            f"--socket={folder}/munge.socket --key-file={folder}/munge.key",
            f"--pid-file={folder}/munge.pid --seed-file={folder}/munge.seed --log-file=/dev/stderr",
        ]
        self._spawn("munged", " ".join(munge).split())
        if not self._poll((folder / "munge.socket").exists, timeout_s=20):
            raise RuntimeError("munged has made no socket within 20 s")
        self._spawn("slurmctld", ["slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf")])
        for node in self.nodes:
            self.start_node(node, wait=False)
        if not self._poll(lambda: self._states() == {"IDLE"}, timeout_s=45):
            raise RuntimeError(f"nodes are {sorted(self._states())}, not idle, after 45 s")

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool", "devices"):
            (folder / name).mkdir(exist_ok=True)
        os.chmod(folder, 0o755)  # munge refuses sockets that others cannot reach
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        controller, *ports = _free_ports(len(self.nodes) + 1)
        gres = f" Gres=gpu:{self.gpu_type}:{self.gpus_per_node}" if self.gpus_per_node else ""
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} State=UNKNOWN "
            f"CPUs={self.cpus_per_node} RealMemory=512000{gres}"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        text = _SLURM_CONF.format(
            host=host,
            port=controller,
            # ports of jobs follow from their numbers: two clusters beside each other must differ
            first_job=random.randrange(1, 1_000_000),
            folder=folder,
            nodes="\n".join(lines),
            gres_types="GresTypes=gpu" if gres else "",
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        if gres:
            for index in range(self.gpus_per_node):
                device = folder / "devices" / f"gpu{index}"
                if not device.exists():
                    os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
            last = self.gpus_per_node - 1
            files = f"gpu[0-{last}]" if last else "gpu0"
            line = f"Name=gpu Type={self.gpu_type} File={folder}/devices/{files}\n"
            (folder / "gres.conf").write_text(line)

    def _spawn(self, name: str, command: list[str], **env: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            # they end with this process, however that ends
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.env | env,
            )

    def _stop_daemons(self) -> None:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.processes(daemons=kind == signal.SIGKILL):
                _send(pid, kind)
            for daemon in self._daemons.values():
                if daemon.poll() is None:
                    daemon.send_signal(kind)
            self._poll(self._daemons_ended, timeout_s=5)
        self._daemons.clear()

    def _daemons_ended(self) -> bool:
        return all(daemon.poll() is not None for daemon in self._daemons.values())

    def processes(self, *, node: str | None = None, daemons: bool = False) -> list[int]:
        """Process ids that belong to this cluster (to one node) by their environment."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        places = {f"TEST_NODE={node}".encode(), f"SLURMD_NODENAME={node}".encode()}
        own = {daemon.pid for daemon in self._daemons.values()}
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            pid = int(entry.name)
            try:
                variables = set((entry / "environ").read_bytes().split(b"\0"))
                name = (entry / "comm").read_text().strip()
            except OSError:
                continue  # it has ended, or is a thread of the kernel
            if pid == os.getpid() or mark not in variables or (node and not places & variables):
                continue
            if daemons or not (pid in own or name == "slurmscriptd"):  # slurmctld's helper
                found.append(pid)
        return found

    # Commands

    def run(
        self, *command: str, timeout_s: float = 60, check: bool = True, cwd: Path = ROOT, **env: str
    ) -> str:
        """Run one of Slurm's commands; its output.

        Raises:
            RuntimeError: it failed (with `check`), with what it printed and the cluster's logs.
            subprocess.TimeoutExpired: it took too long.
        """
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=cwd,
            env=self.env | env,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}\n"
                f"{self.logs()}"
            )
        return done.stdout + ("" if check else done.stderr)

    def sbatch(self, *words: str, cwd: Path = ROOT, **env: str) -> str:
        """Submit a script (`sbatch --parsable WORDS`); the job's id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **env).strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job -o` says: `JobState`, `Reason`, `ExitCode`, `Restarts`, …"""
        line = self.run("scontrol", "show", "job", "-o", job).strip()
        return dict(re.findall(r"(\S+?)=(.*?)(?= \S+=|$)", line))

    def wait_for(
        self, job: str, done: Callable[[dict[str, str]], bool], *, timeout_s: float = PATIENCE_S
    ) -> dict[str, str]:
        """Wait until a job is as `done` wants it; what `job` says then.

        Raises:
            TimeoutError: it did not get there; with its state, its output and the logs.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.job(job)
            if done(found):
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"job {job} is {found.get('JobState')} ({found.get('Reason')}) after "
                    f"{timeout_s:.0f} s\n{self.output(job)}\n{self.logs()}"
                )
            time.sleep(0.3)

    def wait(self, job: str, *, timeout_s: float = PATIENCE_S) -> dict[str, str]:
        """Wait until a job has ended for good; what `job` says then."""
        return self.wait_for(job, lambda it: it["JobState"] in FINAL_STATES, timeout_s=timeout_s)

    def output(self, job: str) -> str:
        """What a job has printed so far (standard output; standard error where it is apart)."""
        found = self.job(job)
        paths = {found.get("StdOut", ""), found.get("StdErr", "")}
        texts = [Path(path).read_text() for path in sorted(paths) if Path(path).is_file()]
        return "\n".join(texts)

    def logs(self) -> str:
        """The last lines of all daemons' logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            parts.append(f"--- {path.name}\n" + "\n".join(lines))
        return "\n".join(parts)

    # Nodes

    def start_node(self, node: str, *, wait: bool = True) -> None:
        """Start a node's `slurmd`.

        Raises:
            RuntimeError: the node is not idle within 30 s (with `wait`).
        """
        conf = str(self.folder / "slurm.conf")
        self._spawn(node, ["slurmd", "-D", "-N", node, "-f", conf], TEST_NODE=node)
        if wait and not self._poll(lambda: "IDLE" in self._states(node), timeout_s=30):
            raise RuntimeError(f"{node} is {self._states(node)} 30 s after its start")

    def kill_node(self, node: str, *, declare: bool = True) -> None:
        """Let a node die: `slurmd` and everything that it started get SIGKILL.

        Args:
            node: its name.
            declare: tell the controller; otherwise it finds out by itself within half a minute.
        """
        self._daemons[node].kill()
        for pid in self.processes(node=node, daemons=True):
            _send(pid, signal.SIGKILL)
        self._daemons[node].wait(timeout=10)
        if declare:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def _states(self, node: str | None = None) -> set[str]:
        shown = self.run("scontrol", "show", "node", "-o", *([node] if node else []), check=False)
        states = {match.split("+")[0] for match in re.findall(r"\bState=(\S+)", shown)}
        return states or {"UNKNOWN"}

    @staticmethod
    def _poll(reached: Callable[[], bool], *, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not reached():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def _send(pid: int, kind: signal.Signals) -> None:
    try:
        os.kill(pid, kind)
    except ProcessLookupError:
        return  # it has ended by itself


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system gives to outgoing connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
