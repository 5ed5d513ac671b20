"""`HyperparameterSpace`: the hyperparameters of one model as a module: raw values, scales, names, bounds, sampling.

Shape suffixes: B examples, H hyperparameters.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stn_fx.errors import CheckpointError, InputError, UnknownHyperparameterError
from stn_fx.hparams.constraint import constrain, round_straight_through, unconstrain
from stn_fx.hparams.resolve import ResolvedHyperparameter

# What must agree for raw values of a checkpoint to mean the same; initial values and scales only say where a run began.
MEANING = ("name", "low", "high", "discrete")


class HyperparameterSpace(nn.Module):
    """H hyperparameters that an outer optimizer tunes.

    Attributes:
        raw: Parameter (H,), unconstrained values.
        raw_scale: Parameter (H,); `softplus(raw_scale)` is the standard deviation of the perturbation in raw space.
        resolved: the description of each, in the order of the axis H.

    Args:
        resolved: hyperparameters with distinct names; none gives a space with H = 0.
        dtype: of both parameters; torch's default dtype where None.
        device: of both parameters.

    Raises:
        InputError: two hyperparameters have the same name.
    """

    low_H: Tensor
    high_H: Tensor
    discrete_H: Tensor

    def __init__(
        self,
        resolved: Sequence[ResolvedHyperparameter] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.resolved = tuple(resolved)
        self._index = {each.name: position for position, each in enumerate(self.resolved)}
        if len(self._index) != len(self.resolved):
            twice = sorted({each.name for each in self.resolved if self.names.count(each.name) > 1})
            raise InputError(f"Hyperparameters named twice: {', '.join(twice)}. Keep one of each.")

        dtype = dtype or torch.get_default_dtype()

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.raw = nn.Parameter(column([each.raw_initial() for each in self.resolved]))
        self.raw_scale = nn.Parameter(column([_inverse_softplus(each.scale) for each in self.resolved]))
        self.register_buffer("low_H", column([each.low for each in self.resolved]), persistent=False)
        self.register_buffer("high_H", column([each.high for each in self.resolved]), persistent=False)
        discrete = torch.tensor([each.discrete for each in self.resolved], dtype=torch.bool, device=device)
        self.register_buffer("discrete_H", discrete, persistent=False)

    def __len__(self) -> int:
        return len(self.resolved)

    @property
    def names(self) -> tuple[str, ...]:
        """Full names in the order of the axis H."""
        return tuple(each.name for each in self.resolved)

    @property
    def per_batch(self) -> list[int]:
        """Positions of the hyperparameters of which all examples of a batch have one value."""
        return [position for position, each in enumerate(self.resolved) if each.per_batch]

    def index(self, name: str) -> int:
        """Position of a hyperparameter on the axis H; UnknownHyperparameterError with all names where there is none."""
        if name not in self._index:
            raise UnknownHyperparameterError(
                f"There is no hyperparameter named {name!r} here. There are: {', '.join(self.names) or 'none'}."
            )
        return self._index[name]

    def column(self, values_BH: Tensor, name: str) -> Tensor:
        """The values (B,) of one hyperparameter out of (B, H)."""
        return values_BH[..., self.index(name)]

    def scales(self) -> Tensor:
        """Standard deviations (H,) of the perturbation in raw space, differentiable in `raw_scale`."""
        return F.softplus(self.raw_scale)

    def constrain(self, raw_BH: Tensor) -> Tensor:
        """Constrained values (..., H) of raw ones, in the dtype of `raw_BH`; discrete columns are integers.

        Differentiable elementwise (straight through the rounding), also under torch.func transforms.
        """
        low_H, high_H = self.low_H.to(raw_BH.dtype), self.high_H.to(raw_BH.dtype)
        values_BH = constrain(raw_BH, low_H, high_H)
        if any(each.discrete for each in self.resolved):
            values_BH = round_straight_through(values_BH, self.discrete_H)
        return values_BH

    def values(self) -> dict[str, float]:
        """Current constrained values by name, within the bounds, discrete ones rounded. Reads them from the device."""
        # Bounds in float32 may lie a rounding outside the bounds as given.
        return {
            each.name: min(max(value, each.low), each.high)
            for each, value in zip(self.resolved, self.constrain(self.raw.detach()).tolist(), strict=True)
        }

    @torch.no_grad()
    def set_values(self, values: Mapping[str, float]) -> None:
        """Set constrained values by name, in place; all are checked before any is set.

        Raises:
            UnknownHyperparameterError: a name that the space does not have.
            OutOfBoundsError: a value at or outside its bounds.
        """
        raw = {self.index(name): self._raw_of(name, float(value)) for name, value in values.items()}
        for position, value in raw.items():
            self.raw[position] = value

    def _raw_of(self, name: str, value: float) -> float:
        resolved = self.resolved[self.index(name)]
        return unconstrain(name, value, resolved.low, resolved.high)

    def perturb(self, noise_BH: Tensor) -> Tensor:
        """Raw values `raw + softplus(raw_scale) * noise` (B, H), differentiable in `raw` and `raw_scale`."""
        return self.raw + self.scales() * noise_BH

    def sample(self, batch_size: int, generator: Generator | None = None) -> Tensor:
        """Raw values (B, H) perturbed by independent Gaussian noise for each example, reparametrised.

        That is what the response pass takes. On the training graph a hyperparameter with one value per batch needs the
        same number in all rows, as `stn_fx.bilevel.PerExample.inner` draws it.

        Args:
            batch_size: B.
            generator: source of the noise, on the device of `raw`.
        """
        shape = (batch_size, len(self))
        noise_BH = torch.randn(shape, generator=generator, dtype=self.raw.dtype, device=self.raw.device)
        return self.perturb(noise_BH)

    def entropy(self) -> Tensor:
        """Entropy (scalar, nats) of the Gaussian that `sample` draws from: sum of 0.5 * log(2 pi e scale^2)."""
        return (0.5 * math.log(2.0 * math.pi * math.e) + torch.log(self.scales())).sum()

    def specs(self) -> list[dict[str, object]]:
        """JSON-able description of each hyperparameter, in the order of the axis H."""
        return [each.to_dict() for each in self.resolved]

    def extra_repr(self) -> str:
        return "\n".join(
            f"{each.name}: {each.low:g} to {each.high:g}{', discrete' * each.discrete}" for each in self.resolved
        )

    def get_extra_state(self) -> list[dict[str, object]]:
        """The specs, as part of the state_dict."""
        return self.specs()

    def set_extra_state(self, state: list[dict[str, object]]) -> None:
        """Check that the specs of a checkpoint mean the same; CheckpointError names what differs."""
        theirs = {str(spec["name"]): spec for spec in state}
        ours = {str(spec["name"]): spec for spec in self.specs()}
        lines = [f"only in the checkpoint: {name}" for name in theirs if name not in ours]
        lines += [f"only here: {name}" for name in ours if name not in theirs]
        for name in sorted(theirs.keys() & ours.keys()):
            for key in MEANING:
                there, here = theirs[name].get(key), ours[name][key]
                if there != here:
                    lines.append(f"{name}: {key} is {there} in the checkpoint and {here} here")
        if not lines and list(theirs) != list(ours):
            lines.append(f"the order in the checkpoint is {', '.join(theirs)}")
        if lines:
            raise CheckpointError(
                "The checkpoint was made with other hyperparameters:\n  "
                + "\n  ".join(lines)
                + "\nBuild the wrapper with the same hparams, or load only the model's own weights."
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # torch copies tensors before it looks at extra state: check first, so that a refusal changes nothing here.
        extra = state_dict.get(prefix + "_extra_state")
        if extra is not None:
            self.set_extra_state(extra)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _inverse_softplus(scale: float) -> float:
    """log(exp(scale) - 1), without overflow for large scales."""
    return scale + math.log(-math.expm1(-scale))
