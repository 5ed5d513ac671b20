"""Hyperparameters of one's own: on the input, on the activation of a named module, and in the loss.

    python examples/custom_hyperparameter.py

Each is a function of tensors with a name, bounds and a value to start from. Everything random comes from `draws`.
"""

import torch
from torch import Tensor, nn

import stn_fx
from stn_fx.augment import Draws


def gamma_jitter(x: Tensor, strength: Tensor, draws: Draws) -> Tensor:
    """Images in [0, 1] to a random power; `strength` has one value for each example and broadcasts against them."""
    power = draws.uniform((len(x), 1, 1, 1), x, "power") * 2 - 1
    return x.clamp(1e-6, 1) ** (strength * power).exp()


def soft_clip(x: Tensor, level: Tensor, draws: Draws) -> Tensor:
    """Activations bounded smoothly; differentiated by stn_fx."""
    return torch.tanh(x * level) / level.clamp(min=1e-3)


def small_scores(output: Tensor, target: Tensor, coefficient: Tensor) -> Tensor:
    """A term of the loss, one for each example."""
    return coefficient * output.square().mean(1)


HPARAMS = [
    stn_fx.CustomHyperparameter("gamma_jitter", gamma_jitter, acts_on="input", initial=0.1),
    stn_fx.CustomHyperparameter("soft_clip", soft_clip, acts_on="activation", at="0", low=0.01, high=2, initial=0.5),
    stn_fx.CustomHyperparameter("small_scores", small_scores, acts_on="loss", high=0.1, initial=1e-3),
    "weight_decay",
]


def main() -> dict[str, float]:
    """A few steps on random images; returns the values of all hyperparameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    images, labels = torch.rand(64, 1, 8, 8), torch.randint(3, (64,))
    training, held = (images[:32], labels[:32]), (images[32:], labels[32:])
    stn = stn_fx.transform(model, HPARAMS, training[:1], seed=0)
    steps = stn_fx.DeltaSTN(stn)
    for _ in range(5):
        steps.inner_step(training)
        steps.outer_step(held)
    return stn.hparams.values()


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name} = {value:.4g}")
