"""The settings of a federated training: what the server decides and every client obeys."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from lepton_xla.errors import FederatedError, first_line

type Rule = Literal["average", "momentum", "adam"]
type UpdateFormat = Literal["float32", "int8", "int4", "int3", "top-k"]


@dataclasses.dataclass(frozen=True)
class Privacy:
    """Differential privacy of each row: every client clips and noises its own gradients (DP-SGD), so that nothing that
    leaves it says more about a row than epsilon allows, to the server either.

    Abadi et al. 2016, arXiv:1607.00133. Two data sets are neighbours if one has a row more. The number of rows of a
    client is not hidden.

    Attributes:
        epsilon: the budget of the whole training, above 0.
        delta: the probability that the guarantee may fail, well below one over the number of rows.
        clip_norm: largest norm of the gradient of one row.
        share: the probability by which each step takes each row, in (0, 1].
        noise: standard deviation of the noise in units of `clip_norm`; by default the least that keeps epsilon.

    Raises:
        FederatedError: if a value is out of range; names it.

    >>> lx.federated.Privacy(epsilon=0.0)
    Traceback (most recent call last):
    lepton_xla.errors.FederatedError: privacy: epsilon = 0.0; expected a number above 0
    """

    epsilon: float = 8.0
    delta: float = 1e-5
    clip_norm: float = 1.0
    share: float = 0.1
    noise: float | None = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "clip_norm") if self.noise is None else ("epsilon", "clip_norm", "noise"):
            _check_number("privacy: ", name, getattr(self, name))
        _check_number("privacy: ", "delta", self.delta, below=1.0)
        _check_number("privacy: ", "share", self.share, most=1.0)


@dataclasses.dataclass(frozen=True)
class Federation:
    """How clients and server train together.

    In each round the server sends the weights, each client that takes part trains on its own rows, and the server moves
    the weights towards the mean of theirs: `theta <- theta + alpha (theta* - theta)`.

    Attributes:
        rounds: number of rounds.
        epochs: how often a client goes through its rows in a round.
        batch_rows: rows of a client's batch; with `privacy`, its `share` decides.
        participation: share of the clients that take part in a round, in (0, 1].
        rule: what theta* is. `average`: the mean of the clients' weights, by their numbers of rows (FedAvg, McMahan et
            al. 2017, arXiv:1602.05629); `momentum`: theta plus a decaying sum of the moves (FedAvgM, Hsu et al. 2019,
            arXiv:1909.06335); `adam`: theta plus Adam's step along them (FedAdam, Reddi et al. 2021, arXiv:2003.00295).
        alpha: how far the weights go towards theta*, in (0, 1].
        momentum: decay of `momentum`, and the first of `adam`.
        proximal: weight of half the squared distance to the server's weights in the clients' loss (FedProx, Li et al.
            2020, arXiv:1812.06127); 0 for none.
        updates: what clients send: `float32`; `int8`, `int4` or `int3` codes in groups of 256, where int3 is -4 to 4
            and takes 3.26 bits with its scales; or `top-k`, the `kept` largest changes in int8. What rounding leaves
            out is sent with the next rounds (error feedback, Karimireddy et al. 2019, arXiv:1901.09847).
        kept: share of the changes that `top-k` sends.
        personal: regular expressions; weights whose whole path matches stay with their client, such as `.*head.*`.
        privacy: differential privacy of each row; None for none.
        secure: whether the server learns only the sum of the updates (SecAgg+, by Flower). Not with codes or `top-k`:
            sums of masked codes cannot be decoded.
        most_norm: largest norm of a client's update; larger ones are scaled down to it. None for no bound.
        most_rows: largest number of rows a client may say it has; others are refused.
        least_clients: good updates that a round needs; with fewer it changes nothing.
        seed: of participation, orders of rows, and simulated noise.

    Raises:
        FederatedError: if a value is out of range, or two exclude each other; names them.

    >>> lx.federated.Federation(updates="int4", secure=True)
    Traceback (most recent call last):
    lepton_xla.errors.FederatedError: secure aggregation adds up masked numbers, so it cannot take updates = 'int4'; ...
    """

    rounds: int = 20
    epochs: int = 1
    batch_rows: int = 32
    participation: float = 1.0
    rule: Rule = "average"
    alpha: float = 1.0
    momentum: float = 0.9
    proximal: float = 0.0
    updates: UpdateFormat = "float32"
    kept: float = 0.05
    personal: tuple[str, ...] = ()
    privacy: Privacy | None = None
    secure: bool = False
    most_norm: float | None = None
    most_rows: int = 10_000_000
    least_clients: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs", "batch_rows", "most_rows", "least_clients"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FederatedError(f"federation: {name} = {value!r}; expected a whole number of at least 1")
        for name in ("participation", "alpha", "kept"):
            _check_number("federation: ", name, getattr(self, name), most=1.0)
        if self.most_norm is not None:
            _check_number("federation: ", "most_norm", self.most_norm)
        for name, bound in (("proximal", math.inf), ("momentum", 1.0)):
            value = getattr(self, name)
            if value != 0:
                _check_number("federation: ", name, value, below=bound)
        for name, known in (("rule", ("average", "momentum", "adam")), ("updates", FORMATS)):
            if getattr(self, name) not in known:
                raise FederatedError(f"federation: {name} = {getattr(self, name)!r}; expected {', '.join(known)}")
        if self.secure and self.updates != "float32":
            raise FederatedError(
                f"secure aggregation adds up masked numbers, so it cannot take updates = {self.updates!r}; give "
                "updates = 'float32', or do without secure"
            )
        if isinstance(self.personal, str):
            raise FederatedError("federation: personal is a text; expected a tuple of regular expressions")
        for pattern in self.personal:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise FederatedError(f"federation: personal: {pattern!r} is no regular expression: {error}") from error

    def private(self, paths: Iterable[str]) -> set[str]:
        """Which of these paths stay with the clients.

        Raises:
            FederatedError: if a pattern matches none of them, or every path would stay.

        >>> lx.federated.Federation(personal=(".*head",)).private(["body", "the/head"])
        {'the/head'}
        """
        known = list(paths)
        found: set[str] = set()
        for pattern in self.personal:
            matching = {path for path in known if re.fullmatch(pattern, path)}
            if not matching:
                raise FederatedError(f"personal: {pattern!r} matches no weight; there are {', '.join(known[:6])}")
            found |= matching
        if len(found) == len(known):
            raise FederatedError("personal: every weight would stay with its client, and nothing is shared")
        return found

    def replace(self, **changes: Any) -> Federation:
        """A copy with other values.

        >>> lx.federated.Federation().replace(rounds=3).rounds
        3
        """
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """As JSON, which `of_json` reads."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def of_json(text: str | Mapping[str, Any]) -> Federation:
        """Read what `to_json` wrote.

        Raises:
            FederatedError: if it is something else, or a value is out of range.

        >>> settings = lx.federated.Federation(rounds=3, privacy=lx.federated.Privacy(epsilon=2.0))
        >>> lx.federated.Federation.of_json(settings.to_json()) == settings
        True
        """
        try:
            if isinstance(text, str):
                return msgspec.json.decode(text, type=Federation)
            return msgspec.convert(text, Federation)
        except msgspec.MsgspecError as error:
            raise FederatedError(f"the settings of the federation cannot be read: {first_line(error)}") from error


FORMATS = ("float32", "int8", "int4", "int3", "top-k")
"""What `Federation.updates` may be."""


def _check_number(where: str, name: str, value: Any, *, most: float = math.inf, below: float = math.inf) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most and value < below
    if not good:
        bound = f" and at most {most:g}" if most < math.inf else f" and below {below:g}" if below < math.inf else ""
        raise FederatedError(f"{where}{name} = {value!r}; expected a number above 0{bound}")
