"""Does tuning find the weight decay of ridge regression, from every seed, and what does the start of the response do?

    python examples/benchmarks/ridge.py                                   # some minutes
    python examples/benchmarks/ridge.py --initial 0.005 --seeds 0 1 2 3 4 5 6 7 8 9

The best weights for a weight decay, and so the best weight decay, are known in closed form. Told is the validation loss
that is left to gain, as a share of what there was to gain at the start value: 0 is the optimum, 1 and more a run that
went astray. "U at zero" is how responses start here; "V at zero", with U drawn as a layer's weights, how they start in
the papers' code.
"""

import argparse
import math
import statistics
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, RMSprop

import stn_fx
from stn_fx.bilevel import EveryKth, Linearized
from stn_fx.rules.structure import RowWise

EXAMPLES, FEATURES, OUTPUTS = 24, 6, 3
HIGH = 4.0
STEPS, WARM_UP, TRAIN_STEPS = 1500, 100, 3
COPIES = 16
"""Every example so often in a batch, with a perturbation of its own each time."""
ASTRAY = 0.5


class Ridge:
    """Noisy linear regression with few examples to train on and many to validate on."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        truth = 0.4 * draw(OUTPUTS, FEATURES)
        self.x, self.x_valid = draw(EXAMPLES, FEATURES), draw(400, FEATURES)
        self.y = self.x @ truth.t() + 1.5 * draw(EXAMPLES, OUTPUTS)
        self.y_valid = self.x_valid @ truth.t() + 1.5 * draw(400, OUTPUTS)

    def valid_loss(self, decay: float) -> float:
        """Validation loss of the best weights for this weight decay."""
        gram = self.x.t() @ self.x / EXAMPLES + decay * torch.eye(FEATURES, dtype=torch.float64)
        weights = self.y.t() @ self.x / EXAMPLES @ torch.linalg.inv(gram)
        return float(squared_error(self.x_valid @ weights.t(), self.y_valid).mean())

    @property
    def best(self) -> float:
        """The lowest validation loss that a weight decay reaches."""
        return min(self.valid_loss(decay) for decay in np.geomspace(1e-4, 0.99 * HIGH, 1000))


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared distance, (B,)."""
    return 0.5 * (output - target).square().sum(-1)


@torch.no_grad()
def start_with_v_at_zero(response: RowWise, seed: int) -> None:
    """The other way round: U uniform within 1/sqrt(fan in)."""
    bound = 1 / math.sqrt(response.U.shape[1])
    response.U.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    response.V.zero_()


def tuned_decay(problem: Ridge, initial: float, seed: int, v_at_zero: bool) -> float:
    """The weight decay that one run ends with."""
    torch.manual_seed(seed)
    model = nn.Linear(FEATURES, OUTPUTS, bias=False).double()
    decay = stn_fx.Hyperparameter("weight_decay", initial=initial, low=0.0, high=HIGH, scale=0.3)
    stn = stn_fx.transform(model, [decay], (problem.x,), seed=seed)
    if v_at_zero:
        start_with_v_at_zero(stn.responses()["weight"], seed)  # type: ignore[arg-type]
    sgd = partial(SGD, lr=0.1)
    steps = stn_fx.DeltaSTN(
        stn,
        squared_error,
        base_optimizer=sgd,
        response_optimizer=sgd,
        hyper_optimizer=partial(RMSprop, lr=0.03),
        scale_optimizer=partial(RMSprop, lr=0.003),
        response_step=EveryKth(Linearized(), 2),  # more often than by default: the run is short
    )
    batch = (problem.x.repeat(COPIES, 1), problem.y.repeat(COPIES, 1))
    for step in range(STEPS):
        steps.inner_step(batch)
        if step > WARM_UP and step % TRAIN_STEPS == 0:
            steps.outer_step((problem.x_valid, problem.y_valid))
    return stn.hparams.values()["weight_decay"]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial", type=float, nargs="+", default=[0.005, 0.02, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()

    torch.set_num_threads(1)  # matrices of a few rows gain nothing from more
    problem, console = Ridge(), Console()
    table = Table(title="share of the gain in validation loss that is left", title_justify="left")
    for column in ("response starts with", "weight decay starts at", "median", "largest", "astray"):
        table.add_column(column, justify="left" if column.startswith("response") else "right")
    for v_at_zero in (False, True):
        for initial in options.initial:
            gain = problem.valid_loss(initial) - problem.best
            left = []
            for seed in options.seeds:
                decay = tuned_decay(problem, initial, seed, v_at_zero)
                left.append((problem.valid_loss(decay) - problem.best) / gain)
            table.add_row(
                "V at zero" if v_at_zero else "U at zero",
                f"{initial:g}",
                f"{statistics.median(left):.3f}",
                f"{max(left):.3f}",
                f"{sum(share > ASTRAY for share in left)} of {len(left)}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
