"""How much privacy a training costs: epsilon by the accountant of dp-accounting, and the noise that keeps a budget."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

from lepton_xla.environment.extras import Needs
from lepton_xla.errors import FederatedError
from lepton_xla.federated.local_rounds import private_steps
from lepton_xla.federated.settings import Federation, Privacy

# More noise than this many clipping norms leaves nothing of a gradient.
_MOST_NOISE = 500.0
_TOLERANCE = 0.005
# Of the bound by Renyi divergences. At orders that are not whole its sums may not converge, which dp-accounting logs.
_ORDERS = (*range(2, 64), 128, 256, 512, 1024)


def epsilon(privacy: Privacy, noise: float, steps: int) -> float:
    """The epsilon that this many steps cost, by privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049).

    Args:
        privacy: delta and the share of rows of a step.
        noise: standard deviation of the noise in clipping norms.
        steps: steps that took part; 0 costs nothing.

    Raises:
        FederatedError: if dp-accounting is not installed.

    >>> epsilon(lx.federated.Privacy(share=0.01), 1.1, 0)
    0.0
    """
    return _spent(privacy.share, privacy.delta, float(noise), int(steps)) if steps else 0.0


@functools.lru_cache(maxsize=256)
def _spent(share: float, delta: float, noise: float, steps: int) -> float:
    dp: Any = _library()
    accountant = dp.pld.PLDAccountant()
    accountant.compose(_event(dp, share, noise), steps)
    return float(accountant.get_epsilon(delta))


def calibrate_noise(settings: Federation, rounds: int) -> float:
    """The noise multiplier with which a client that takes part in so many rounds keeps its budget.

    Args:
        settings: with `privacy`; a given `noise` is checked instead.
        rounds: rounds that one client takes part in.

    Raises:
        FederatedError: if the budget cannot be kept with the given noise, or with any that leaves something of the
            gradients; says what would help. Or if dp-accounting is not installed.

    >>> settings = lx.federated.Federation(privacy=lx.federated.Privacy(epsilon=1.0, noise=0.5))
    >>> calibrate_noise(settings, 20)  # doctest: +SKIP
    Traceback (most recent call last):
    lepton_xla.errors.FederatedError: privacy: noise = 0.5 over 200 steps costs epsilon = 89.4, more than 1; ...
    """
    privacy = settings.privacy
    assert privacy is not None
    steps = rounds * private_steps(settings)
    if privacy.noise is not None:
        costs = epsilon(privacy, privacy.noise, steps)
        if costs > privacy.epsilon:
            raise FederatedError(
                f"privacy: noise = {privacy.noise:g} over {steps} steps costs epsilon = {costs:.3g}, more than "
                f"{privacy.epsilon:g}; give more noise, fewer rounds or epochs, or leave noise out to have it found"
            )
        return privacy.noise
    return _least_noise(privacy.epsilon, privacy.delta, privacy.share, steps)


@functools.lru_cache(maxsize=64)
def _least_noise(target: float, delta: float, share: float, steps: int) -> float:
    dp: Any = _library()

    def costs(noise: float, accountant: Any) -> float:
        accountant.compose(_event(dp, share, noise), steps)
        return float(accountant.get_epsilon(delta))

    def keeps(noise: float) -> bool:
        return costs(noise, dp.pld.PLDAccountant()) <= target

    # The Renyi accountant is quick and a little pessimistic: its answer is a bound from above.
    high = 0.3
    while costs(high, dp.rdp.RdpAccountant(_ORDERS)) > target:
        high *= 1.3
        if high > _MOST_NOISE:
            raise FederatedError(
                f"privacy: epsilon = {target:g} at delta = {delta:g} over {steps} steps would take noise of more than "
                f"{_MOST_NOISE:g} times the clipping norm, which leaves nothing to learn from; give a larger epsilon, "
                "fewer rounds or epochs, or let each client take part in fewer rounds (participation)"
            )
    low = high / 2
    while keeps(low) and low > 1e-2:
        high, low = low, low / 2
    while high / low > 1 + _TOLERANCE:
        middle = math.sqrt(high * low)
        if keeps(middle):
            high = middle
        else:
            low = middle
    return high


def _event(dp: Any, share: float, noise: float) -> Any:
    return dp.PoissonSampledDpEvent(share, dp.GaussianDpEvent(noise))


def _library() -> Any:
    with Needs("federated", "accounting for privacy"):
        for name in ("pld", "rdp"):
            importlib.import_module(f"dp_accounting.{name}")
        return importlib.import_module("dp_accounting")
