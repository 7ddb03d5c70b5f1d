"""The variants: exact sizes, presets, and errors for networks that cannot be built."""

from typing import Any

import pytest
import torch

from densenet_dist.errors import ConfigError
from densenet_dist.model import DenseNet, ParameterCount, count_parameters
from densenet_dist.model.variants import densenet, variant_architecture


def on_meta(variant: str, **options: Any) -> DenseNet:
    """Build a network without allocating its weights."""
    with torch.device("meta"):
        return densenet(variant, **options)


def problems_of(variant: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:  # nothing is built: some would take exabytes
        variant_architecture(variant, **{"num_classes": 10, **options})
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("variant", "options", "trainable", "statistics", "published"),
    [
        ("notebook", {}, 3_532_210, 25_480, "3.5M"),
        ("notebook", {"num_layers": 15, "num_classes": 100}, 5_613_925, 38_080, "5.6M"),
        ("densenet", {"depth": 40, "growth_rate": 12}, 1_019_722, 18_096, "1.0M"),
        ("densenet_bc", {"depth": 100, "growth_rate": 12}, 769_162, 23_988, "0.8M"),
        ("densenet_bc", {"depth": 190, "growth_rate": 40}, 25_624_430, 256_960, "25.6M"),
        ("densenet121", {"num_classes": 1000, "image_size": 224}, 7_978_856, 83_648, "8.0M"),
        ("densenet161", {"num_classes": 1000, "image_size": 224}, 28_681_000, 219_936, "28.7M"),
    ],
)
def test_exact_size(variant: str, options: dict[str, Any], trainable: int, statistics: int, published: str) -> None:
    net = on_meta(variant, **{"num_classes": 10, **options})
    count = count_parameters(net)
    assert count == ParameterCount(trainable, statistics)
    assert net.architecture.num_parameters() == trainable
    assert count.total == trainable + statistics
    assert f"{count.trainable / 1e6:.1f}M" == published


@pytest.mark.parametrize(
    ("variant", "growth_rate", "compression", "widths"),
    [
        ("notebook", 5, 0.5, [(5, 10), (2, 7), (2, 7)]),  # 5 * 0.5 = 2 channels enter each later block
        ("notebook", 100, 0.29, [(100, 200), (28, 128), (28, 128)]),  # 100 * 0.29 < 29 in binary: it stays so
        ("densenet_bc", 5, 0.5, [(10, 15), (7, 12), (6, 11)]),  # a fraction of the input channels: 15 * 0.5, 12 * 0.5
    ],
)
def test_compression_rounds_down(variant: str, growth_rate: int, compression: float, widths: Any) -> None:
    net = on_meta(variant, num_classes=10, num_layers=[1] * 3, growth_rate=growth_rate, compression=compression)
    assert net.architecture.block_widths() == widths
    convs = [net.get_submodule(f"features.transition{i}.conv").weight for i in (1, 2)]
    assert [conv.shape[:2] for conv in convs] == [(widths[i + 1][0], widths[i][1]) for i in (0, 1)]


@pytest.mark.parametrize(
    ("variant", "options", "problem"),
    [
        ("densnet", {}, "model.variant: there is no 'densnet'; choose from notebook, densenet, densenet_bc, "),
        ("notebook", {"growth_rate": 0}, "model.growth_rate: Input should be greater than or equal to 1; got 0"),
        (
            "notebook",
            {"compression": float("nan")},
            "model.compression: Input should be less than or equal",
        ),
        ("notebook", {"compression": 0.02}, "model.compression: 0.02 of 35 channels leaves none after block 1; 0.0286"),
        (
            "densenet",
            {"depth": 41},
            "model.depth: 41 is not a depth of densenet: depth - 4 must be a multiple of 3; use 40 or 43",
        ),
        ("densenet", {"depth": 40, "num_layers": 12}, "model.depth: it is given together with model.num_layers"),
        ("notebook", {"num_layers": 10**6}, "model.num_layers, model.growth_rate: 22,190,027,545,006,310 parameters"),
        ("notebook", {"growth_rate": 10**5}, "model.num_layers, model.growth_rate: 28,470,127,500,010 parameters"),
        ("notebook", {"depth": 40}, "model.depth: notebook has no setting for the depth; use model.num_layers instead"),
    ],
)
def test_problem_is_named(variant: str, options: dict[str, Any], problem: str) -> None:
    (found,) = problems_of(variant, **options)
    assert found.startswith(problem)


def test_all_problems_are_named_at_once() -> None:
    problems = problems_of("densenet", num_classes=0, growth_rate=-2, depth=42, drop_rate=2.0, block="x")
    named = ["model.depth", "model.growth_rate", "model.num_classes", "model.drop_rate", "model.block"]
    assert [line.partition(":")[0] for line in problems] == named


@pytest.mark.parametrize(
    ("variant", "blocks", "smallest"),
    [("notebook", 4, 16), ("notebook", 1, 2), ("densenet_bc", 3, 4), ("densenet", 6, 32), ("densenet121", 4, 29)],
)
def test_smallest_image(variant: str, blocks: int, smallest: int) -> None:
    options: dict[str, Any] = {"num_classes": 10, "growth_rate": 2, "num_layers": [1] * blocks}
    for side in (smallest, smallest + 1, 2 * smallest - 1):  # pooling rounds odd sizes
        net = on_meta(variant, image_size=side, **options).eval()
        assert net(torch.empty(2, 3, side, side, device="meta")).shape == (2, 10)
    (problem,) = problems_of(variant, image_size=smallest - 1, **options)
    assert problem.endswith(f"images of at least {smallest}x{smallest}")
