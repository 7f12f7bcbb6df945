"""Deployment templates: each is filled in, is valid YAML, and agrees with the code and the other files."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from infra.render import render, sizes
from pipelines.console.cli import parse
from pipelines.serving.environment import fast_environment
from pipelines.submit import ENVIRONMENT
from tests.servers import ROOT

INFRA = ROOT / "infra"
TEMPLATES = [*INFRA.glob("kuberay/*.yaml"), *INFRA.glob("aws/*.yaml"), INFRA / "mlflow" / "kubernetes.yaml"]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(render(path)))


def containers(path: Path) -> dict[str, dict[str, Any]]:
    """Every container of a rendered file, by its name."""
    found: dict[str, dict[str, Any]] = {}

    def collect_outputs(value: Any) -> None:
        if isinstance(value, dict):
            found.update({each["name"]: each for each in value.get("containers", [])})
            for each in value.values():
                collect_outputs(each)
        elif isinstance(value, list):
            for each in value:
                collect_outputs(each)

    collect_outputs(documents(path))
    return found


def environment(service: dict[str, Any]) -> set[str]:
    """Names that a container's environment is given."""
    return {each["name"] for each in service.get("env", [])}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_is_filled_and_is_yaml(path: Path) -> None:
    assert all(documents(path))
    assert "${" not in render(path)


def test_every_size_is_used_and_the_environment_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {name for path in TEMPLATES for name in re.findall(r"\$\{(\w+)\}", path.read_text())}
    assert used == set(sizes())
    monkeypatch.setenv("WORKERS_MAX", "17")
    (cluster,) = documents(INFRA / "kuberay" / "cluster.yaml")
    assert cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"] == 17
    assert documents(INFRA / "aws" / "cluster.yaml")[0]["max_workers"] == 17


def test_an_unknown_name_and_a_missing_template_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: ${NOTHING}")
    for path, said in ((tmp_path / "a.yaml", "has ${NOTHING}, which sizes.env has not"), (tmp_path / "b.yaml", "cannot be read")):
        done = subprocess.run([sys.executable, "-m", "infra.render", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_launchers_schema_takes_the_aws_cluster() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    (cluster,) = documents(INFRA / "aws" / "cluster.yaml")
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert cluster["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    shared = sizes()["SHARED"]
    assert f"--volume {shared}:{shared}" in cluster["docker"]["run_options"] and "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]


def test_the_ray_cluster_has_our_ray_its_ports_and_the_shared_folder() -> None:
    (cluster,) = documents(INFRA / "kuberay" / "cluster.yaml")
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert cluster["spec"]["rayVersion"] == pinned["ray"] and cluster["spec"]["authOptions"] == {"mode": "token"}
    found = containers(INFRA / "kuberay" / "cluster.yaml")
    exposed = set(map(int, re.search(r"EXPOSE (.*)", (INFRA / "Dockerfile").read_text()).group(1).split()))  # type: ignore[union-attr]
    assert {each["containerPort"] for each in found["ray-head"]["ports"]} <= exposed
    (claim,) = documents(INFRA / "kuberay" / "storage.yaml")
    for pod in (cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"][0]):
        claims = [each["persistentVolumeClaim"]["claimName"] for each in pod["template"]["spec"]["volumes"] if "persistentVolumeClaim" in each]
        assert claims == [claim["metadata"]["name"]]
    for each in found.values():
        assert {"name": "shared", "mountPath": sizes()["SHARED"]} in each["volumeMounts"]
        assert each["envFrom"] == [{"secretRef": {"name": "hashbridge-tracking"}}]


def test_the_job_runs_a_command_that_there_is() -> None:
    (job,) = documents(INFRA / "kuberay" / "job.yaml")
    (cluster,) = documents(INFRA / "kuberay" / "cluster.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    start, _, command = job["spec"]["entrypoint"].partition(" pipelines ")
    name, config, _ = parse(command.split())
    assert start == "python -m" and name == "tune" and config.gpu and config.dataset.startswith(sizes()["SHARED"])


def test_the_service_is_built_from_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    from pipelines.serving.application import Settings, build
    from tests.pipelines.serving.service import make_index, rows

    (service,) = documents(INFRA / "kuberay" / "service.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}" and config.http_options.host == "0.0.0.0"
    given = application.args | {"index": str(tmp_path / "i")}
    assert Settings(**given).most == int(sizes()["SERVE_MAX"]) and given["storage"].startswith(sizes()["SHARED"])
    make_index(tmp_path / "i", rows(20), 2)
    monkeypatch.delenv("HASHBRIDGE_TOKEN", raising=False)
    with pytest.raises(ValueError, match="a token is needed"):
        build(given)
    monkeypatch.setenv("HASHBRIDGE_TOKEN", "0123456789abcdef")
    build(given)
    for wrong, said in (({"indx": "x"}, "no setting 'indx'"), ({"index": ""}, "setting index is missing"), ({"index": str(tmp_path)}, "no index at")):
        with pytest.raises(ValueError, match=said):
            build(given | wrong)
    (cluster,) = documents(INFRA / "kuberay" / "cluster.yaml")
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == cluster["spec"]["rayVersion"]
    for each in containers(INFRA / "kuberay" / "service.yaml").values():
        assert {"secretRef": {"name": "hashbridge-token"}} in each["envFrom"] and environment(each) <= set(fast_environment(""))


def test_compose_and_kubernetes_give_the_tracking_server_the_same() -> None:
    compose = yaml.safe_load((INFRA / "mlflow" / "compose.yaml").read_text())
    pods = containers(INFRA / "mlflow" / "kubernetes.yaml")
    server, database = compose["services"]["server"], compose["services"]["database"]
    given = set(server["environment"]) - {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL"}  # in Kubernetes, the secret's
    assert environment(pods["server"]) == given | {"MLFLOW_SERVER_ALLOWED_HOSTS"}
    assert server["command"] == pods["server"]["command"] and set(database["environment"]) <= environment(pods["database"])
    assert database["image"] == pods["database"]["image"] and server["image"] == f"${{IMAGE:-{sizes()['IMAGE']}}}"
    assert not any("PASSWORD" in part for part in server["command"])  # nothing secret in a command line
    auth = configparser.ConfigParser()
    auth.read(INFRA / "mlflow" / "auth.ini")
    mounts = {each["mountPath"] for each in pods["server"]["volumeMounts"]}
    assert str(Path(auth["mlflow"]["database_uri"].removeprefix("sqlite:///")).parent) in mounts


def test_the_image_has_every_package_and_the_jobs_environment_no_secret() -> None:
    copied = set(re.findall(r"^COPY (\w+) \w+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE))
    assert copied == {"data", "models", "pipelines", "tuning", "infra"}
    given = yaml.safe_load((ROOT / ENVIRONMENT).read_text())
    assert set(given) == {"env_vars"} and not [name for name in given["env_vars"] if re.search("TOKEN|PASSWORD|KEY|SECRET", name)]


def test_every_row_of_the_failures_names_a_test_that_there_is() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    rows = [line for line in text[text.index("## Failures") : text.index("## Sizing")].splitlines() if line.startswith("| ")][1:]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / "pipelines").rglob("test_*.py"))
    names = [re.findall(r"`(\w+)`", row.split("|")[-2])[-1] for row in rows]
    assert len(names) == 17 and all(re.search(rf"def test_\w*{name}\w*\(", tests) for name in names)
