"""The image and the Kubernetes objects of the HTTP server say what the server knows."""

import json
import re
import tomllib

import pytest
import yaml
from support.project import ROOT

from clip_deploy.__main__ import parsers
from clip_deploy.web.app import create_app
from clip_deploy.web.metrics import Metrics
from clip_deploy.web.settings import Settings

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
OBJECTS = {each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


def words(instruction):
    return json.loads(re.search(rf"^{instruction} (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])


def test_the_image_holds_what_it_copies_and_nothing_is_kept_from_it():
    sources = [word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert sorted(f"!{source}" for source in sources) == sorted(line for line in ignored if line.startswith("!"))
    assert all((ROOT / source).exists() for source in sources if not source.startswith("artifacts"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(sources)  # setuptools asks for them


@pytest.mark.parametrize("given", [words("CMD"), CONTAINER["args"]])
def test_the_server_takes_the_options_that_it_is_started_with(given):
    program, command, *options = words("ENTRYPOINT")
    _, commands = parsers(command)
    found = commands[command].parse_args([*options, *given])
    assert (program, found.packages, found.host) == ("clip-deploy", ["package"], "0.0.0.0")
    assert str(found.api_key_file) == "/run/secrets/clip/keys"
    assert found.port == CONTAINER["ports"][0]["containerPort"]
    assert POD["terminationGracePeriodSeconds"] > found.drain_s + found.timeout_s


def test_probes_and_metrics_are_those_that_the_server_has(package):
    app = create_app(Settings(packages=(str(package),)))
    paths = {route.path for route in app.routes}
    probes = [CONTAINER[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    scraped = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]
    assert {*probes, scraped} <= paths
    metric = OBJECTS["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric in {family.name for family in Metrics().registry.collect()}


def test_the_guide_lists_the_servers_metrics():
    listed = re.findall(r"^\| `(clip_\w+)` \|", (ROOT / "docs/guides/serve.md").read_text(), re.MULTILINE)
    families = [family for family in Metrics().registry.collect() if not family.name.endswith("_created")]
    assert listed == [f"{family.name}_total" if family.type == "counter" else family.name for family in families]


def test_the_objects_are_about_the_same_pods():
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels == OBJECTS["Service"]["spec"]["selector"]
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", OBJECTS["Deployment"]["metadata"]["name"])
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}


@pytest.mark.parametrize("version", ["1.32", "1.37"])
def test_kubernetes_accepts_the_objects(version):
    schemas = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for each in OBJECTS.values():
        schemas.validate(each, version, strict=True)
