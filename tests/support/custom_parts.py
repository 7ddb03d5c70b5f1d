"""The parts of docs/extending.md, and an optimizer with state of every kind."""

import torch
from pages import ROOT, blocks

exec(blocks(ROOT / "docs" / "extending.md", "python")[0].text)


class Noisy(torch.optim.Optimizer):
    """Sign descent with random noise; its state has other types than the weights, and lies in the groups too."""

    def __init__(self, parameter_groups, lr: float, *, momentum: float = 0.9):
        super().__init__(parameter_groups, {"lr": lr, "momentum": momentum, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p, dtype=torch.float64))
                average.mul_(group["momentum"]).add_(p.grad + 1e-3 * torch.randn_like(p))
                p.add_(average.sign(), alpha=-group["lr"] / group["steps"] ** 0.1)


MODEL = ["model.variant=custom_parts:small_net", "model.growth_rate=null", "model.num_layers=null", "model.drop_rate=0"]
CUSTOM = [
    *(*MODEL, "data.name=custom_parts:stripes", "options.dataset.images=75", "data.augment=custom_parts:mirror"),
    *("train.loss=custom_parts:focal", "train.label_smoothing=0", "train.optimizer.name=custom_parts:Noisy"),
    *("train.schedule.name=custom_parts:linear", "train.lr=0.003", "callbacks=[custom_parts:Best]"),
]
"""Settings that make each part of a tiny run a custom one."""
