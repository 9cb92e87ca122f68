"""The section `slurm`: what the jobs of a chain ask Slurm for. No stage's result depends on it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

_OF_RANKS = {"nodes", "gpus_per_node", "tasks_per_node"}
"""Fields of jobs whose processes are ranks of one run."""
_SITE = ("partition", "account", "qos", "constraint", "reservation")


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """A stage's job; what is not set is as `slurm.every` or the script in `slurm/` says."""

    nodes: int | None = None
    """Machines."""

    gpus_per_node: int | None = None
    """GPUs of each; 0: none."""

    tasks_per_node: int | None = None
    """Processes on each; default: one for each GPU where `gpus_per_node` is set."""

    cpus_per_task: int | None = None
    """CPU cores of a process."""

    mem: str | None = None
    """Memory of a node, such as 64G; 0: all of it."""

    time: str | None = None
    """Limit, such as 24:00:00 or 2-00:00:00; a job that reaches it saves, and queues again."""

    partition: str | None = None
    """Partition of this stage alone."""

    options: tuple[str, ...] = ()
    """Further options of sbatch, such as [--exclusive]."""

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: a count is out of range, or an option is none.
        """
        for name, least in (
            *(("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"slurm: {name}={value} must be at least {least}")
        for option in self.options:
            if not option.startswith("-"):
                raise ValueError(
                    f"slurm: options hold {option!r}, which is no option of sbatch; write "
                    "[--exclusive]"
                )

    def over(self, other: JobSettings) -> JobSettings:
        """These settings where they are set, else those of `other`; options add up."""
        mine = {item.name: getattr(self, item.name) for item in fields(self)}
        chosen = {name: value for name, value in mine.items() if value is not None}
        return replace(other, **{**chosen, "options": (*other.options, *self.options)})

    def sbatch_options(self) -> list[str]:
        """Options of sbatch."""
        tasks = self.tasks_per_node
        if tasks is None and self.gpus_per_node is not None:
            tasks = max(self.gpus_per_node, 1)
        values = {
            "partition": self.partition,
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node,
            "ntasks-per-node": tasks,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "time": self.time,
        }
        given = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return [*given, *self.options]


@dataclass(frozen=True, kw_only=True)
class PrepareJobSettings(JobSettings):
    """The job array of `prepare`."""

    workers: int | None = None
    """Jobs of the array, which share the work; default: as slurm/prepare.sh has it."""

    def __post_init__(self) -> None:
        """Check the number. Raises: ValueError: it is below 1."""
        super().__post_init__()
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"slurm.prepare.workers={self.workers} must be at least 1")

    def sbatch_options(self) -> list[str]:
        """Options of sbatch, the array among them."""
        # The script asks for a number of tasks, not of tasks on each node.
        options = [o for o in super().sbatch_options() if not o.startswith("--ntasks-per-node")]
        array = [] if self.workers is None else [f"--array=0-{self.workers - 1}"]
        return [*array, *options]


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What `python -m pipeline.submit` asks Slurm for; the stages themselves never look at it."""

    partition: str | None = None
    """Partition of all jobs; default: the cluster's."""

    account: str | None = None
    """Account that pays."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that the nodes must have, such as h100."""

    reservation: str | None = None
    """Reservation to run in."""

    every: JobSettings = field(default_factory=JobSettings)
    """All stages' jobs, where a stage does not say otherwise; of `prepare`, whose workers have a
    task each, all but nodes, GPUs and tasks."""

    prepare: PrepareJobSettings = field(default_factory=PrepareJobSettings)
    """The job array of `prepare`."""

    pretrain: JobSettings = field(default_factory=JobSettings)
    """The job of `pretrain`."""

    align: JobSettings = field(default_factory=JobSettings)
    """The job of `align`."""

    convert: JobSettings = field(default_factory=JobSettings)
    """The job of `convert`."""

    collect: JobSettings = field(default_factory=JobSettings)
    """The job of `collect`."""

    on_policy: JobSettings = field(default_factory=JobSettings)
    """The job of `convert:on_policy`."""

    sft: JobSettings = field(default_factory=JobSettings)
    """The job of `sft`."""

    evaluate: JobSettings = field(default_factory=JobSettings)
    """The job of `evaluate`."""

    export: JobSettings = field(default_factory=JobSettings)
    """The job of `export`."""

    def job(self, section: str) -> JobSettings:
        """Settings of a stage by its section, `on_policy` for `convert:on_policy`."""
        own: JobSettings = getattr(self, section)
        if isinstance(own, PrepareJobSettings):
            names = {item.name for item in fields(JobSettings)} - _OF_RANKS
            shared = PrepareJobSettings(**{name: getattr(self.every, name) for name in names})
            return own.over(shared)
        return own.over(self.every)

    def site_options(self) -> list[str]:
        """Options of sbatch that all jobs have; a stage's own partition comes after them."""
        values = {name: getattr(self, name) for name in _SITE}
        return [f"--{name}={value}" for name, value in values.items() if value is not None]
