"""A ResNet-18 that has seen images and no label: pretrained to tell by how much they were turned
(Gidaris, Singh & Komodakis 2018, arXiv 1803.07728).

    python tests/benchmarks/rotations.py CIFAR10.npz OUT [--epochs 20] [--device cuda]

Of the 50,000 training images the last 20,000 are for this. Writes OUT/resnet18, a Hugging Face
directory, and OUT/cifar10.npz with the other 30,000 and the test images, for
simulations/comparisons/cifar10.toml: where no hub can be reached this stands in for a checkpoint
trained on ImageNet, and its batch norms have statistics to be frozen at.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

HELD_BACK, BATCH, RATE, DECAY = 20_000, 256, 0.1, 5e-4


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each mirrored or not, and moved by up to four pixels: [B, 3, 32, 32]."""
    mirror = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirror.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)
    down, right = torch.randint(9, (2,), generator=generator).tolist()
    return F.pad(images, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every image in four ways, and which."""
    four = torch.cat([images.rot90(k, (2, 3)) for k in range(4)])
    return four, torch.arange(4, device=images.device).repeat_interleave(len(images))


def pretrain(pixels: np.ndarray, epochs: int, device: str) -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=4
    )
    model = ResNetForImageClassification(config).to(device)
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        right = torch.zeros((), device=device)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            inputs, which = turned(shifted(images[rows.to(device)], generator))
            with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                logits = model(inputs).logits
            loss = F.cross_entropy(logits.float(), which)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += (logits.argmax(1) == which).float().mean()
        print(f"epoch {epoch + 1}: {float(right) / (len(images) // BATCH):.3f} right", flush=True)
    return model.eval().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    with np.load(given.images, allow_pickle=False) as data:
        arrays = {name: data[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    kept = len(arrays["x_train"]) - HELD_BACK
    given.out.mkdir(parents=True, exist_ok=True)
    own = {n: a[:kept] if n.endswith("train") else a for n, a in arrays.items()}
    np.savez(given.out / "cifar10.npz", **own)
    model = pretrain(arrays["x_train"][kept:], given.epochs, given.device)
    model.save_pretrained(given.out / "resnet18")


if __name__ == "__main__":
    main()
