"""The files in cluster/, each against the schema or the checker of who reads it."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray._private.runtime_env import packaging
from ray.autoscaler._private.util import prepare_config, validate_config

from cosmos_ray.commands import cli
from cosmos_ray.inference import metrics
from jobs.submit import refusal, sizes
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
REQUIRED = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)


def load(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


# ------------------------------------------------------------ ray up


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "onpremises.yaml"])
def test_ray_up_takes(name):
    config = load(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    commands = [*config["setup_commands"], *config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for script in {path for command in commands for path in re.findall(r"/opt/cosmos_ray/(cluster/\S+)", command)}:
        assert (ROOT / script).exists()
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepare_config(copy.deepcopy(config)), "worker_types": {}})


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_simulators_are_on_spot_and_the_learner_is_not(name):
    types = load(name)["available_node_types"]
    spot = {kind for kind, type_ in types.items() if "spot" in str(type_["node_config"]) or "preemptible" in str(type_["node_config"])}
    assert spot == {"simulators"} and load(name)["head_node_type"] == "learner"
    assert {type_["labels"]["role"] for type_ in types.values()} == set(types)
    assert load(name)["max_workers"] == types["simulators"]["max_workers"] == 7


# ------------------------------------------------------------ KubeRay


@pytest.fixture(scope="module")
def crds():
    """Schemas of KubeRay's kinds, without room for fields that they do not name: the API server would refuse or drop those."""
    read = json.loads(gzip.decompress((ROOT / "tests" / "data" / "kuberay.json.gz").read_bytes()))
    return {kind: strict(read[kind]) for kind in ("RayCluster", "RayJob")}


def strict(schema: dict) -> dict:
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    named = schema.get("properties")
    closed = {} if not isinstance(named, dict) or "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields") \
        else {"additionalProperties": False}
    return {**{key: strict(value) for key, value in schema.items()}, **closed}


@pytest.mark.parametrize("name", ["kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_kuberay_takes(name, crds):
    document = load(name)
    # The metadata has a schema of its own in Kubernetes, and the CRD says no more than "object".
    assert set(document["metadata"]) in ({"name"}, {"generateName"})
    schema = copy.deepcopy(crds[document["kind"]])
    schema["properties"]["metadata"] = {"type": "object"}
    check = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in check.iter_errors(document)] == []
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resource"] = {}
    assert not check.is_valid(document)
    assert spec["rayVersion"] == REQUIRED["ray[default]"]


def test_the_rayjob_has_the_groups_of_the_raycluster_and_a_command_that_parses():
    cluster, job = load("kuberay-cluster.yaml")["spec"], load("kuberay-job.yaml")["spec"]
    assert job["rayClusterSpec"] == cluster
    _, script, *flags = job["entrypoint"].split()
    assert (ROOT / Path(script).relative_to("/opt/cosmos_ray")).exists()
    cli._parse([Path(script).stem, *flags])


# ------------------------------------------------------------ scripts and the image


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not shellcheck:
        pytest.skip("no shellcheck: `make setup-dev` installs it")
    done = subprocess.run([shellcheck, CLUSTER / "setup.sh", CLUSTER / "slurm.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_there_is_and_the_build_sees_it():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    seen = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) == seen and all((ROOT / source).exists() for source in sources)
    before = (CLUSTER / "Dockerfile").read_text().split("setup.sh .venv")[0]
    assert "COPY requirements.txt pyproject.toml ./" in before and "COPY cosmos_ray cosmos_ray" in before  # what setup.sh reads


# ------------------------------------------------------------ metrics


def test_the_charts_show_series_that_exist():
    text = (CLUSTER / "grafana.json").read_text()
    shown = set(re.findall(r"ray_cosmos_ray_inference_(\w+?)(?:_total|_bucket)?\b", text))
    assert shown == set(re.findall(r'named\(\w+, "(\w+)"', Path(metrics.__file__).read_text()))
    boxes = [tuple(panel["gridPos"][key] for key in "xy") for panel in json.loads(text)["panels"]]
    assert len(set(boxes)) == len(boxes)


def test_prometheus_files_name_where_nodes_are_found():
    here, = load("prometheus.yml")["scrape_configs"]
    there, = load("kuberay-prometheus.yml")["scrape_configs"]
    assert here["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    assert there["kubernetes_sd_configs"][0]["selectors"][0]["label"] == "ray.io/is-ray-node=yes"


# ------------------------------------------------------------ the working directory of a job


def test_a_job_takes_the_code_and_no_data(tmp_path):
    for folder in ("cosmos_ray/config", "jobs", "runs/lift", "my data", ".venv/lib"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file.py").write_text("x")
    for file in ("demos.hdf5", "study.toml", "notes.txt"):
        (tmp_path / file).write_text("x")
    shutil.copy(ROOT / ".rayignore", tmp_path)
    assert set(sizes(tmp_path)) == {"cosmos_ray/config", "jobs/file.py", "study.toml"}
    assert sum(sizes(ROOT).values()) < 10 << 20 < packaging.GCS_STORAGE_MAX_SIZE


def test_a_working_directory_over_rays_limit_is_refused_with_the_lines_to_add(tmp_path):
    (tmp_path / "cosmos_ray" / "videos").mkdir(parents=True)
    (tmp_path / "cosmos_ray" / "videos" / "a.bin").write_bytes(bytes(3 << 20))
    (tmp_path / "weights.bin").write_bytes(bytes(2 << 20))
    (tmp_path / "small.py").write_text("x")
    assert refusal(tmp_path, 6 << 20) == ""
    said = refusal(tmp_path, 4 << 20)
    assert said.startswith(f"the working directory {tmp_path} has 5 MB, and Ray takes less than 4 MB: add these to {tmp_path}/.rayignore")
    assert said.endswith(", and keep data below --root: /cosmos_ray/videos (3 MB), /weights.bin (2 MB)")
    (tmp_path / ".rayignore").write_text("/cosmos_ray/videos\n/weights.bin\n")
    assert refusal(tmp_path, 4 << 20) == ""


def test_a_run_that_would_go_with_its_job_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(cli.JOB, "{}")
    assert cli.main(["collect", "--name", "lift", "--root", "runs"]) == 2
    assert "--root runs lies in the folder of this Ray job, which goes with the job: give a folder" in capsys.readouterr().err
