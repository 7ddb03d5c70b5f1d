"""The state of a `Trainer` in checkpoints: what is saved, what is restored, and the checks between them."""

from __future__ import annotations

import copy
from typing import Any

import torch

from densenet_dist.custom import is_custom, user_code_errors
from densenet_dist.errors import CheckpointError, TrainingError
from densenet_dist.train.custom_parts import load_custom_state, require_plain
from densenet_dist.train.inputs import digest_of_files
from densenet_dist.train.optim import load_optimizer_state
from densenet_dist.train.ranks import broadcast, gather_ranks
from densenet_dist.train.snapshot import Snapshot, identity_of, load_weights, require_same
from densenet_dist.train.trainer import Trainer


def take_snapshot(trainer: Trainer, metrics: dict[str, float] | None = None, *, validated: bool = True) -> Snapshot:
    """Return the current state, which refers to the trainer's tensors. A collective call.

    It contains the running metrics of every rank.
    """
    sums = gather_ranks(torch.stack([trainer.metrics.sums, trainer.logged.sums], dim=0)).cpu()
    state = {
        **custom_states(trainer),
        "scaler": trainer.scaler.state_dict(),
        "lr_controller": trainer.lr_controller.state_dict(),
        "sums": sums[:, 0].contiguous(),
        "clock": {
            "seconds": trainer.train_time()[0],
            "epoch_time": trainer.epoch_time(),
            "logged_at": trainer.logged_at,
            "goodput": trainer.goodput.state_dict(),
        },
        "epoch_lr": trainer.epoch_lr,
        "pictures": digest_of_files(trainer.dataset),
        "identity": identity_of(trainer.config, trainer.dataset),
    }
    if trainer.config.log.every_steps is not None:
        state["logged"] = sums[:, 1].contiguous()
    average = trainer.average.model.state_dict() if trainer.average else None
    return Snapshot(trainer.model.state_dict(), average, state, trainer.position, metrics or {}, validated)


def custom_states(trainer: Trainer) -> dict[str, Any]:
    """Return the states of the optimizer and the callbacks, which can be custom ones.

    Raises:
        TrainingError: one fails, or returns what `require_plain` refuses.
    """
    optimizer = trainer.optimizer.state_dict()
    if is_custom(name := trainer.config.train.optimizer.name):
        require_plain(optimizer, name)
    callbacks = {}
    for name, callback in trainer.callbacks.items():
        with user_code_errors("callbacks", f"{name}.state_dict", TrainingError):
            callbacks[name] = copy.deepcopy(callback.state_dict())  # it may change while it is written
        require_plain(callbacks[name], name)
    return {"optimizer": optimizer, "callbacks": callbacks}


def resume(trainer: Trainer) -> None:
    """Restore the latest intact checkpoint, if there is one.

    Rank 0 reads and verifies it for all ranks, so that a restart of many workers does not load the storage.
    """
    snapshot = None
    if trainer.context.rank == 0:
        snapshot = trainer.store.load_latest()
        if trainer.store.rebuilt:
            trainer.context.warn(f"{trainer.store.rebuilt}; rebuilt from the folders of the checkpoints")
        report_damage(trainer)
    snapshot = broadcast(snapshot)
    if snapshot is not None:
        restore(trainer, snapshot)
        digest = digest_of_files(trainer.dataset)
        if snapshot.state.get("pictures", digest) != digest:  # older checkpoints do not have it
            trainer.context.warn("the images differ from those at the start of the run, so its results will differ too")


def report_damage(trainer: Trainer) -> None:
    """Show which checkpoints were found damaged while loading."""
    for problem in trainer.store.damaged:
        trainer.context.warn(f"{problem}; it is skipped")


def restore(trainer: Trainer, snapshot: Snapshot) -> None:
    """Load a checkpoint.

    Raises:
        CheckpointError: it does not fit this model, or its content is not that of a checkpoint.
    """
    origin = f"the checkpoint of step {snapshot.position.global_step}"
    try:
        _restore(trainer, snapshot, origin)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # subclasses are errors of the device, such as torch.OutOfMemoryError
        raise CheckpointError(
            f"{origin} is damaged: {type(error).__name__}: {error}\n"
            "  delete its folder to resume from the checkpoint before it, or restore a copy"
        ) from error


def _restore(trainer: Trainer, snapshot: Snapshot, origin: str) -> None:
    state = snapshot.state
    require_same(snapshot, identity_of(trainer.config, trainer.dataset), origin)
    controller = state["lr_controller" if "lr_controller" in state else "course"]  # its name in older checkpoints
    if snapshot.position.step > trainer.steps_per_epoch:
        raise ValueError(f"an epoch has {trainer.steps_per_epoch} steps, not {snapshot.position.step}")
    load_weights(trainer.model, snapshot.model, origin)
    if trainer.average:
        load_weights(trainer.average.model, snapshot.average or snapshot.model, origin)
    load_state = load_custom_state if is_custom(trainer.config.train.optimizer.name) else load_optimizer_state
    load_state(trainer.optimizer, state["optimizer"])
    for name, saved in state.get("callbacks", {}).items():
        callback = trainer.callbacks[name]
        with user_code_errors("callbacks", f"{name}.load_state_dict", TrainingError):
            callback.load_state_dict(saved)
    # Only the state is restored: settings such as the growth interval come from the configuration.
    scale = {key: state["scaler"][key] for key in ("scale", "_growth_tracker") if key in state["scaler"]}
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | scale)
    trainer.lr_controller.load_state_dict(controller)
    trainer.metrics.restore(state["sums"], trainer.context.rank, trainer.context.world_size)
    trainer.position = snapshot.position
    trainer.goodput.load_state_dict(state["clock"]["goodput"])
    (trained, waited), (epoch_trained, epoch_waited) = trainer.train_time(), state["clock"]["epoch_time"]
    trainer.epoch_start = trained - epoch_trained, waited - epoch_waited
    trainer.logged.restore(state.get("logged", state["sums"]), trainer.context.rank, trainer.context.world_size)
    trainer.logged_at = state["clock"]["logged_at"] if "logged" in state else trained
    first_step = snapshot.position.global_step - snapshot.position.step
    trainer.epoch_lr = state.get("epoch_lr", trainer.lr_controller.lr(first_step))
    trainer.saved_step = snapshot.position.global_step
