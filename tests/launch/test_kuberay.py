"""KubeRay's resources: valid by KubeRay's own schemas, and as they ought to be."""

from __future__ import annotations

import copy
import json
import shlex

import pytest
from jsonschema import Draft7Validator
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

from densenet_dist import __version__
from densenet_dist.config import load_config
from densenet_dist.sweep.definition import load_sweep

JOBS = ["rayjob-train", "rayjob-tune", "rayjob-train-kueue"]
CLUSTERS = ["raycluster", *JOBS]
METRICS_PORT = 8080  # KubeRay starts Ray with it
SPOT_NODES = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


@pytest.fixture
def resource(documents):
    """The one resource of a file of the variant."""

    def read(name):
        (document,) = documents(f"kuberay/{name}.yaml")
        return document

    return read


@pytest.fixture
def cluster(resource):
    """The cluster that a file asks for."""

    def read(name):
        spec = resource(name)["spec"]
        return spec if name == "raycluster" else spec["rayClusterSpec"]

    return read


@pytest.fixture(scope="session")
def schema(root):
    folder = root.parent / "shared" / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"KubeRay's schemas are not at {folder}")
    return lambda kind: Draft7Validator(json.loads((folder / f"{kind.lower()}.v1.json").read_text()))


def pods(spec):
    """The pod templates of head, workers, and of a job's submitter."""
    cluster = spec.get("rayClusterSpec", spec)
    templates = {"head": cluster["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in spec:
        templates["submitter"] = spec["submitterPodTemplate"]
    return templates


def gib(quantity):
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


def entrypoint(job):
    """What the job starts: the script's path, the command, the file in the image, and its settings."""
    python, script, command, source, *settings = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    return script, command, source, settings


@pytest.mark.parametrize("name", CLUSTERS)
def test_valid_by_kuberays_own_schema(resource, schema, name):
    document = resource(name)
    assert document["apiVersion"] == "ray.io/v1"
    validator = schema(document["kind"])
    assert [(list(error.path), error.message) for error in validator.iter_errors(document)] == []
    document["spec"]["shutDownAfterJobFinishes"] = True
    assert len(list(validator.iter_errors(document))) == 1  # an unknown field is an error


@pytest.mark.parametrize("name", CLUSTERS)
def test_versions_are_pinned(variant, resource, cluster, locked, root, name):
    assert cluster(name)["rayVersion"] == locked("ray") == variant["ray_version"]
    digest = variant["image_digest"]
    expected = f"{variant['image']}:{__version__}" + (f"@{digest}" if digest else "")
    images = {
        container["image"] for pod in pods(resource(name)["spec"]).values() for container in pod["spec"]["containers"]
    }
    assert images == {expected}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_token_is_asked_for(cluster, name):
    assert cluster(name)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_does_no_work_and_is_never_on_a_spot_node(cluster, name):
    head = cluster(name)["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    spec = head["template"]["spec"]
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]  # several would be alternatives
    refused = {rule["key"]: rule["values"] for rule in term["matchExpressions"] if rule["operator"] == "NotIn"}
    assert refused == {key: [value] for key, value in SPOT_NODES.items()}
    assert "tolerations" not in spec  # nor on a GPU node, where these are tainted


@pytest.mark.parametrize("name", CLUSTERS)
def test_workers_go_where_gpus_and_spot_nodes_are(cluster, name):
    (group,) = cluster(name)["workerGroupSpecs"]
    tolerated = {rule["key"]: rule for rule in group["template"]["spec"]["tolerations"]}
    assert tolerated.pop("nvidia.com/gpu") == {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert {key: rule["value"] for key, rule in tolerated.items()}.items() <= SPOT_NODES.items()
    assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= set(tolerated)
    assert "affinity" not in group["template"]["spec"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_resources_are_those_of_the_shape(variant, resource, cluster, name):
    for part, pod in pods(resource(name)["spec"]).items():
        asked = variant["workers" if part == "gpu" else part]
        (container,) = pod["spec"]["containers"]
        expected = {"cpu": str(asked["cpus"]), "memory": f"{asked['memory_gib']}Gi"}
        expected |= {"nvidia.com/gpu": str(asked["gpus"])} if part == "gpu" else {}
        assert container["resources"] == {"requests": expected, "limits": expected}
    (group,) = cluster(name)["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == variant["workers"]["count"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_shared_memory_is_sized_from_memory(cluster, name):
    for part, pod in pods(cluster(name)).items():
        (container,) = pod["spec"]["containers"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        share = gib(volume["emptyDir"]["sizeLimit"]) / gib(container["resources"]["limits"]["memory"])
        # Ray's object store must fit, and the rest of the process as well.
        assert DEFAULT_OBJECT_STORE_MEMORY_PROPORTION < share <= 0.5, part


@pytest.mark.parametrize("name", [*CLUSTERS, "shell", "tensorboard"])
def test_no_pod_is_root_or_can_become_it(documents, name):
    first = documents(f"kuberay/{name}.yaml")[0]
    alone = {"shell": lambda: first, "tensorboard": lambda: first["spec"]["template"]}
    for pod in [alone[name]()] if name in alone else pods(first["spec"]).values():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_namespace_admits_nothing_else(variant, resource):
    metadata = resource("namespace")["metadata"]
    assert metadata["name"] == variant["namespace"]
    assert metadata["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_and_takes_its_cluster_along(variant, resource, name):
    spec = resource(name)["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == variant["job"]["ttl_s"] <= 300
    assert spec["activeDeadlineSeconds"] == variant["job"]["deadline_s"] > 0
    assert spec["backoffLimit"] == variant["job"]["retries"]
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"  # as a Job's pods must have it


@pytest.mark.parametrize("name", JOBS)
def test_the_job_is_one_that_densenet_dist_accepts(variant, resource, root, name):
    script, command, source, settings = entrypoint(resource(name))
    assert (script, command) == ("/app/launch/start.py", "tune" if "tune" in name else "train")
    file = str(root / source.removeprefix("/app/"))
    workers = variant["workers"]
    if command == "tune":
        sweep = load_sweep(file, *settings)
        assert sweep.settings.storage == variant["storage"]
        assert sweep.base["data"]["root"] == variant["data_root"]
        assert sweep.settings.gpus_per_worker == 1
        cpus, name_of_run = sweep.settings.cpus_per_worker, sweep.settings.name
    else:
        config = load_config(file, *settings)
        assert (config.storage, config.data.root) == (variant["storage"], variant["data_root"])
        assert config.cluster.workers == workers["count"] * workers["gpus"]
        assert config.cluster.device == "cuda"
        cpus, name_of_run = config.cluster.cpus_per_worker, config.name
        assert [text for text in variant["settings"] if text not in settings] == []
    assert name_of_run == resource(name)["metadata"]["name"]
    assert cpus * workers["gpus"] < workers["cpus"]  # room for all ranks of a worker, and for Ray itself


@pytest.mark.parametrize("name", [*CLUSTERS, "shell"])
def test_storage_is_where_all_nodes_see_it(variant, resource, name):
    document = resource(name)
    templates = {"shell": document} if name == "shell" else pods(document["spec"])
    claim, secret = resource("storage-pvc"), resource("secret-s3.example")
    for part, pod in templates.items():
        if part == "submitter":
            continue
        (container,) = pod["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert variant["data_root"].startswith(mounts["storage"] + "/")
        if variant["storage"].startswith("s3://"):
            assert volumes["storage"] == {"name": "storage", "emptyDir": {}}  # data sets only
            assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
        else:
            assert variant["storage"].startswith(mounts["storage"] + "/")
            assert volumes["storage"]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
            assert "envFrom" not in container
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["storageClassName"] == variant["volume"]["storage_class"]


def test_credentials_are_nowhere(files, resource):
    secret = resource("secret-s3.example")
    assert {value.removeprefix("https://") for value in secret["stringData"].values()} == {"REPLACE_ME"}
    named = [path for path, text in files.items() if "AWS_SECRET_ACCESS_KEY" in text]
    assert named == ["kuberay/secret-s3.example.yaml"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_environment_is_that_of_the_values(variant, cluster, name):
    for pod in pods(cluster(name)).values():
        (container,) = pod["spec"]["containers"]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == variant["env"]


def test_the_queued_job_is_the_same_job(variant, resource):
    plain, queued = resource("rayjob-train"), copy.deepcopy(resource("rayjob-train-kueue"))
    assert queued["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name") == variant["kueue"]["queue"]
    assert queued["spec"].pop("suspend") is True
    assert queued == plain
    (group,) = queued["spec"]["rayClusterSpec"]["workerGroupSpecs"]  # Kueue's limits: few groups, no autoscaling
    assert "enableInTreeAutoscaling" not in queued["spec"]["rayClusterSpec"]
    assert group["replicas"] == variant["workers"]["count"]


def test_the_queue_has_room_for_one_such_job(variant, documents, resource):
    flavor, queue, local = documents("kuberay/kueue-queue.yaml")
    job = resource("rayjob-train-kueue")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["metadata"]["namespace"] == job["metadata"]["namespace"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    (group,) = queue["spec"]["resourceGroups"]
    (entry,) = group["flavors"]
    assert entry["name"] == flavor["metadata"]["name"]
    quota = {each["name"]: each["nominalQuota"] for each in entry["resources"]}
    assert group["coveredResources"] == list(quota)
    needed = {"cpu": 0, "memory": 0, "nvidia.com/gpu": 0}
    for part, pod in pods(job["spec"]).items():
        times = variant["workers"]["count"] if part == "gpu" else 1
        for name, amount in pod["spec"]["containers"][0]["resources"]["requests"].items():
            needed[name] += times * (gib(amount) if name == "memory" else int(amount))
    assert quota == {name: f"{amount}Gi" if name == "memory" else str(amount) for name, amount in needed.items()}
    assert queue["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": variant["namespace"]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_network_policy_is_about_all_pods(resource, name):
    selected = resource("networkpolicy")["spec"]["podSelector"]["matchLabels"]
    for pod in pods(resource(name)["spec"]).values():
        assert selected.items() <= pod["metadata"]["labels"].items()
        # KubeRay's services find the head by this label of its own.
        assert "app.kubernetes.io/name" not in pod["metadata"]["labels"]


def test_only_the_cluster_itself_kuberay_and_prometheus_come_in(variant, resource):
    spec = resource("networkpolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    own, operator, prometheus = spec["ingress"]
    assert own == {"from": [{"podSelector": spec["podSelector"]}]}
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    assert operator["from"][0]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert prometheus["ports"] == [{"port": METRICS_PORT, "protocol": "TCP"}]
    (scraper,) = prometheus["from"]  # both must hold: that pod in that namespace
    assert scraper["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}
    namespace = {"kubernetes.io/metadata.name": variant["prometheus"]["namespace"]}
    assert scraper["namespaceSelector"] == {"matchLabels": namespace}
    inside, outside = spec["egress"]
    assert inside == {"to": [{"podSelector": spec["podSelector"]}]}
    assert {port["port"] for port in outside["ports"]} == {53, 443}  # a cloud's metadata service is on 80


def test_everything_is_in_one_namespace_under_names_that_kuberay_takes(variant, files, documents):
    for path in [path for path in files if path.startswith("kuberay/")]:
        for document in documents(path):
            metadata = document["metadata"]
            if document["kind"] in ("Namespace", "ResourceFlavor", "ClusterQueue"):
                assert "namespace" not in metadata
            else:
                assert metadata["namespace"] == variant["namespace"]
            assert len(metadata["name"]) <= 47  # KubeRay's limit for a RayJob
