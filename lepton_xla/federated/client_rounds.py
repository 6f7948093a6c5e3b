"""A client's round with what it keeps: its own weights, and what earlier updates left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.federated.local_rounds import LocalRound, moving
from lepton_xla.federated.settings import Federation
from lepton_xla.federated.updates import Codec, Layout, Payload

type Kept = dict[str, Any]
"""What a client keeps between rounds: `residual`, a vector (empty if updates are exact), and `personal`, its weights by
path."""

type ClientRound = Callable[[Any, Kept, Any, jax.Array], tuple[Payload, Kept, jax.Array, Any]]
"""`client_round(shared, kept, data, key) -> (update, kept, n, metrics)`. If the round came to something that is not
finite, `metrics["finite"]` is 0, and what is kept is what it was."""


class Client:
    """What both ends know of a client's round: which weights are shared, and how an update looks.

    Args:
        weights: path -> array, the trained ones and the model's state.
        settings: the settings.

    Attributes:
        personal: paths of the weights that stay with a client.
        layout: of the shared float weights.
        codec: of the updates.

    >>> client = Client({"w": jnp.ones((2, 2)), "n": jnp.int32(0)}, lx.federated.Federation(updates="top-k", kept=0.5))
    >>> client.layout.length, client.personal, client.codec.size_bytes
    (4, (), 10)
    """

    def __init__(self, weights: Mapping[str, Any], settings: Federation) -> None:
        floats = moving(weights)
        private = settings.private(floats)
        self.personal = tuple(path for path in floats if path in private)
        self.layout = Layout({path: weights[path] for path in floats if path not in private})
        self.codec = Codec(settings, self.layout.length)

    def begin(self, weights: Mapping[str, Any]) -> Kept:
        """What a client keeps before its first round."""
        residual = jnp.zeros(0 if self.codec.exact else self.layout.length, jnp.float32)
        return {"residual": residual, "personal": {path: jnp.asarray(weights[path]) for path in self.personal}}

    def make_round(self, local_round: LocalRound) -> ClientRound:
        """The function of a round, pure."""

        def client_round(shared: Any, kept: Kept, data: Any, key: jax.Array) -> tuple[Payload, Kept, jax.Array, Any]:
            delta, n, metrics = local_round({**shared, **kept["personal"]}, data, key)
            vector = self.layout.flatten(delta)
            finite = jnp.isfinite(vector).all()
            wanted = vector if self.codec.exact else vector + kept["residual"]
            update = self.codec.encode(wanted)
            residual = kept["residual"] if self.codec.exact else wanted - self.codec.decode(update)
            # Weights of a lower precision may round a small change away; a client's own are not averaged with others'.
            personal = {path: leaf + delta[path].astype(leaf.dtype) for path, leaf in kept["personal"].items()}
            for path in self.personal:
                finite &= jnp.isfinite(delta[path]).all()
            new = {"residual": residual, "personal": personal}
            # A client that is only padding does nothing.
            changed = finite & (n > 0)
            kept = jax.tree.map(lambda after, before: jnp.where(changed, after, before), new, kept)
            return update, kept, n, {**metrics, "finite": finite.astype(jnp.float32)}

        return client_round
