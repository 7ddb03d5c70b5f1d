"""The training loop over several processes: the same course as one process on the same global batches."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from runs import job_of, records, run_of, tiny, train, weights_of

from densenet_dist.errors import TrainingError
from densenet_dist.train.engine import evaluate_model, train_step
from densenet_dist.train.evaluation import evaluate

# In eval mode the whole step is a sum over images, so any share of it can be checked; 11 images over 2 or 3 ranks and
# in up to 3 parts are never equal shares.
SHARES = ["train.global_batch_size=11", "train.clip_grad_norm=0.5", "train.label_smoothing=0.1"]


def step_by_step(storage: str, parts: int) -> dict[str, Any]:
    """Take an epoch's steps with BatchNorm in eval mode."""
    job = job_of(tiny(storage, *SHARES, f"train.grad_accum_steps={parts}"))
    job.forward.eval()
    sizes = []
    for batch in job.train_loader.epoch(0):
        train_step(job, batch)
        sizes.append((len(batch.labels), batch.global_size))
    weights = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    return {"weights": weights, "metrics": job.metrics.compute(), "sizes": sizes, "step": job.position}


@pytest.mark.parametrize(("world_size", "parts"), [(2, 1), (2, 3), (3, 1)])
def test_the_gradient_of_unequal_shares_is_that_of_the_whole_batch(tmp_path, world_size, parts):
    whole = step_by_step(str(tmp_path), 1)
    ranks = run_ranks(step_by_step, world_size, str(tmp_path), parts)
    assert any(size * world_size != total for size, total in ranks[0]["sizes"])
    for rank in ranks:
        assert rank["step"] == whole["step"]
        assert rank["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)
        for name, tensor in whole["weights"].items():
            torch.testing.assert_close(rank["weights"][name], tensor, rtol=2e-6, atol=2e-6)
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name]), name
    assert whole["metrics"]["images"] == 67


def fit_and_count(storage: str, settings: list[str]) -> dict[str, Any]:
    config = tiny(storage, *settings)
    summary = train(config)
    job = job_of(config)
    val = evaluate_model(job.model, job.val_loader, job.context.device, "fp32")
    for batch in job.train_loader.epoch(0):
        train_step(job, batch)
    return {
        "summary": {**summary, "train_seconds": 0},
        "val images": val["images"],
        "train images": job.metrics.compute()["images"],
        "own": float(job.metrics.sums[3]),
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_synchronised_batchnorm_follow_one_process(tmp_path, world_size):
    settings = ["train.sync_bn=true", "train.ema_decay=0.9", "train.optimizer.weight_decay=0.001"]
    alone, together = (tiny(tmp_path / name, *settings) for name in ("alone", "together"))
    expected = fit_and_count(alone.storage, settings)
    ranks = run_ranks(fit_and_count, world_size, together.storage, settings)
    for found, line in zip(records(together), records(alone), strict=True):
        assert found == pytest.approx(line, rel=1e-5)
    for rank in ranks:
        assert rank["summary"]["test/loss"] == pytest.approx(expected["summary"]["test/loss"], rel=1e-5)
        assert rank["summary"] == ranks[0]["summary"]
        assert (rank["val images"], rank["train images"]) == (8, 67)
    assert sum(rank["own"] for rank in ranks) == 67
    assert weights_of(together).keys() == weights_of(alone).keys()


def test_without_it_each_rank_has_statistics_of_its_own_and_rank_0s_are_judged(tmp_path):
    alone, together = (tiny(tmp_path / name) for name in ("alone", "together"))
    train(alone)
    first, second = run_ranks(fit_and_count, 2, together.storage, [])
    assert first["summary"] == second["summary"]
    # Rank 0's statistics are those in the checkpoints, and all ranks judge with them.
    for split, figure in (("val", records(together)[-2]), ("test", records(together)[-1])):
        again = evaluate(run_of(together).path, split=split, checkpoint="last" if split == "val" else "best")
        assert again["loss"] == pytest.approx(figure[f"{split}/loss"], rel=1e-6)
    losses = [[line["train/loss"] for line in records(config)[:-1]] for config in (together, alone)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def diverge(storage: str) -> list[str]:
    told = []
    # In one step for all, then in one rank's share alone.
    try:
        train(tiny(storage, "train.lr=1e30", "train.schedule.name=constant"))
    except TrainingError as error:
        told.append(str(error))
    job = job_of(tiny(storage, "train.epochs=1"))
    for batch in job.train_loader.epoch(0):
        if dist.get_rank() == 1 and job.position.step == 2:
            batch.images[0, 0, 0, 0] = math.nan
        train_step(job, batch)
    told.append(str(job.agreement.look().not_finite))
    return told


def test_all_ranks_stop_at_the_same_step_with_the_same_words(tmp_path):
    first, second = run_ranks(diverge, 2, str(tmp_path))
    assert first == second
    assert first[0].startswith("the loss is NaN or infinite at step 1 (epoch 1); no checkpoint was saved yet")
    assert first[1] == "2"
