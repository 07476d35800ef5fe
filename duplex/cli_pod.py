"""The commands about a rented GPU: `duplex pod`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from duplex.cli_options import RUNS, AsJson, RunsRoot

if TYPE_CHECKING:
    from pipeline.pod_session import PodOptions, Session

pod = typer.Typer(
    no_args_is_help=True,
    help="One rented GPU pod on RunPod. Needs RUNPOD_API_KEY; docs/pods.md says what it costs.",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.")]
Image = Annotated[
    str | None,
    typer.Option(envvar="DUPLEX_POD_IMAGE", help="Made from runpod/Dockerfile, and pushed."),
]
Template = Annotated[
    str | None, typer.Option(metavar="ID", help="A template of yours, instead of an image.")
]
Gpu = Annotated[
    list[str] | None, typer.Option("--gpu", help="A type of data/gpus.yaml; may be repeated.")
]
GpuMemory = Annotated[
    float | None, typer.Option("--gpu-memory", min=1, help="GB; computed if not given.")
]
MaxPrice = Annotated[
    float | None, typer.Option("--max-usd-h", min=0, help="Dearest price of a GPU's hour.")
]
Budget = Annotated[float, typer.Option("--budget-usd", help="The pod ends itself at that.")]
Idle = Annotated[float, typer.Option("--idle-minutes", help="And after so long without work.")]
Ready = Annotated[
    float, typer.Option("--ready-minutes", help="Longest time without a step forward.")
]
Hours = Annotated[float | None, typer.Option(min=0, help="How long you expect: for the estimate.")]
Cloud = Annotated[str, typer.Option(help="secure or community.")]
Volume = Annotated[
    str | None, typer.Option("--network-volume", metavar="ID", help="Outlives every pod.")
]
VolumeGb = Annotated[int, typer.Option("--volume-gb", min=10, help="The pod's own volume.")]
DiskGb = Annotated[int, typer.Option("--disk-gb", min=10, help="The container's disk.")]
DataCenter = Annotated[
    list[str] | None, typer.Option("--data-center", metavar="ID", help="May be repeated.")
]
Env = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Pass this variable of the environment on; may be repeated."),
]
ConfigInPod = Annotated[
    str | None, typer.Option("--config-in-pod", metavar="PATH", help="If not the same path there.")
]
Abandon = Annotated[
    bool, typer.Option("--abandon-volume", help="Begin anew where the pod's host has no GPU free.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Rent without being asked.")]


def _open(config: Path, runs: Path, as_json: bool) -> Session:
    import os

    from duplex.configfile import load_config
    from pipeline.pod_session import Session
    from pipeline.pods.clock import WallClock

    return Session(load_config(config), config, runs, os.environ, WallClock(), as_json=as_json)


def _options(
    image: str | None, template: str | None, gpu: list[str] | None, data_center: list[str] | None,
    env: list[str] | None, **others: object,
) -> PodOptions:  # fmt: skip
    from pipeline.pod_session import PodOptions

    return PodOptions(
        image=image, template=template, gpus=tuple(gpu or ()), env=tuple(env or ()),
        data_centers=tuple(data_center or ()), **others,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _rents(name: str, text: str) -> None:
    """A command that may rent a pod: `up` and `run` take the same options."""

    def command(
        config: ConfigPath,
        image: Image = None,
        template: Template = None,
        gpu: Gpu = None,
        gpu_memory: GpuMemory = None,
        max_usd_h: MaxPrice = None,
        budget_usd: Budget = 10,
        idle_minutes: Idle = 30,
        ready_minutes: Ready = 30,
        hours: Hours = None,
        cloud: Cloud = "secure",
        network_volume: Volume = None,
        volume_gb: VolumeGb = 100,
        disk_gb: DiskGb = 50,
        data_center: DataCenter = None,
        env: Env = None,
        config_in_pod: ConfigInPod = None,
        abandon_volume: Abandon = False,
        yes: Yes = False,
        runs: RunsRoot = RUNS,
        as_json: AsJson = False,
    ) -> None:
        from pipeline import pod_command

        options = _options(
            image, template, gpu, data_center, env, gpu_memory=gpu_memory, max_usd_h=max_usd_h,
            budget_usd=budget_usd, idle_minutes=idle_minutes, ready_minutes=ready_minutes,
            hours=hours, cloud=cloud, network_volume=network_volume,
            volume_gb=volume_gb, disk_gb=disk_gb, config_in_pod=config_in_pod,
            abandon_volume=abandon_volume, yes=yes,
        )  # fmt: skip
        with closing(_open(config, runs, as_json)) as session:
            (pod_command.up if name == "up" else pod_command.run)(session, options)

    pod.command(name=name, help=text)(command)


_rents(
    "up",
    "Rent the cheapest GPU that the config fits on, or start the pod there is; wait until it "
    "answers.\n\nExample: duplex pod up configs/coffee.yaml --image YOU/duplex --budget-usd 10",
)
_rents(
    "run",
    "Bring a pod up, wait until its pipeline is done and its model answers; bring results home.\n\n"
    "Example: duplex pod run configs/coffee.yaml --image YOU/duplex --network-volume ID --yes",
)


@pod.command()
def status(config: ConfigPath, runs: RunsRoot = RUNS, as_json: AsJson = False) -> None:
    """Show this config's pods, what they cost so far, how far the pipeline is, and stray pods.

    Example: duplex pod status configs/coffee.yaml
    """
    from pipeline import pod_command

    with closing(_open(config, runs, as_json)) as session:
        pod_command.status(session)


@pod.command()
def logs(
    config: ConfigPath,
    tail: Annotated[int, typer.Option(min=1, max=5000, help="Lines from the end.")] = 200,
    runs: RunsRoot = RUNS,
    as_json: AsJson = False,
) -> None:
    """Show the end of what the pipeline in the pod prints.

    Example: duplex pod logs configs/coffee.yaml --tail 50
    """
    from pipeline import pod_command

    with closing(_open(config, runs, as_json)) as session:
        pod_command.logs(session, tail)


@pod.command()
def sync(config: ConfigPath, runs: RunsRoot = RUNS, as_json: AsJson = False) -> None:
    """Bring adapter, certificate, report and manifests home; what was fetched is not sent again.

    Example: duplex pod sync configs/coffee.yaml
    """
    from pipeline import pod_command

    with closing(_open(config, runs, as_json)) as session:
        pod_command.sync(session)


@pod.command()
def down(
    config: ConfigPath,
    delete: Annotated[bool, typer.Option("--delete", help="Also the pod's own volume.")] = False,
    strays: Annotated[
        bool, typer.Option("--strays", help="Also pods of that name that no book here knows.")
    ] = False,
    runs: RunsRoot = RUNS,
    as_json: AsJson = False,
) -> None:
    """Stop the config's pods, or delete them, and print the bill. Doing it twice is no error.

    Example: duplex pod down configs/coffee.yaml --delete
    """
    from pipeline import pod_command

    with closing(_open(config, runs, as_json)) as session:
        pod_command.down(session, delete=delete, strays=strays)
