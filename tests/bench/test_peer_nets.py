"""The nets that benchmarks/peers.py measures beside ours: the same where it says so, and refused where they are not."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PEER_NETS = Path(__file__).parents[2] / "benchmarks" / "peer_nets.py"


@pytest.fixture(scope="module")
def peer_nets():
    spec = importlib.util.spec_from_file_location("peer_nets", PEER_NETS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["reference", "fused"])
@pytest.mark.parametrize("name", ["bc100", "densenet121"])
def test_torchvisions_net_is_ours(peer_nets, name, form):
    far = peer_nets.check_same(peer_nets.NETS[name]._replace(image_size=32), "torchvision", form)
    assert set(far) == {"logits", "gradients", "statistics"}
    assert max(far.values()) <= 1e-9


def test_another_epsilon_is_refused(peer_nets, monkeypatch):
    def almost(net):
        model = peer_nets.torchvision_net(net)
        model.features.norm5.eps *= 1.001
        return model

    monkeypatch.setattr(peer_nets, "LIBRARIES", {"almost": almost})
    with pytest.raises(peer_nets.DifferentNets, match=r"almost's net and ours \(reference\) differ by"):
        peer_nets.check_same(peer_nets.NETS["bc100"], "almost")


def test_other_weights_are_refused(peer_nets):
    with pytest.raises(peer_nets.DifferentNets, match=r"torchvision's net and ours differ in \d+ tensors"):
        peer_nets.check_same(peer_nets.NETS["notebook"], "torchvision")


def test_sizes_of_the_notebooks_net_and_its_peers(peer_nets):
    net = peer_nets.NETS["notebook"]
    own, theirs = peer_nets.size_of(net, "ours"), peer_nets.size_of(net, "torchvision")
    assert own == {"parameters": peer_nets.NOTEBOOK_PARAMETERS, "multiply_adds": 1_191_921_080}
    # One of theirs by hand: 3x3 from 3 to 35, then in the first layer 1x1 from 35 to 105 and 3x3 from there to 35.
    weights = {name: p.numel() for name, p in peer_nets.torchvision_net(net).named_parameters() if "conv" in name}
    assert list(weights.values())[:3] == [9 * 3 * 35, 35 * 105, 9 * 105 * 35]
    assert theirs["parameters"] == 4_415_920


def test_checkpointed_blocks_have_the_same_gradients(peer_nets):
    net = peer_nets.NETS["bc100"]
    plain, checkpointed = peer_nets.ours(net).double(), peer_nets.ours(net, "checkpointed").double()
    checkpointed.load_state_dict(plain.state_dict())
    images, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([3, 8])
    expected, found = (peer_nets.values_of_step(model, images, labels) for model in (plain, checkpointed))
    for part in ("logits", "gradients"):  # the running statistics move twice
        assert peer_nets.farthest(found[part], expected[part]) <= 1e-9
    assert peer_nets.farthest(found["statistics"], expected["statistics"]) > 1e-3


def test_what_cannot_be_had_is_left_out(peer_nets, monkeypatch):
    with pytest.raises(peer_nets.LeftOut, match="there is no form 'molten'"):
        peer_nets.ours(peer_nets.NETS["bc100"], "molten")
    monkeypatch.setitem(sys.modules, "timm.models.densenet", None)
    with pytest.raises(peer_nets.LeftOut, match=r"^timm: "):
        peer_nets.timm_net(peer_nets.NETS["bc100"])
