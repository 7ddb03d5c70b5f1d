"""KubeRay's resources: valid by its own schemas, safe, of the shape that values.yaml says; and what watches a run."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any, NamedTuple

import pytest
import yaml
from jsonschema import Draft7Validator
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from densenet_dist import __version__
from densenet_dist.config import load_config
from densenet_dist.sweep.definition import load_sweep

JOBS = ["rayjob-train", "rayjob-tune", "rayjob-train-elastic", "rayjob-train-kueue"]
SPOT_NODES = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


class Pod(NamedTuple):
    """A pod template: the file and the part of it, and what it says."""

    file: str
    part: str
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: dict[str, Any]
    container: dict[str, Any]


@pytest.fixture
def resources(rendered):
    """The first resource of each file."""
    paths = [path for path in rendered.files if path.startswith("kuberay/")]
    return {path.removeprefix("kuberay/").removesuffix(".yaml"): rendered.documents(path)[0] for path in paths}


@pytest.fixture
def clusters(resources):
    """The cluster that each file asks for."""
    specs = {name: resources[name]["spec"] for name in ("raycluster", *JOBS)}
    return {name: spec.get("rayClusterSpec", spec) for name, spec in specs.items()}


@pytest.fixture
def pods(resources, clusters):
    """All pods, named by the key of values.yaml that has their size."""
    templates = [("shell", "head", resources["shell"])]
    templates.append(("tensorboard", "tensorboard", resources["tensorboard"]["spec"]["template"]))
    for name, cluster in clusters.items():
        (workers,) = cluster["workerGroupSpecs"]
        templates += [(name, "head", cluster["headGroupSpec"]["template"]), (name, "workers", workers["template"])]
    templates += [(name, "submitter", resources[name]["spec"]["submitterPodTemplate"]) for name in JOBS]
    return [
        Pod(file, part, meta["labels"], meta.get("annotations", {}), pod["spec"], *pod["spec"]["containers"])
        for file, part, pod in templates
        for meta in [pod["metadata"]]
    ]


def test_valid_by_kuberays_own_schema(resources, clusters, root):
    folder = root.parent / "shared" / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"KubeRay's schemas are not at {folder}")
    for name in clusters:
        document = resources[name]
        validator = Draft7Validator(json.loads((folder / f"{document['kind'].lower()}.v1.json").read_text()))
        assert [(list(error.path), error.message) for error in validator.iter_errors(document)] == []
        document["spec"]["shutDownAfterJobFinishes"] = True
        assert len(list(validator.iter_errors(document))) == 1  # an unknown field is an error


def test_every_pod_has_the_image_the_size_and_no_privileges(rendered, resources, pods):
    assert rendered.values["image_tag"] == __version__
    assert resources["namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods:
        size, container, security = rendered.values[pod.part], pod.container, pod.spec["securityContext"]
        assert container["image"] == rendered.image
        expected = {"cpu": str(size["cpus"]), "memory": f"{size['memory_gib']}Gi"}
        expected["ephemeral-storage"] = f"{size['disk_gib']}Gi"
        expected |= {"nvidia.com/gpu": str(size["gpus"])} if pod.part == "workers" else {}
        assert container["resources"] == {"requests": expected, "limits": expected}
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        autoscales = (pod.file, pod.part) == ("rayjob-train-elastic", "head")  # by Kubernetes' API
        assert pod.spec["automountServiceAccountToken"] is autoscales
        assert pod.spec.get("serviceAccountName", "") == rendered.values["kubernetes"]["service_account"]
        secrets = [each["name"] for each in pod.spec.get("imagePullSecrets", [])]
        assert secrets == rendered.values["kubernetes"]["image_pull_secrets"]
        nothing = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == nothing
        if pod.part in ("head", "workers"):
            env = {entry["name"]: entry["value"] for entry in container["env"]}
            drain_s = int(env.pop("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 0))
            assert env == rendered.values["env"]
            if pod.part == "workers":
                assert 30 <= drain_s <= pod.spec["terminationGracePeriodSeconds"] - 10  # time to save, then to end


def test_clusters_ask_for_the_token_and_heads_are_never_on_spot_nodes(rendered, clusters, root):
    version = rendered.values["ray_version"]
    assert f"\nray=={version} " in (root / "requirements.lock").read_text()
    for cluster in clusters.values():
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == version
        head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        assert head["rayStartParams"] == {"num-cpus": "0"}  # it trains nothing
        elastic, most = cluster.get("enableInTreeAutoscaling", False), rendered.values["workers"]["count"]
        fewest = rendered.values["kubernetes"]["min_workers"] if elastic else most
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (fewest, fewest, most)
        assert {pod["template"]["spec"].get("restartPolicy") for pod in (head, group)} == {"Never" if elastic else None}
        spec = head["template"]["spec"]
        required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (term,) = required["nodeSelectorTerms"]  # several would be alternatives
        refused = {rule["key"]: rule["values"] for rule in term["matchExpressions"] if rule["operator"] == "NotIn"}
        assert refused == {key: [value] for key, value in SPOT_NODES.items()}
        assert "tolerations" not in spec
        assert "nvidia.com/gpu" in {rule["key"] for rule in group["template"]["spec"]["tolerations"]}


def test_jobs_are_accepted_and_take_their_cluster_along_when_they_end(rendered, resources, root):
    values, workers = rendered.values, rendered.values["workers"]
    for name in JOBS:
        spec = resources[name]["spec"]
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] <= 300
        assert spec["activeDeadlineSeconds"] == values["job"]["deadline_s"] > 0
        assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"  # as a Job's pods must have it
        python, script, command, source, *settings = shlex.split(spec["entrypoint"])
        assert (python, script, command) == ("python", "/app/launch/start.py", name.split("-")[1])
        file = str(root / source.removeprefix("/app/"))
        if command == "tune":
            run = load_sweep(file, *settings).settings
            cpus = run.cpus_per_worker
        else:
            run = load_config(file, *settings)
            cpus = run.cluster.cpus_per_worker
            most = workers["count"] * workers["gpus"]
            fewest = values["kubernetes"]["min_workers"] * workers["gpus"] if "elastic" in name else most
            assert (run.cluster.worker_range, run.data.root) == ((fewest, most), values["data_root"])
            assert set(values["settings"]) <= set(settings)
        assert (run.name, run.storage) == (resources[name]["metadata"]["name"], values["storage"])
        assert cpus * workers["gpus"] < workers["cpus"]  # room for all ranks of a worker, and for Ray itself


def test_storage_is_where_all_nodes_see_it(rendered, resources, pods):
    claim, secret = resources["storage-pvc"], resources["secret-s3.example"]
    for pod in [each for each in pods if each.part in ("head", "workers")]:
        mounts = {mount["name"]: mount["mountPath"] for mount in pod.container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        assert rendered.values["data_root"].startswith(mounts["storage"] + "/")
        if rendered.on_s3:
            assert volumes["storage"] == {"name": "storage", "emptyDir": {}}  # data sets only
            assert pod.container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
        else:
            assert rendered.values["storage"].startswith(mounts["storage"] + "/")
            assert volumes["storage"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
            assert "envFrom" not in pod.container
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {value.removeprefix("https://") for value in secret["stringData"].values()} == {"REPLACE_ME"}


def test_the_queued_job_is_the_same_job_and_fits_its_queue(rendered, resources, pods):
    _, queue, local = rendered.documents("kuberay/kueue-queue.yaml")
    plain, queued = resources["rayjob-train"], resources["rayjob-train-kueue"]
    assert queued["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name") == local["metadata"]["name"]
    assert queued["spec"].pop("suspend") is True
    assert queued == plain
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    needed: Counter[str] = Counter()
    for pod in [each for each in pods if each.file == "rayjob-train-kueue"]:
        count = rendered.values["workers"]["count"] if pod.part == "workers" else 1
        for name, amount in pod.container["resources"]["requests"].items():
            needed[name] += count * int(amount.removesuffix("Gi"))
    (flavor,) = queue["spec"]["resourceGroups"][0]["flavors"]
    assert {each["name"]: int(each["nominalQuota"].removesuffix("Gi")) for each in flavor["resources"]} == needed


def test_only_the_cluster_itself_kuberay_and_prometheus_come_in(rendered, resources, pods):
    spec = resources["networkpolicy"]["spec"]
    selector = spec["podSelector"]
    assert all(selector["matchLabels"].items() <= pod.labels.items() for pod in pods)
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    own, operator, prometheus = spec["ingress"]
    assert own == {"from": [{"podSelector": selector}]}
    assert (operator["ports"][0]["port"], prometheus["ports"][0]["port"]) == (8265, 8080)
    for rule in (operator, prometheus):
        assert [set(each) for each in rule["from"]] == [{"podSelector", "namespaceSelector"}]  # both must hold
    inside, outside, *listed = spec["egress"]
    assert inside == {"to": [{"podSelector": selector}]}
    assert {port["port"] for port in outside["ports"]} == {53, 443, 6443}  # a cloud's metadata service is on 80
    expected = [rule["port"] for rule in rendered.values["kubernetes"]["egress"]]
    assert [rule["ports"][0]["port"] for rule in listed] == expected


def test_the_head_and_training_pods_are_not_moved(rendered, pods):
    budgets = {budget["metadata"]["name"]: budget["spec"] for budget in rendered.documents("kuberay/disruption.yaml")}
    name = rendered.values["name"]
    wanted = {f"{name}-head": 1, f"{name}-workers": rendered.values["workers"]["count"] - 1}
    assert {key: spec["minAvailable"] for key, spec in budgets.items()} == wanted
    for cluster in (pod for pod in pods if pod.part in ("head", "workers") and pod.file in ("raycluster", *JOBS)):
        assert cluster.annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        assert cluster.annotations["karpenter.sh/do-not-disrupt"] == "true"


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
