"""Train the network of configs/cifar10_small.yaml as one would without this project: what it has to be faster than.

    python benchmarks/plain_training.py DATA     # DATA/cifar-10-batches-py, downloaded where it is missing
    densenet-dist train configs/cifar10_small.yaml cluster.engine=local data.root=DATA

Both train on 45,000 images per epoch; compare the images/s of epochs after the first.
"""

import sys
import time

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from densenet_dist.model.variants import densenet

root, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8
augment = v2.Compose(
    [
        v2.ToImage(),
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ]
)
images = Subset(CIFAR10(root, download=True, transform=augment), range(45_000))
loader = DataLoader(images, batch_size=128, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
model = densenet(variant="densenet", growth_rate=16, num_layers=[2, 4, 6], compression=0.5, num_classes=10)
model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * len(loader), pct_start=0.2)
for epoch in range(epochs):
    started, correct = time.perf_counter(), 0
    for batch, labels in loader:
        logits = model(batch.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        correct += int((logits.argmax(1) == labels).sum())
    seen, seconds = len(loader) * 128, time.perf_counter() - started
    print(f"epoch {epoch + 1}: {seen / seconds:.1f} images/s, train top-1 {100 * correct / seen:.2f} %", flush=True)
