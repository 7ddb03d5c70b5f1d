"""The files of `ray up`: valid by Ray's own check, safe, and of the shape that values.yaml says."""

from __future__ import annotations

import re
import shlex

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start


@pytest.fixture
def configs(rendered):
    """What `ray up` reads, before it fills in its own defaults."""
    return {name: rendered.documents(f"ray_up/{name}.yaml")[0] for name in ("aws", "gcp", "local")}


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
        commands = [*prepared["setup_commands"], *prepared["head_setup_commands"], *prepared["worker_setup_commands"]]
        assert all(re.fullmatch(r"pip install --user --quiet [\w-]+==[\d.]+", command) for command in commands)
        assert len(commands) == (1 if name == "gcp" else 0)


def test_containers_have_no_privileges_and_the_head_trains_nothing(rendered, configs):
    values = rendered.values
    for config in configs.values():
        docker = config["docker"]
        assert docker["image"] == rendered.image
        expected = {"--cap-drop ALL", "--security-opt no-new-privileges", "--env RAY_AUTH_MODE=token"}
        expected |= {f"--volume {values['mount']}:{values['mount']}"}
        expected |= {f"--env {key}={value}" for key, value in values["env"].items()}
        assert expected <= set(docker["run_options"])
        assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
        commands = " ".join(config["initialization_commands"])
        assert ("findmnt" in commands) is not rendered.on_s3
        head, worker = options(config["head_start_ray_commands"]), options(config["worker_start_ray_commands"])
        assert (head["head"], head["num_cpus"], head["dashboard_host"]) == (True, 0, "127.0.0.1")
        assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    # Only hosts of one's own tell Ray their shape; the last `worker` is theirs.
    assert (worker["num_cpus"], worker["num_gpus"]) == (values["workers"]["cpus"], values["workers"]["gpus"])
    assert configs["local"]["provider"]["worker_ips"] == values["on_prem"]["workers"]


def test_only_workers_in_clouds_are_spot_machines_and_all_terminate_by_themselves(rendered, configs):
    workers, seconds = rendered.values["workers"], rendered.values["job"]["deadline_s"]
    types = {name: configs[name]["available_node_types"] for name in ("aws", "gcp")}
    for kinds in types.values():
        assert kinds["head"]["resources"] == {"CPU": 0}
        assert kinds["worker"]["resources"] == {"CPU": workers["cpus"], "GPU": workers["gpus"]}
    aws, gcp = ({kind: entry["node_config"] for kind, entry in kinds.items()} for kinds in types.values())
    assert aws["worker"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["worker"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "InstanceMarketOptions" not in aws["head"]
    assert gcp["head"]["scheduling"]["provisioningModel"] == "STANDARD"
    assert "IamInstanceProfile" not in aws["head"]
    assert aws["worker"].get("IamInstanceProfile") == ({"Name": "may-use-the-bucket"} if rendered.on_s3 else None)
    assert configs["aws"]["initialization_commands"][0] == f"sudo shutdown -h +{seconds // 60}"
    for node in aws.values():
        assert node["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["DeleteOnTermination"] for disk in node["BlockDeviceMappings"])
    for node in gcp.values():
        assert node["scheduling"]["maxRunDuration"] == {"seconds": seconds}
        assert node["scheduling"]["instanceTerminationAction"] == "DELETE"
        assert all(disk["autoDelete"] for disk in node["disks"])
