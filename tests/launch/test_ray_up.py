"""The files of `ray up`: valid by Ray's own check, and as they ought to be."""

from __future__ import annotations

import re
import shlex

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

CLOUDS = ["aws", "gcp"]
ALL = [*CLOUDS, "local"]
# GPUs, vCPUs, GiB: as the makers say.
MACHINES = {
    "g6.2xlarge": (1, 8, 32),
    "p5.48xlarge": (8, 192, 2048),
    "g2-standard-8": (1, 8, 32),
    "a3-highgpu-8g": (8, 208, 1872),
    "m6i.large": (0, 2, 8),
    "n2-standard-2": (0, 2, 8),
}


@pytest.fixture
def config(documents):
    """What `ray up` reads, before it fills in its own defaults."""

    def read(name):
        (document,) = documents(f"ray_up/{name}.yaml")
        return document

    return read


def started(commands):
    """The options of `ray start` in a list of commands, read by Ray's own parser."""
    (line,) = [line for line in commands if line.startswith("ray start")]
    context = start.make_context("start", shlex.split(line)[2:])
    return context.params


@pytest.mark.parametrize("name", ALL)
def test_valid_by_rays_own_check(variant, config, name):
    prepared = prepare_config(config(name))
    validate_config(prepared)
    kind = prepared["head_node_type"] if name == "local" else "worker"  # Ray has one kind only of one's own hosts
    entry = prepared["available_node_types"][kind]
    assert entry["min_workers"] == entry["max_workers"] == prepared["max_workers"] == variant["workers"]["count"]
    # Ray's own defaults would install packages of any version, a nightly build of itself among them.
    commands = [*prepared["setup_commands"], *prepared["head_setup_commands"], *prepared["worker_setup_commands"]]
    assert all(re.fullmatch(r"pip install --user --quiet [\w-]+==[\d.]+", command) for command in commands)
    assert len(commands) == (1 if name == "gcp" else 0)


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_field_is_refused(config, name):
    changed = config(name) | {"max_worker": 2}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(changed))


@pytest.mark.parametrize("name", ALL)
def test_one_image_everywhere(variant, config, name):
    docker = config(name)["docker"]
    digest = variant["image_digest"]
    assert docker["image"] == f"{variant['image']}:{variant['image_tag']}" + (f"@{digest}" if digest else "")
    assert not {"head_image", "worker_image"} & set(docker)
    assert docker["worker_run_options"] == ["--gpus all"]
    assert f"--volume {variant['mount']}:{variant['mount']}" in docker["run_options"]
    assert {"--cap-drop ALL", "--security-opt no-new-privileges"} <= set(docker["run_options"])
    assert {f"--env {key}={value}" for key, value in variant["env"].items()} <= set(docker["run_options"])


@pytest.mark.parametrize("name", ALL)
def test_the_token_is_asked_for_and_there(config, name):
    assert "--env RAY_AUTH_MODE=token" in config(name)["docker"]["run_options"]
    assert config(name)["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("name", ALL)
def test_the_head_does_no_work_and_shows_its_dashboard_to_itself(config, name):
    head = started(config(name)["head_start_ray_commands"])
    assert head["head"]
    assert head["num_cpus"] == 0
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    worker = started(config(name)["worker_start_ray_commands"])
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert worker["object_manager_port"] == head["object_manager_port"]


def test_hosts_of_ones_own_tell_ray_their_shape(variant, config):
    worker = started(config("local")["worker_start_ray_commands"])
    assert (worker["num_cpus"], worker["num_gpus"]) == (variant["workers"]["cpus"], variant["workers"]["gpus"])
    assert started(config("local")["head_start_ray_commands"])["num_gpus"] == 0
    assert config("local")["provider"]["worker_ips"] == variant["on_prem"]["workers"]


@pytest.mark.parametrize(("name", "key"), [("aws", "InstanceType"), ("gcp", "machineType")])
def test_machines_hold_what_is_asked_of_them(variant, config, name, key):
    types = config(name)["available_node_types"]
    workers = variant["workers"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["worker"]["resources"] == {"CPU": workers["cpus"], "GPU": workers["gpus"]}
    machine = types["worker"]["node_config"][key]
    assert machine in MACHINES, f"{machine}: look its shape up, and add it to this test"
    gpus, cpus, memory = MACHINES[machine]
    assert gpus == workers["gpus"]
    assert cpus >= workers["cpus"]
    assert memory >= workers["memory_gib"]
    head = MACHINES[types["head"]["node_config"][key]]
    assert head == (0, variant["head"]["cpus"], variant["head"]["memory_gib"])


def test_only_workers_are_spot_machines(config):
    aws = {kind: entry["node_config"] for kind, entry in config("aws")["available_node_types"].items()}
    assert "InstanceMarketOptions" not in aws["head"]
    assert aws["worker"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    gcp = {kind: entry["node_config"]["scheduling"] for kind, entry in config("gcp")["available_node_types"].items()}
    assert gcp["head"]["provisioningModel"] == "STANDARD"
    assert gcp["worker"]["provisioningModel"] == "SPOT"
    assert gcp["worker"]["onHostMaintenance"] == "TERMINATE"  # machines with GPUs cannot be moved


def test_machines_end_by_themselves(variant, config):
    seconds = variant["job"]["deadline_s"]
    aws, gcp = config("aws"), config("gcp")
    assert aws["initialization_commands"][0] == f"sudo shutdown -h +{seconds // 60}"
    assert aws["provider"]["cache_stopped_nodes"] is False
    for entry in aws["available_node_types"].values():
        assert entry["node_config"]["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert entry["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["DeleteOnTermination"] for disk in entry["node_config"]["BlockDeviceMappings"])
    for entry in gcp["available_node_types"].values():
        assert entry["node_config"]["scheduling"]["maxRunDuration"] == {"seconds": seconds}
        assert entry["node_config"]["scheduling"]["instanceTerminationAction"] == "DELETE"
        assert all(disk["autoDelete"] for disk in entry["node_config"]["disks"])


@pytest.mark.parametrize("name", ALL)
def test_storage_is_there_before_ray(variant, config, name):
    commands = " ".join(config(name)["initialization_commands"])
    s3 = variant["storage"].startswith("s3://")
    assert variant["mount"] in commands
    assert ("findmnt" in commands) is not s3
    assert (variant["nfs"] in commands) is (not s3 and name in CLOUDS)


def test_workers_on_aws_may_use_the_bucket(variant, config):
    types = config("aws")["available_node_types"]
    profile = types["worker"]["node_config"].get("IamInstanceProfile")
    assert profile == ({"Name": "may-use-the-bucket"} if variant["storage"].startswith("s3://") else None)
    assert "IamInstanceProfile" not in types["head"]["node_config"]  # Ray gives it one that may start machines
