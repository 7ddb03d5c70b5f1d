"""The files of `ray up`: valid by Ray's own check, safe, and of the shape that values.yaml says."""

from __future__ import annotations

import re
import shlex

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

NAMES = ["aws", "gcp", "local"]


@pytest.fixture
def configs(rendered):
    """What `ray up` reads, before it fills in its own defaults."""
    return {name: rendered.documents(f"ray_up/{name}.yaml")[0] for name in NAMES}


def options(commands):
    """The options of `ray start` in a list of commands, read by Ray's own parser."""
    (line,) = [line for line in commands if line.startswith("ray start")]
    return start.make_context("start", shlex.split(line)[2:]).params


def test_valid_by_rays_own_check(rendered, configs):
    for name, config in configs.items():
        with pytest.raises(Exception, match="max_worker"):
            validate_config(prepare_config(config | {"max_worker": 2}))  # an unknown field is an error
        prepared = prepare_config(config)
        validate_config(prepared)
        kind = prepared["head_node_type"] if name == "local" else "worker"  # Ray has one kind of on-prem host
        entry = prepared["available_node_types"][kind]
        count = rendered.values["workers"]["count"]
        assert entry["min_workers"] == entry["max_workers"] == prepared["max_workers"] == count
        # Ray's own defaults would install packages of any version, a nightly build of itself among them.
        commands = [*prepared["setup_commands"], *prepared["head_setup_commands"], *prepared["worker_setup_commands"]]
        assert all(re.fullmatch(r"pip install --user --quiet [\w-]+==[\d.]+", command) for command in commands)
        assert len(commands) == (1 if name == "gcp" else 0)


def test_one_image_without_privileges_and_with_the_token(rendered, configs):
    values = rendered.values
    for config in configs.values():
        docker = config["docker"]
        assert docker["image"] == rendered.image
        assert not {"head_image", "worker_image"} & set(docker)
        assert docker["worker_run_options"] == ["--gpus all"]
        expected = {"--cap-drop ALL", "--security-opt no-new-privileges", "--env RAY_AUTH_MODE=token"}
        expected |= {f"--volume {values['mount']}:{values['mount']}"}
        expected |= {f"--env {key}={value}" for key, value in values["env"].items()}
        assert expected <= set(docker["run_options"])
        assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_the_head_trains_nothing_and_its_dashboard_is_on_loopback(rendered, configs):
    for config in configs.values():
        head, worker = options(config["head_start_ray_commands"]), options(config["worker_start_ray_commands"])
        assert (head["head"], head["num_cpus"], head["dashboard_host"]) == (True, 0, "127.0.0.1")
        assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
        assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
        assert worker["object_manager_port"] == head["object_manager_port"]
    # Only hosts of one's own tell Ray their shape; the last `worker` and `head` are theirs.
    assert (worker["num_cpus"], worker["num_gpus"]) == tuple(
        rendered.values["workers"][key] for key in ("cpus", "gpus")
    )
    assert head["num_gpus"] == 0
    assert configs["local"]["provider"]["worker_ips"] == rendered.values["on_prem"]["workers"]


def test_only_workers_in_clouds_are_spot_machines_and_all_terminate_by_themselves(rendered, configs):
    workers, seconds = rendered.values["workers"], rendered.values["job"]["deadline_s"]
    nodes = {}
    for name in ("aws", "gcp"):
        types = configs[name]["available_node_types"]
        nodes[name] = {kind: entry["node_config"] for kind, entry in types.items()}
        assert types["head"]["resources"] == {"CPU": 0}
        assert types["worker"]["resources"] == {"CPU": workers["cpus"], "GPU": workers["gpus"]}
    aws, gcp = nodes["aws"], nodes["gcp"]
    assert aws["worker"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["worker"]["scheduling"]["provisioningModel"] == "SPOT"
    assert gcp["worker"]["scheduling"]["onHostMaintenance"] == "TERMINATE"  # machines with GPUs cannot be moved
    assert "InstanceMarketOptions" not in aws["head"]
    assert gcp["head"]["scheduling"]["provisioningModel"] == "STANDARD"
    # Ray gives the head a profile that may start machines; workers get the bucket's.
    assert "IamInstanceProfile" not in aws["head"]
    assert aws["worker"].get("IamInstanceProfile") == ({"Name": "may-use-the-bucket"} if rendered.on_s3 else None)
    assert configs["aws"]["initialization_commands"][0] == f"sudo shutdown -h +{seconds // 60}"
    assert configs["aws"]["provider"]["cache_stopped_nodes"] is False
    for node in aws.values():
        assert node["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["DeleteOnTermination"] for disk in node["BlockDeviceMappings"])
    for node in gcp.values():
        assert node["scheduling"]["maxRunDuration"] == {"seconds": seconds}
        assert node["scheduling"]["instanceTerminationAction"] == "DELETE"
        assert all(disk["autoDelete"] for disk in node["disks"])


def test_storage_is_mounted_before_ray_starts(rendered, configs):
    for name, config in configs.items():
        commands = " ".join(config["initialization_commands"])
        assert rendered.values["mount"] in commands
        assert ("findmnt" in commands) is not rendered.on_s3
        assert (rendered.values["nfs"] in commands) is (not rendered.on_s3 and name != "local")
