"""What is counted: against NumPy, over ranks of unequal shares, and across a restore."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_ranks

from densenet_dist.train.metrics import Metrics

CPU = torch.device("cpu")


def batch(size: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = (
        torch.randn(size, classes, generator=generator),
        torch.randint(classes, (size,), generator=generator),
    )
    logits[torch.arange(size), labels] += 1.5  # better than chance
    return logits, labels


def count(metrics: Metrics, logits: torch.Tensor, labels: torch.Tensor) -> None:
    metrics.update(F.cross_entropy(logits.float(), labels, reduction="sum"), logits, labels)


def expected(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    scores, classes = logits.double().numpy(), labels.numpy()
    log_sum = np.log(np.exp(scores).sum(1))
    loss = (log_sum - scores[np.arange(len(classes)), classes]).mean()
    order = np.argsort(-scores, axis=1)
    top1 = (order[:, 0] == classes).mean()
    top5 = (order[:, :5] == classes[:, None]).any(1).mean()
    return {"loss": loss, "top1": top1, "top5": top5, "images": float(len(classes))}


@pytest.mark.parametrize(("classes", "dtype"), [(5, torch.float32), (100, torch.bfloat16)])
def test_batches_of_any_size_add_up_to_numpys_means(classes, dtype):
    logits, labels = batch(101, classes)
    metrics = Metrics(CPU)
    for start, stop in ((0, 1), (1, 40), (40, 101)):
        count(metrics, logits[start:stop].to(dtype), labels[start:stop])
    assert metrics.compute() == pytest.approx(expected(logits.to(dtype).float(), labels), rel=1e-6)


def test_a_hit_on_a_mixed_image_counts_as_much_as_its_label():
    logits, labels = batch(50, 10)
    others = labels.roll(1)
    targets = 0.7 * F.one_hot(labels, 10).float() + 0.3 * F.one_hot(others, 10).float()
    metrics = Metrics(CPU)
    metrics.update(F.cross_entropy(logits, targets, reduction="sum"), logits, targets)
    one, other = expected(logits, labels), expected(logits, others)
    blended = {name: 0.7 * one[name] + 0.3 * other[name] for name in one}
    assert metrics.compute() == pytest.approx(blended, rel=1e-5)


SHARES = [slice(0, 7), slice(7, 30)]


def count_shares() -> dict[str, object]:
    rank = dist.get_rank()
    logits, labels = batch(30, 10)
    metrics, same, other = Metrics(CPU), Metrics(CPU), Metrics(CPU)
    count(metrics, logits[SHARES[rank]], labels[SHARES[rank]])
    gathered = metrics.gather()
    same.restore(gathered, rank, 2)
    other.restore(torch.cat([gathered, gathered[:1]]), rank, 2)  # of three ranks
    return {
        "metrics": metrics.compute(),
        "own": torch.equal(same.sums, metrics.sums),
        "of three": other.sums.tolist(),
        "gathered": gathered.tolist(),
    }


def test_ranks_have_the_same_means_and_take_up_their_sums_again():
    first, second = run_ranks(count_shares, 2)
    assert first["metrics"] == pytest.approx(expected(*batch(30, 10)), rel=1e-6)
    assert first["metrics"] == second["metrics"]  # to the bit
    assert first["own"]
    assert second["own"]
    assert [row[3] for row in first["gathered"]] == [7, 23]
    # At another world size the sums go to rank 0, once.
    assert first["of three"] == pytest.approx(np.sum([*first["gathered"], first["gathered"][0]], axis=0))
    assert second["of three"] == [0.0] * 4
