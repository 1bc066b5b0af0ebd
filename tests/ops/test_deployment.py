"""What deploy/ and the Dockerfile say fits the server: flags, routes, folders, grace periods."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, cast

import kubernetes_validate
import pytest
import yaml

from loramux_server.api.context import ApiContext
from loramux_server.api.routes.service import service_router
from loramux_server.config import ServeConfig, read_config
from tests.ops.support import DEPLOY, ROOT

MANIFESTS: list[dict[str, Any]] = [
    document
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
DEPLOYMENT = next(one for one in MANIFESTS if one["kind"] == "Deployment")
COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UNIT = (DEPLOY / "systemd" / "loramux.service").read_text()
GRACE = ServeConfig.model_fields["grace"].default
HANG_TIMEOUT = ServeConfig.model_fields["hang_timeout"].default
ROUTES = {getattr(route, "path", "") for route in service_router(cast(ApiContext, None)).routes}


def served(arguments: list[str]) -> ServeConfig:
    """The configuration that a command line of deploy/ means; a flag that does not exist ends the test."""
    assert arguments[0] == "serve"
    return read_config(arguments[1:])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=[one["kind"] for one in MANIFESTS])
def test_kubernetes_knows_every_field(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_kubernetes_asks_routes_that_exist_and_waits_for_the_drain() -> None:
    pod = DEPLOYMENT["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    start, ready, live = (container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe"))
    assert {probe["httpGet"]["path"] for probe in (start, ready, live)} <= ROUTES
    assert start["httpGet"]["path"] == ready["httpGet"]["path"] == "/ready"
    assert live["httpGet"]["path"] == "/health"  # a restarting worker is not a dead front
    # /health is 503 from half of the timeout on; the server ends a worker that hangs before it is ended itself
    assert live["periodSeconds"] * live["failureThreshold"] > HANG_TIMEOUT / 2
    assert pod["terminationGracePeriodSeconds"] > GRACE
    assert "nvidia.com/gpu" in container["resources"]["limits"]
    config = served(container["args"])
    assert config.port == container["ports"][0]["containerPort"]
    assert str(config.data_dir) in {mount["mountPath"] for mount in container["volumeMounts"]}
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    assert DEPLOYMENT["spec"]["strategy"]["type"] == "Recreate"  # one process may have the data directory


def test_compose_mounts_what_is_there_and_starts_all_three() -> None:
    assert {"loramux", "prometheus", "grafana"} == set(COMPOSE["services"])
    for service in COMPOSE["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_dir(), source
            else:
                assert source in COMPOSE["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    server = COMPOSE["services"]["loramux"]
    config = served([word.replace("${MODEL:-demo}", "demo") for word in server["command"]])
    assert (config.host, str(config.data_dir), config.log_format) == ("0.0.0.0", "/data", "json")
    assert int(server["stop_grace_period"].removesuffix("s")) > GRACE
    [asked] = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", server["healthcheck"]["test"][-1])
    assert asked == "/ready"
    assert asked in ROUTES
    assert (DEPLOY / "grafana" / "dashboards" / "loramux.json").is_file()
    overlay = yaml.safe_load((DEPLOY / "docker-compose.gpu.yml").read_text())
    assert set(overlay["services"]) <= set(COMPOSE["services"])


def test_grafana_finds_its_source_and_the_dashboards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((provisioning / "dashboards" / "loramux.yml").read_text())["providers"][0]
    mounts = COMPOSE["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_the_unit_starts_the_server_with_flags_that_exist(tmp_path: Path) -> None:
    command = re.search(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    assert command is not None
    program, *arguments = shlex.split(command[1])
    assert Path(program).name == "loramux"
    (settings := tmp_path / "loramux.toml").write_text('model = "demo"\n')
    replaced = [str(settings) if word.endswith("loramux.toml") else word for word in arguments]
    assert served(replaced).log_format == "json"
    stop = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) > GRACE
    assert "KillMode=mixed" in UNIT


def test_the_image_keeps_data_outside_and_runs_as_nobody_special() -> None:
    lines = DOCKERFILE.splitlines()
    assert "USER 10001:10001" in lines
    assert 'VOLUME ["/data", "/models"]' in lines
    assert 'ENTRYPOINT ["loramux"]' in lines
    [asked] = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", DOCKERFILE.partition("HEALTHCHECK")[2])
    assert asked == "/health"
    assert asked in ROUTES
    variables = dict(re.findall(r"\b(LORAMUX_\w+)=(\S+)", DOCKERFILE))
    assert variables == {"LORAMUX_CACHE_DIR": "/models/loramux", "LORAMUX_DATA_DIR": "/data"}
    assert DEPLOYMENT["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == 10001


def test_what_the_image_copies_reaches_the_build() -> None:
    """.dockerignore keeps everything out but what it lists."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert sorted(copied) == sorted(kept)
    for name in kept:
        assert (ROOT / name).exists(), name
