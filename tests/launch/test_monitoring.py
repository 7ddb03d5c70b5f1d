"""What watches a run: Prometheus' discovery, Grafana's dashboard, TensorBoard; and who can reach their ports."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from pyarrow import fs
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from tensorboard import program
from torch.utils.tensorboard import SummaryWriter

# TensorBoard's own copy of html5lib deprecates itself when it is imported.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:tensorboard\..*")
LOOPBACK = {"127.0.0.1", "localhost"}


def options(arguments):
    """TensorBoard's own parsing of its command line."""
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", *arguments])
    return board.flags


def test_tensorboard_reads_where_runs_are_written_and_its_service_finds_it(rendered):
    deployment, service = rendered.documents("kuberay/tensorboard.yaml")
    (cluster,) = rendered.documents("kuberay/raycluster.yaml")
    worker = cluster["spec"]["workerGroupSpecs"][0]["template"]
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    flags = options(container["args"][1:])
    assert container["image"] == rendered.image
    assert flags.logdir == rendered.values["storage"]
    assert template["spec"]["volumes"] == [each for each in worker["spec"]["volumes"] if each["name"] == "storage"]
    mount = {"name": "storage", "mountPath": rendered.values["mount"], "readOnly": True}
    assert container["volumeMounts"] == [mount]
    assert ("envFrom" in container) is rendered.on_s3
    if rendered.on_s3:
        source = {"name": f"{rendered.values['name']}-s3", "key": "AWS_REGION", "optional": True}
        assert container["env"] == [{"name": "AWS_DEFAULT_REGION", "valueFrom": {"secretKeyRef": source}}]
    labels, selector = template["metadata"]["labels"], service["spec"]["selector"]
    assert deployment["spec"]["selector"]["matchLabels"] == selector == labels
    assert not selector.items() <= worker["metadata"]["labels"].items()
    (port,), (listening,) = service["spec"]["ports"], container["ports"]
    assert port["targetPort"] == listening["name"] == container["readinessProbe"]["httpGet"]["port"]
    assert port["port"] == listening["containerPort"] == flags.port
    assert service["spec"]["type"] == "ClusterIP"


def test_prometheus_finds_the_nodes(rendered, root):
    (monitor,) = rendered.documents("kuberay/podmonitor.yaml")
    assert monitor["metadata"]["labels"]["release"] == rendered.values["prometheus"]["release"]
    selector, (endpoint,) = monitor["spec"]["selector"], monitor["spec"]["podMetricsEndpoints"]
    assert selector["matchExpressions"] == [
        {"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}  # not the submitter, TensorBoard
    ]
    (cluster,) = rendered.documents("kuberay/raycluster.yaml")
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        assert selector["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert {"name": endpoint["port"], "containerPort": 8080} in ports  # KubeRay starts Ray with it
    config = yaml.safe_load((root / "launch" / "monitoring" / "prometheus.yml").read_text())
    (discovery,) = config["scrape_configs"][0]["file_sd_configs"]
    assert discovery["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_the_dashboard_asks_the_chosen_source_for_the_chosen_runs(root):
    dashboard = json.loads((root / "launch" / "monitoring" / "grafana-dashboard.json").read_text())
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "run", "trial"}
    assert all(variables[name]["allValue"] == ".*" for name in ("run", "trial"))  # an ordinary run has no trial
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 10
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            assert panel["datasource"] == target["datasource"] == chosen
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used == ({"run", "trial"} if "ray_densenet_" in target["expr"] else set())
            assert target["expr"].count("(") == target["expr"].count(")")


def test_nothing_listens_on_all_addresses(rendered):
    wide = [path for path, text in rendered.files.items() if re.search(r"0\.0\.0\.0|\[::\]|bind_all", text)]
    assert wide == ["kuberay/tensorboard.yaml"]  # guarded by the network policy
    for path in ("local.sh", "ray_up/aws.yaml", "ray_up/gcp.yaml", "ray_up/local.yaml"):
        (host,) = re.findall(r"--dashboard-host=(\S+)", rendered.files[path])
        assert host in LOOPBACK, path
    assert "--node-ip-address=127.0.0.1 " in rendered.files["local.sh"]  # and so all the rest of Ray's ports
    assert not re.search("NodePort|LoadBalancer|kind: Ingress", "".join(rendered.files.values()))


def test_tensorboard_reads_runs_on_an_object_store(s3, s3_port, tmp_path, monkeypatch):
    """Through boto3, which knows the store from the environment only; a file that grows is read on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    filesystem, place = fs.FileSystem.from_uri(s3 % "/watched/run/tb")
    with SummaryWriter(str(tmp_path)) as writer:
        reader = None
        for step in (1, 2):
            writer.add_scalar("train/loss", 1 / step, step)
            writer.flush()
            fs.copy_files(str(tmp_path), place, destination_filesystem=filesystem)
            reader = reader or EventAccumulator("s3://bucket/watched/run/tb")
            scalars = reader.Reload().Scalars("train/loss")
            assert [(each.step, each.value) for each in scalars] == [(each, 1 / each) for each in range(1, step + 1)]
