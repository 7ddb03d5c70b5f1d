"""Configurations from strangers: no objects, no bombs, no credentials in what is written down."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fuzzing import alias_bomb, merge_bomb

from densenet_dist.config import load_config
from densenet_dist.credentials import held_credentials, without_credentials
from densenet_dist.environment import describe_environment
from densenet_dist.errors import ConfigError
from densenet_dist.sweep.definition import load_sweep

MARKER = "MARKER7f3a"


def refusal(*sources: object) -> str:
    started = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_config(*sources)
    assert time.perf_counter() - started < 5
    return str(caught.value)


def test_aliases_do_not_blow_up(tmp_path: Path):
    for bomb in (alias_bomb(9, "[]"), alias_bomb(40, "[]"), alias_bomb(9, "{}"), merge_bomb(30)):
        (tmp_path / "c.yaml").write_text(f"train: {{lr: {bomb}}}")
        for source in (tmp_path / "c.yaml", f"train.lr={bomb}"):
            assert "holds more than 10000 values" in refusal(source)
    (tmp_path / "c.yaml").write_text("data: {mixup: &alpha 0.5, cutmix: *alpha}\n")
    assert load_config(tmp_path / "c.yaml").data.cutmix == 0.5


def test_large_files_and_deep_nests_end_soon(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("\n".join(f"key{number}: 1" for number in range(300_000)))
    assert "holds more than 10000 values" in refusal(tmp_path / "c.yaml")
    for deep in ("{a: " * 45 + "1" + "}" * 45, "[" * 45 + "]" * 45, "[" * 5000 + "]" * 5000):
        assert "train.lr" in refusal(f"train.lr={deep}")
    assert "has 701 parts" in refusal("a." * 700 + "a=1")
    (tmp_path / "c.yaml").write_text("\n".join(f"key{number}: 1" for number in range(4000)))
    first, *_, last = refusal(tmp_path / "c.yaml").splitlines()
    assert first.startswith("4000 problems")
    assert last.endswith("... and 3970 more")


def test_nothing_reaches_paths_and_the_terminal_but_text(tmp_path: Path):
    for text in ('"a\\0b"', '"\\ud800"', '"\\e[31m"'):
        assert "contains control characters" in refusal(f"data.root={text}")
    (tmp_path / "c.yaml").write_text('"\\e[2J": 1')
    assert "'\\x1b[2J' contains control characters" in refusal(tmp_path / "c.yaml")
    assert "\\x1b[2J\\rwiped: unknown key" in refusal("\x1b[2J\rwiped=1")
    assert "\x1b" not in refusal("\x1b[2J\rwiped=1")


def test_what_doctor_finds_is_shown_as_text(command):
    for root in ("[/]", "[link=https://example.org]here"):  # markup of what draws its table
        code, out, _ = command("doctor", "data.name=folder", f'data.root="{root}"', "cluster.engine=local")
        assert code == 3
        assert root in "".join(out.split())


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("storage", f"s3://AKIA:{MARKER}@bucket/runs"),
        ("storage", f"s3://bucket/runs?access_key=id&secret_key={MARKER}"),
        ("storage", f"abfs://box@account.dfs.core.windows.net/runs?client_secret={MARKER}"),
        ("data.root", f"s3://bucket/data?AWS_SECRET_ACCESS_KEY={MARKER}"),
        ("log.mlflow.tracking_uri", f"http://me:{MARKER}@host"),
        ("cluster.address", f"ray://me:{MARKER}@host:10001"),
        ("data.url", f"https://{MARKER}@mirror.example/cifar.tar.gz"),
        ("data.url", f"https://me:{MARKER}@mirror.example/cifar.tar.gz"),
        ("data.url", f"https://mirror.example/c.tar.gz?X-Amz-Signature={MARKER}&X-Amz-Expires=60"),
    ],
)
def test_addresses_with_credentials_are_refused_and_not_repeated(key, address, command, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSENET_DIST_CACHE", str(tmp_path / "cache"))
    for name in ("config", "train", "doctor"):
        code, out, err = command(name, f"{key}={address}", "name=x")
        assert code == 2
        assert f"error: {key}: holds credentials" in err
        assert "by the environment" in err
        assert MARKER not in out + err
    if key == "data.url":
        assert MARKER not in str(command("data", "prepare", "cifar10", "--root", "data", "--url", address))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and MARKER.encode() in path.read_bytes()]


def test_other_mistakes_are_named_without_credentials(command):
    address = f"s3://me:{MARKER}@bucket/c.yaml"
    for source in (f"data.limit={address}", f'data.root="{address}', f"storage=[{address}]", address, f"{address}.x=1"):
        assert MARKER not in refusal(source)
        code, out, err = command("train", source, "--debug")
        assert (code, MARKER in out + err) == (2, False)


def test_credentials_are_found_anywhere_in_a_text(monkeypatch):
    for text, shown in (
        (f"no answer from 'http://me:{MARKER}@host:80/x' now", "no answer from 'http://***@host:80/x' now"),
        (f"s3://AKIA:a/b?{MARKER}+c@bucket/x?scheme=http", "s3://***@bucket/x?scheme=http"),
        (f"[s3:/me:{MARKER}@bucket, s3://other/x]", "[s3:/***@bucket, s3://other/x]"),
        (f"http:///x?X-Amz-Signature={MARKER}&X-Amz-Expires=60", "http:///x?X-Amz-Signature=***&X-Amz-Expires=60"),
    ):
        assert without_credentials(text) == shown
        assert list(held_credentials("key", text))
    monkeypatch.setattr("sys.argv", ["mine.py", f"--database=postgres://me:{MARKER}@host/x"])
    assert describe_environment()["command"] == "mine.py --database=postgres://***@host/x"
    for text in (
        "http://host:8265/a@b",
        "abfs://box@account/x",
        "http://[::1]:9/x and me@host",
        "s3://b/x?scheme=http",
    ):
        assert without_credentials(text) == text
        assert not list(held_credentials("key", text))


def test_addresses_without_are_taken_and_a_sweeps_storage_is_checked_too():
    for address in ("s3://bucket/x?endpoint_override=HOST:9000&scheme=http", "abfs://box@account.dfs.core.windows.net/x",
                    "abfs://box@account/runs?credential_kind=environment", "/a/with:colon@sign?key=1"):  # fmt: skip
        assert load_config({"storage": address}).storage == address
    for key, *sources in (
        ("storage", f"storage=s3://bucket/x?secret_key={MARKER}", "space.train.lr=[0.1, 0.2]"),
        ("space.data.root", f"space.data.root={{choice: [a, 's3://me:{MARKER}@bucket/x']}}"),
    ):
        with pytest.raises(ConfigError, match=f"{key}: holds credentials") as caught:
            load_sweep(*sources)
        assert MARKER not in str(caught.value)


def test_a_sweep_is_not_larger_than_memory():
    for domain in ("train.epochs={integer: [1, 1000000000000]}", "train.lr={uniform: [0.1, 1], step: 1e-9}"):
        with pytest.raises(ConfigError, match="10000 combinations at most"):
            load_sweep("search.name=grid", f"space.{domain}")
    for domain in ("{uniform: [0, 1" + "0" * 400 + "]}", "{uniform: [-1e308, 1e308]}", "{uniform: [0, .inf]}"):
        with pytest.raises(ConfigError, match="below its high end"):
            load_sweep(f"space.train.lr={domain}")
