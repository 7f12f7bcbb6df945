"""Command: run a command as a Ray job, follow its logs, and exit with its status."""

import asyncio
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.console.config import build, option, read_yaml

ENVIRONMENT = "infra/runtime_env.yaml"  # path within the checkout
LOCAL = "http://127.0.0.1:8265"


@dataclass
class Config:
    """Options of ``hashbridge submit``; the command follows ``--``."""

    address: str = option("", f"the cluster's dashboard, as http://head:8265 (default: RAY_ADDRESS, else {LOCAL})")
    checkout: str = option(".", "folder whose files the job runs: what git does not ignore is uploaded")
    max_upload_mb: int = option(100, "refuse an upload of more MiB")
    environment: str = option("", f"Ray runtime environment, a YAML file (default: {ENVIRONMENT} of the checkout)")
    python: str = option("python", "the cluster's interpreter")
    wait: bool = option(True, "follow the logs until the job ends, and end with its exit status")
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_upload_mb < 1:
            raise ValueError(f"--max-upload-mb is {self.max_upload_mb}, but must be at least 1")


def make_config(values: dict[str, Any]) -> Config:
    """Build the config.

    Raises:
        ValueError: no command was given.
    """
    arguments = values.pop("arguments", [])
    if not arguments or arguments[0] == "submit":
        raise ValueError("no command to submit: give one after --, such as `hashbridge submit -- train igan --dataset ...`")
    config: Config = build(Config, values)
    config.arguments = arguments
    return config


def upload_size(checkout: Path) -> list[tuple[int, str]]:
    """Size in bytes and path of each file to upload, largest first: the files git does not ignore; all files without git.

    Raises:
        ValueError: the folder is not a checkout of hashbridge.
    """
    if not (checkout / "pipelines" / "__main__.py").is_file():
        raise ValueError(f"{checkout} is not a checkout of hashbridge: give --checkout")
    listed = subprocess.run(
        ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = listed.stdout.split("\0") if not listed.returncode else [str(each.relative_to(checkout)) for each in checkout.rglob("*")]
    return sorted(((path.stat().st_size, name) for name in names if name and (path := checkout / name).is_file()), reverse=True)


def run(config: Config) -> dict[str, Any]:
    """Submit the job and, by default, print its logs until it ends.

    Raises:
        ValueError: the upload is too large, or the cluster does not answer or rejects the job.
        SystemExit: the job failed; carries its exit status.
    """
    checkout = Path(config.checkout).resolve()
    files = upload_size(checkout)
    size = sum(each for each, _ in files) / 2**20
    if size > config.max_upload_mb:
        largest = ", ".join(f"{name} ({each / 2**20:.1f} MiB)" for each, name in files[:3])
        raise ValueError(f"the upload would be {size:.1f} MiB, over --max-upload-mb {config.max_upload_mb}: ignore in .gitignore {largest}, or raise it")
    address = config.address or os.environ.get("RAY_ADDRESS") or LOCAL
    environment = read_yaml(config.environment or str(checkout / ENVIRONMENT)) | {"working_dir": str(checkout)}
    command = shlex.join([config.python, "-m", "pipelines", *config.arguments])
    client = _connect(address)
    try:
        job = client.submit_job(entrypoint=command, runtime_env=environment)
    except Exception as error:
        raise ValueError(f"cluster {address} did not accept the job: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    print(f"job {job} on {address}: {len(files)} files, {size:.1f} MiB", file=sys.stderr, flush=True)
    if not config.wait:
        return {"job": job, "address": address}
    return {"job": job, "address": address, "status": _follow(client, job)}


def _connect(address: str) -> Any:
    """A client for the cluster's jobs. With RAY_AUTH_MODE=token it sends the token of RAY_AUTH_TOKEN or ~/.ray/auth_token."""
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415  ray is slow to import

    if "://" not in address:
        raise ValueError(f"address is {address!r}, but must be the dashboard's, such as http://head:8265")
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"no Ray cluster answers at {address}: {reason}") from error


def _follow(client: Any, job: str) -> str:
    """Print a job's logs until it ends; returns its status.

    Raises:
        SystemExit: the job failed.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(tail())
        while not client.get_job_status(job).is_terminal():  # the log stream may end a moment before the job
            time.sleep(0.5)
    except KeyboardInterrupt:
        print(f"hashbridge: job {job} continues; `ray job stop {job}` stops it", file=sys.stderr)
        raise
    found = client.get_job_info(job)
    if str(found.status) != "SUCCEEDED":
        if found.message and not found.driver_exit_code:
            print(f"hashbridge: job {job} {str(found.status).lower()}: {' '.join(found.message.split())[:300]}", file=sys.stderr)
        raise SystemExit(found.driver_exit_code or 1)
    return str(found.status)
