"""Fine-tuning: weights that a run starts from, parts that are not trained, the learning rate of the classifier."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from runs import context_of, run_of, tiny, train, trainer_of
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torchvision.models import DenseNet121_Weights, densenet121

from densenet_dist.cluster.launch import write_run
from densenet_dist.config import load_config
from densenet_dist.errors import CheckpointError, ConfigError, EnvironmentProblem, StorageError
from densenet_dist.inference.exporting import export
from densenet_dist.model.variants import densenet
from densenet_dist.train.initial_weights import read_weights, write_initial_weights
from densenet_dist.train.trainer import Trainer


def start(config, **context) -> Trainer:
    """Return a trainer before its first step, as a command would start it."""
    write_run(run_of(config), config, resume=False)
    return Trainer(config, context_of(config, **context))


def test_weights_of_a_run_an_export_and_state_dicts_are_the_same(original, tmp_path):
    weights = read_weights(str(original))
    compiled = {"model._orig_mod." + name: tensor for name, tensor in weights.items()}
    old = {name.replace("norm1", "norm.1").replace("conv2", "conv.2"): tensor for name, tensor in weights.items()}
    files = {
        "export.safetensors": lambda path: export(original, out=path),
        "plain.safetensors": lambda path: save_file(weights, path),
        "ddp.pth": lambda path: torch.save({"module." + name: tensor for name, tensor in weights.items()}, path),
        "lightning.ckpt": lambda path: torch.save({"epoch": 3, "state_dict": compiled}, path),
        "old_torchvision.pt": lambda path: torch.save(old, path),
    }
    for name, write in files.items():
        write(tmp_path / name)
        assert_close(read_weights(str(tmp_path / name)), weights, rtol=0, atol=0)
        config = tiny(tmp_path, f"model.weights={tmp_path / name}", f"name=from-{name}")
        assert_close({k: v for k, v in start(config).model.state_dict().items() if k in weights}, weights)


def test_a_classifier_of_other_classes_starts_anew(original, tmp_path):
    weights = read_weights(str(original))
    weights["classifier.weight"], weights["classifier.bias"] = torch.zeros(3, 12), torch.zeros(3)
    save_file(weights, tmp_path / "three.safetensors")
    notes = []
    config = tiny(tmp_path, f"model.weights={tmp_path / 'three.safetensors'}", "seed=5")
    model = start(config, listener=lambda event: notes.append(event["text"])).model
    assert notes == [f"the classifier of {model.architecture.num_classes} classes starts from random weights"]
    assert_close(model.features.state_dict()["conv0.weight"], weights["features.conv0.weight"])
    assert_close(model.classifier.weight, trainer_of(tiny(tmp_path, "seed=5", "name=random")).model.classifier.weight)


class Code:
    def __reduce__(self):
        return print, ("this code must not run",)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("absent.pth", None, ConfigError, "there is no file"),
        ("no-run", None, StorageError, "there is no run"),
        ("export.onnx", b"", ConfigError, "or export it as safetensors"),
        ("cut.safetensors", b"\x00" * 9, CheckpointError, "damaged"),
        ("cut.pth", b"PK", CheckpointError, "damaged"),
        ("code.pth", pickle.dumps(Code(), protocol=2), CheckpointError, "damaged, or contains more than tensors"),
        ("list.pth", [torch.zeros(1)], CheckpointError, "contains a list"),
        ("empty.pth", {"epoch": 1}, CheckpointError, "no tensors"),
        ("nan.pth", lambda weights: weights | {"classifier.bias": torch.full([10], torch.nan)}, CheckpointError, "NaN"),
        ("other.pth", lambda weights: {**weights, "features.conv9.weight": torch.zeros(1)}, CheckpointError, "conv9"),
    ],
)
def test_what_cannot_be_loaded_is_rejected(original, tmp_path, capsys, name, content, error, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content(read_weights(str(original))) if callable(content) else content, path)
    config = tiny(tmp_path, f"model.weights={path}")
    with pytest.raises(error, match=message):
        write_initial_weights(run_of(config), config)
    assert capsys.readouterr().out == ""


def test_a_command_lists_all_tensors_that_do_not_fit(command, original):
    other = ("model.growth_rate=5", f"model.weights={original}", "name=b", "storage=runs")
    code, _, errors = command("train", original / "config.yaml", *other)
    assert code == 6
    assert "do not fit the model" in errors
    assert "features.conv0.weight: float32 [8, 3, 3, 3] there, float32 [10, 3, 3, 3] in this model" in errors
    assert not Path("runs/b/checkpoints").exists()


def test_a_new_run_starts_from_another_with_its_configuration(command, original):
    assert command("train", "--from", original, "train.epochs=1", "storage=runs", "name=second", "--quiet")[0] == 0
    config = load_config("runs/second/config.yaml")
    assert (config.model.weights, config.data.limit) == (str(original), 75)
    assert not Path("runs/second/initial.safetensors").exists()  # no restart needs it any more
    code, _, errors = command("train", "--from", original, "--resume", original)
    assert (code, "give one of them" in errors) == (2, True)


def test_pretrained_weights_are_torchvisions_and_verified(tmp_path, monkeypatch):
    torch.manual_seed(0)
    theirs = densenet121().eval()
    file = tmp_path / "weights"
    torch.save(theirs.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    config = load_config("model.variant=densenet121", "model.pretrained=true", f"storage={tmp_path}")

    def published_at(url: str) -> None:
        monkeypatch.setitem(DenseNet121_Weights.IMAGENET1K_V1.value.__dict__, "url", url)

    published_at("http://127.0.0.1:9/densenet121-01234567.pth")
    with pytest.raises(EnvironmentProblem, match="put it into"):
        write_initial_weights(run_of(config), config)
    (tmp_path / f"densenet121-{digest}.pth").write_bytes(file.read_bytes())
    published_at(f"file://{tmp_path}/densenet121-{digest}.pth")
    write_initial_weights(run_of(config), config)
    ours = densenet("densenet121", num_classes=1000, image_size=64).eval()
    ours.load_state_dict(load_file(run_of(config).path / "initial.safetensors"), strict=False)
    images = torch.randn(2, 3, 64, 64)
    assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    (downloaded,) = (tmp_path / "hub").rglob("*.pth")
    downloaded.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="checksum"):
        write_initial_weights(run_of(config), config)


def test_frozen_parts_stay_and_the_classifier_has_its_own_rate(original, tmp_path):
    settings = ("train.freeze=[stem, 1]", "train.head_lr=0.1", "train.epochs=1")
    config = tiny(tmp_path, f"model.weights={original}", *settings)
    trainer = start(config)
    frozen = ("features.conv0.", "features.denseblock1.", "features.transition1.")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    groups = [(group["lr_scale"], len(group["params"])) for group in trainer.optimizer.param_groups]
    assert groups == [(1.0, 2), (1.0, 6), (2.0, 1), (2.0, 1)]  # weights, then norms and biases
    train(config)
    after = read_weights(str(run_of(config).path))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in after if not name.startswith(frozen)}


@pytest.mark.parametrize("parts", ["backbone", ["stem", 1], [2], [4]])
def test_both_forms_of_a_partly_frozen_network_are_equal(parts):
    results = []
    for block in ("reference", "fused"):
        torch.manual_seed(0)
        model = densenet("notebook", num_classes=5, growth_rate=4, num_layers=2, block=block).train()
        model.freeze(parts)
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((gradients, model.state_dict()))
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def weights_on_each_rank(storage: str, original: str) -> list[torch.Tensor]:
    config = tiny(storage, f"model.weights={original}", "train.freeze=[stem, 1]")
    trainer = start(config) if torch.distributed.get_rank() == 0 else trainer_of(config)
    return list(trainer.model.state_dict().values())


def test_all_ranks_start_from_the_same_weights(original, tmp_path):
    ranks = run_ranks(weights_on_each_rank, 2, str(tmp_path), str(original))
    assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    assert_close(ranks[0][0], read_weights(str(original))["features.conv0.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.pretrained=true"], "model.pretrained: choose model.variant=densenet121"),
        (["model.pretrained=true", "model.variant=densenet121", "model.weights=a"], "remove one"),
        (["train.freeze=head"], "train.freeze"),
        (["train.freeze=[0]"], "train.freeze"),
        (["train.freeze=[3]"], "there is no block 3; the model has 2"),
    ],
)
def test_impossible_settings_are_rejected(command, original, settings, message):
    code, _, errors = command("train", original / "config.yaml", "name=b", "storage=runs", *settings)
    assert (code, message in errors) == (2, True), errors
