"""The small models of the tests: the papers' networks, and third-party architectures at the least useful size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn


class MLP(nn.Module):
    """Two layers and a dropout."""

    def __init__(self, features: int = 8, hidden: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.hidden, self.drop, self.head = nn.Linear(features, hidden), nn.Dropout(0.2), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.hidden(x).relu()))


class SimpleCNN(nn.Module):
    """The network of the STN and Delta-STN papers: two 5x5 convolutions and two fully connected layers, four dropouts.

    Narrower than theirs, so that the oracles are quick; (B, 1, size, size) to (B, classes).
    """

    def __init__(self, size: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.drop1 = nn.Conv2d(1, 6, 5, padding=2), nn.Dropout(0.05)
        self.conv2, self.drop2 = nn.Conv2d(6, 8, 5, padding=2), nn.Dropout(0.05)
        self.pool = nn.MaxPool2d(2)
        self.drop3, self.fc1 = nn.Dropout(0.05), nn.Linear(8 * (size // 4) ** 2, 16)
        self.drop4, self.fc2 = nn.Dropout(0.05), nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.pool(self.conv1(x).relu()))
        x = self.drop2(self.pool(self.conv2(x).relu()))
        x = self.fc1(self.drop3(x.flatten(1))).relu()
        return self.fc2(self.drop4(x))


@dataclass(frozen=True)
class Model:
    """One architecture of the oracle suite: how to build it, its input (without the batch) and its hyperparameters."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    hparams: Any = "dropout(shared),weight_decay"
    zero_gradients: tuple[str, ...] = ()
    frozen_norms: bool = False
    """Whether batch norms must be frozen for examples to be independent in training."""

    def inputs(self, batch: int) -> tuple[Tensor]:
        """A batch of random examples."""
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, *self.shape, generator=generator, dtype=torch.float64),)


IMAGE = (3, 32, 32)
MODELS: dict[str, Model] = {
    "mlp": Model(MLP, (8,)),
    "simple_cnn": Model(SimpleCNN, (1, 12, 12)),
    "resnet18": Model(lambda: torchvision.models.resnet18(num_classes=4), IMAGE, frozen_norms=True),
    "mobilenet_v3_small": Model(lambda: torchvision.models.mobilenet_v3_small(num_classes=4), IMAGE, frozen_norms=True),
    "convnext_tiny": Model(
        lambda: torchvision.models.ConvNeXt(
            [torchvision.models.convnext.CNBlockConfig(*sizes) for sizes in ((16, 32, 2), (32, 64, 2), (64, None, 1))],
            stochastic_depth_prob=0.2,
            num_classes=4,
        ),
        IMAGE,
        "drop_path(shared),dropout(shared),weight_decay",
    ),
    "swin_t": Model(
        lambda: torchvision.models.SwinTransformer(
            [2, 2], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.2, num_classes=4
        ),
        IMAGE,
        "drop_path(shared),dropout(shared),weight_decay",
    ),
    "vit": Model(
        lambda: torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
        ),
        IMAGE,
    ),
    "timm_vit": Model(
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_classes=4
        ),
        IMAGE,
    ),
}
"""Torchvision's convnext_tiny and swin_t in fewer and narrower blocks of the same kind, so that float64 is affordable;
the full ones are in `test_capture.py`."""
