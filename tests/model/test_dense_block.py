"""The dense block in both forms: running statistics and dropout. Its values are compared in test_densenet.py."""

import pytest
import torch
from fused import Block, maps

LAYERS, IN_CHANNELS, GROWTH = 3, 5, 4  # of `Block`
each_form = pytest.mark.parametrize("form", ["reference", "fused"])


@each_form
def test_running_statistics_follow_the_maps_that_each_layer_reads(form: str) -> None:
    block = Block(form).block
    before = {name: tensor.clone() for name, tensor in block.named_buffers()}
    y = block(maps()).detach()
    buffers = dict(block.named_buffers())
    for i in range(LAYERS):
        read, norm = y[:, : IN_CHANNELS + i * GROWTH].transpose(0, 1).flatten(1), f"denselayer{i + 1}.norm1"
        for name, new in ((f"{norm}.running_mean", read.mean(1)), (f"{norm}.running_var", read.var(1))):
            torch.testing.assert_close(buffers[name], 0.99 * before[name] + 0.01 * new, rtol=0, atol=1e-13)
        assert buffers[f"{norm}.num_batches_tracked"] == 1


@each_form
def test_dropout_zeroes_new_maps_in_training_only(form: str) -> None:
    block, undropped, x = Block(form, drop_rate=0.4).block, Block(form).block, maps()
    dropped = block(x)[:, IN_CHANNELS:]
    assert (dropped == 0).double().mean().item() == pytest.approx(0.4, abs=0.06)

    # What is kept is divided by 1 - p, so that evaluation needs no scaling. The first layer's maps only: later layers
    # read dropped maps.
    first = dropped[:, :GROWTH]
    plain = undropped(x)[:, IN_CHANNELS : IN_CHANNELS + GROWTH]
    torch.testing.assert_close(first[first != 0], plain[first != 0] / 0.6)

    undropped.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x), undropped.eval()(x))
