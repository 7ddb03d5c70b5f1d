"""What watches a run: Prometheus' discovery, Grafana's dashboard, TensorBoard; and who can reach all their ports."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import fs
from tensorboard import program
from torch.utils.tensorboard import SummaryWriter

# TensorBoard's own copy of html5lib deprecates itself when it is imported.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:tensorboard\..*")
METRICS_PORT = 8080  # KubeRay starts Ray with it
LOOPBACK = {"127.0.0.1", "localhost"}


@pytest.fixture
def tensorboard(documents: Callable[[str], list[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Deployment and the Service."""
    deployment, service = documents("kuberay/tensorboard.yaml")
    assert (deployment["apiVersion"], deployment["kind"]) == ("apps/v1", "Deployment")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    return deployment, service


@pytest.fixture(scope="session")
def dashboard(root: Path) -> dict[str, Any]:
    return json.loads((root / "launch" / "monitoring" / "grafana-dashboard.json").read_text())


def container_of(deployment: dict[str, Any]) -> dict[str, Any]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


def options(arguments: list[str]) -> Any:
    """What TensorBoard makes of its command line."""
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", *arguments])
    return board.flags


def test_tensorboard_reads_where_runs_are_written(variant, tensorboard, documents):
    (cluster,) = documents("kuberay/raycluster.yaml")
    worker = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod, container = tensorboard[0]["spec"]["template"]["spec"], container_of(tensorboard[0])
    assert options(container["args"][1:]).logdir == variant["storage"]
    assert [volume for volume in worker["volumes"] if volume["name"] == "storage"] == pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert mount == {"name": "storage", "mountPath": variant["mount"], "readOnly": True}
    if variant["storage"].startswith("s3://"):
        secret = f"{variant['name']}-s3"
        assert container["envFrom"] == [{"secretRef": {"name": secret}}]
        (region,) = container["env"]
        source = {"name": secret, "key": "AWS_REGION", "optional": True}
        assert region == {"name": "AWS_DEFAULT_REGION", "valueFrom": {"secretKeyRef": source}}
    else:
        assert not {"env", "envFrom"} & set(container)


def test_tensorboard_is_the_same_image_and_of_the_size_that_is_given(variant, tensorboard, documents):
    (shell,) = documents("kuberay/shell.yaml")
    container, size = container_of(tensorboard[0]), variant["tensorboard"]
    assert container["image"] == shell["spec"]["containers"][0]["image"]
    assert container["resources"]["limits"] == {"cpu": str(size["cpus"]), "memory": f"{size['memory_gib']}Gi"}
    assert container["args"][0] == "tensorboard"


def test_the_service_finds_tensorboard_and_nothing_else(tensorboard, documents):
    deployment, service = tensorboard
    labels, container = deployment["spec"]["template"]["metadata"]["labels"], container_of(deployment)
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    (cluster,) = documents("kuberay/raycluster.yaml")
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        assert not service["spec"]["selector"].items() <= group["template"]["metadata"]["labels"].items()
    (port,), (listening,) = service["spec"]["ports"], container["ports"]
    assert port["targetPort"] == listening["name"] == container["readinessProbe"]["httpGet"]["port"]
    assert port["port"] == listening["containerPort"] == options(container["args"][1:]).port
    assert service["spec"]["type"] == "ClusterIP"
    (policy,) = documents("kuberay/networkpolicy.yaml")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_monitor_scrapes_head_and_workers_alone(variant, documents):
    (monitor,) = documents("kuberay/podmonitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == variant["prometheus"]["release"]
    assert set(monitor["spec"]) == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    selector = monitor["spec"]["selector"]
    assert selector["matchExpressions"] == [
        {"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}  # not the submitter, TensorBoard
    ]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for path in ("raycluster", "rayjob-train", "rayjob-tune", "rayjob-train-kueue"):
        (document,) = documents(f"kuberay/{path}.yaml")
        cluster = document["spec"].get("rayClusterSpec", document["spec"])
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            template = group["template"]
            assert selector["matchLabels"].items() <= template["metadata"]["labels"].items()
            ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
            assert ports[endpoint["port"]] == METRICS_PORT
            assert "metrics-export-port" not in group["rayStartParams"]


def test_panels_are_whole_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0


def test_every_query_goes_to_the_chosen_source_and_knows_its_variables(dashboard):
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in (panel for panel in dashboard["panels"] if panel["type"] != "row"):
        assert panel["datasource"] == chosen
        for target in panel["targets"]:
            assert target["datasource"] == chosen
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used == ({"run", "trial"} if "ray_densenet_" in target["expr"] else set())
            assert target["expr"].count("(") == target["expr"].count(")")
    assert {"datasource", "run", "trial"} == set(variables)
    for name in ("run", "trial"):
        assert variables[name]["datasource"] == chosen
        assert variables[name]["includeAll"]
        assert variables[name]["allValue"] == ".*"  # an ordinary run has no trial


def test_prometheus_reads_its_configuration(root):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    file = root / "launch" / "monitoring" / "prometheus.yml"
    done = subprocess.run([promtool, "check", "config", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_looks_where_ray_lists_its_nodes(root):
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((root / "launch" / "monitoring" / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape["file_sd_configs"]
    assert discovery["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def commands(root: Path) -> list[list[str]]:
    """Every command in the launchers' and the monitoring page, as words."""
    text = "".join((root / path).read_text() for path in ("launch/README.md", "docs/monitoring.md"))
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line.removesuffix(" &"), comments=True) for block in blocks for line in block.splitlines()]


def test_commands_to_watch_with_bind_to_loopback(root):
    seen = set()
    for words in filter(None, commands(root)):
        seen.add(words[0])
        if words[0] == "tensorboard":
            flags = options(words[1:])
            assert not flags.bind_all
            assert flags.host is None or flags.host in LOOPBACK  # None is localhost
        elif words[0] == "prometheus":
            (address,) = [word.partition("=")[2] for word in words if word.startswith("--web.listen-address")]
            assert address.partition(":")[0] in LOOPBACK
        elif words[0] == "ssh":
            for tunnel in (words[index + 1] for index, word in enumerate(words) if word == "-L"):
                assert tunnel.partition(":")[0] in LOOPBACK
        assert "--address=0.0.0.0" not in words  # kubectl port-forward
        assert "--bind_all" not in words
    assert seen >= {"tensorboard", "prometheus", "ssh", "kubectl"}


def test_nothing_that_is_started_outside_of_a_pod_binds_to_all_addresses(files):
    wide = [path for path, text in files.items() if re.search(r"0\.0\.0\.0|\[::\]|bind_all", text)]
    assert wide == ["kuberay/tensorboard.yaml"]  # guarded by the network policy
    for path in ("local.sh", "ray_up/aws.yaml", "ray_up/gcp.yaml", "ray_up/local.yaml"):
        (host,) = re.findall(r"--dashboard-host=(\S+)", files[path])
        assert host in LOOPBACK, path
    assert "--node-ip-address=127.0.0.1 " in files["local.sh"]  # and so all the rest of Ray's ports
    services = [line for path, text in files.items() for line in text.splitlines() if "NodePort" in line + path]
    assert services == []
    assert not [path for path, text in files.items() if "kind: Ingress" in text or "LoadBalancer" in text]


@pytest.mark.slow
def test_tensorboard_follows_runs_on_an_object_store(s3, s3_port, tmp_path):
    """Read through boto3, which no one has told of the store but the environment; a file that grows is read on."""
    filesystem, place = fs.FileSystem.from_uri(s3 % "/watched/run/tb")
    writer = SummaryWriter(str(tmp_path))
    with TensorBoardProcess("s3://bucket/watched", f"http://127.0.0.1:{s3_port}") as board:
        for step in (1, 2):
            writer.add_scalar("train/loss", 1 / step, step)
            writer.flush()
            fs.copy_files(str(tmp_path), place, destination_filesystem=filesystem)
            assert board.scalars("run/tb", "train/loss", step) == [(each, 1 / each) for each in range(1, step + 1)]
    writer.close()


class TensorBoardProcess:
    """A TensorBoard of its own on loopback, looking every second."""

    def __init__(self, logdir: str, endpoint: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        binary = Path(sys.executable).parent / "tensorboard"
        command = [binary, "--logdir", logdir, "--port", str(self._port), "--reload_interval", "1"]
        environment = os.environ | {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    def __enter__(self) -> TensorBoardProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def scalars(self, run: str, tag: str, number: int) -> list[tuple[int, float]]:
        """Steps and values, once there are so many."""
        query = urllib.parse.urlencode({"run": run, "tag": tag})
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{self._port}/data/plugin/scalars/scalars?{query}"
                ) as answer:
                    found = [(step, value) for _, step, value in json.load(answer)]
            except (urllib.error.URLError, ConnectionError):
                found = []
            if len(found) >= number:
                return found
            assert time.monotonic() < deadline, found
            assert self._process.poll() is None
            time.sleep(0.2)
