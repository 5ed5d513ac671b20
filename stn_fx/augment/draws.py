"""Sources of random numbers. Everything random in stn_fx is drawn here and handed on as an argument.

A place that needs randomness asks a `Draws` by name; what follows is deterministic. One `torch.Generator` per source
makes a run resumable, and `ReplayDraws` hands out the same numbers again, which is what deterministic checks need.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from stn_fx.errors import InputError


class Draws:
    """Fresh random numbers from one generator.

    Args:
        generator: source of the numbers, on the device of the tensors that they are for; None for torch's global one.
    """

    def __init__(self, generator: Generator | None = None) -> None:
        self.generator = generator

    def uniform(self, shape: Sequence[int], like: Tensor, name: str) -> Tensor:
        """Uniform numbers in [0, 1) on the device of `like`: float64 where `like` is, else float32.

        Args:
            shape: shape of the result.
            like: the tensor that they are for.
            name: what they are for, unique within one pass.

        Raises:
            InputError: the generator is on another kind of device than `like`.
        """
        self._check_device(like, name)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.rand(tuple(shape), generator=self.generator, dtype=dtype, device=like.device)

    def normal(self, shape: Sequence[int], like: Tensor, name: str) -> Tensor:
        """Standard normal numbers; dtype, arguments and errors as for `uniform`."""
        self._check_device(like, name)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.randn(tuple(shape), generator=self.generator, dtype=dtype, device=like.device)

    def gamma(self, concentration: Tensor, like: Tensor, name: str) -> Tensor:
        """Gamma variates of scale 1, one for each concentration; dtype and errors as for `uniform`."""
        self._check_device(like, name)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch._standard_gamma(concentration.to(dtype), generator=self.generator)

    def permutation(self, size: int, like: Tensor, name: str) -> Tensor:
        """A random order of `size` things, int64, on the device of `like`; errors as for `uniform`."""
        self._check_device(like, name)
        return torch.randperm(size, generator=self.generator, device=like.device)

    def bits(self, shape: Sequence[int], like: Tensor, name: str) -> Tensor:
        """Uniform int16 numbers (16 random bits each) on the device of `like`; arguments and errors as for `uniform`.

        Four of them are cut from each 64-bit word of the generator. On CPU, where the generator is the bottleneck, that
        is six times faster than uniform floats.
        """
        self._check_device(like, name)
        count = math.prod(shape)
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
        # From the least int64 without an upper end is torch's form of "all 64 bits".
        words.random_(torch.iinfo(torch.int64).min, None, generator=self.generator)
        return words.view(torch.int16)[:count].view(tuple(shape))

    def _check_device(self, like: Tensor, name: str) -> None:
        if self.generator is not None and self.generator.device.type != like.device.type:
            raise InputError(
                f"Random numbers for {name!r} are needed on {like.device}, but the generator is on "
                f"{self.generator.device}. Make it with torch.Generator(device={str(like.device)!r})."
            )


class ReplayDraws(Draws):
    """Draws that are recorded by name when a name is first asked for, and the same numbers ever after."""

    def __init__(self, generator: Generator | None = None) -> None:
        super().__init__(generator)
        self._recorded: dict[tuple[str, str], Tensor] = {}

    def uniform(self, shape: Sequence[int], like: Tensor, name: str) -> Tensor:
        """As `Draws.uniform`; InputError where the recorded numbers have another shape or dtype."""
        return self._recall(("uniform", name), shape, like, super().uniform)

    def normal(self, shape: Sequence[int], like: Tensor, name: str) -> Tensor:
        """As `Draws.normal`; InputError where the recorded numbers have another shape."""
        return self._recall(("normal", name), shape, like, super().normal)

    def gamma(self, concentration: Tensor, like: Tensor, name: str) -> Tensor:
        """As `Draws.gamma`; InputError where the recorded numbers have another shape."""

        def draw(shape: Sequence[int], like: Tensor, name: str) -> Tensor:
            return Draws.gamma(self, concentration, like, name)

        return self._recall(("gamma", name), concentration.shape, like, draw)

    def permutation(self, size: int, like: Tensor, name: str) -> Tensor:
        """As `Draws.permutation`; InputError where the recorded order has another size."""

        def draw(shape: Sequence[int], like: Tensor, name: str) -> Tensor:
            return Draws.permutation(self, size, like, name)

        return self._recall(("permutation", name), (size,), like, draw)

    def bits(self, shape: Sequence[int], like: Tensor, name: str) -> Tensor:
        """As `Draws.bits`; InputError where the recorded numbers have another shape."""
        return self._recall(("bits", name), shape, like, super().bits)

    def _recall(
        self,
        key: tuple[str, str],
        shape: Sequence[int],
        like: Tensor,
        draw: Callable[[Sequence[int], Tensor, str], Tensor],
    ) -> Tensor:
        if key not in self._recorded:
            self._recorded[key] = draw(shape, like, key[1])
        recorded = self._recorded[key]
        if tuple(recorded.shape) != tuple(shape):
            raise InputError(
                f"Random numbers for {key[1]!r} were recorded with shape {tuple(recorded.shape)} and are now asked for "
                f"with {tuple(shape)}. Use a new ReplayDraws for each shape, and names that are unique within a pass."
            )
        # Callers may write into what they get: the record stays as it was.
        return recorded.to(like.device, copy=True)
