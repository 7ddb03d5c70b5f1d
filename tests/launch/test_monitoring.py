"""What watches a run: Prometheus' discovery, Grafana's dashboard, TensorBoard; and who can reach their ports."""

from __future__ import annotations

import re

import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE


def test_tensorboard_reads_where_runs_are_written_and_its_service_finds_it(rendered):
    deployment, service = rendered.documents("kuberay/tensorboard.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["args"][:3] == ["tensorboard", "--logdir", rendered.values["storage"]]
    assert container["volumeMounts"][0]["readOnly"] is True
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


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


def test_nothing_listens_on_all_addresses(rendered):
    wide = [path for path, text in rendered.files.items() if re.search(r"\b0\.0\.0\.0|\[::\]|bind_all", text)]
    assert wide == ["kuberay/tensorboard.yaml"]  # guarded by the network policy
    for path in ("local.sh", "ray_up/aws.yaml", "ray_up/gcp.yaml", "ray_up/local.yaml"):
        (host,) = re.findall(r"--dashboard-host=(\S+)", rendered.files[path])
        assert host in {"127.0.0.1", "localhost"}, path
    assert "--node-ip-address=127.0.0.1 " in rendered.files["local.sh"]  # and so all the rest of Ray's ports
    assert not re.search("NodePort|LoadBalancer|kind: Ingress", "".join(rendered.files.values()))
