"""Functions compiled ahead of being called; those that are the same to XLA are compiled once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax


class Candidate:
    """A function that may be timed several times but is compiled once.

    Attributes:
        fn: `fn(weights, *inputs)`.
        compiled: executables by digest of their StableHLO; shared by all functions that may be equal.
    """

    def __init__(self, fn: Callable[..., Any], compiled: dict[str, Any]) -> None:
        self.fn = fn
        self.compiled = compiled

    def __call__(self, weights: Any, *inputs: Any) -> Any:
        """Call the function."""
        return self.fn(weights, *inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Lowered:
    """A function lowered to StableHLO.

    Attributes:
        digest: digest of its StableHLO, without its name, and of the shardings of its arguments.
        stage: JAX's lowered stage, which can be compiled.
        compiled: cache of executables, by digest.
    """

    digest: str
    stage: Any
    compiled: dict[str, Any]

    @classmethod
    def of(cls, fn: Callable[..., Any], *args: Any) -> Lowered:
        """Lower a function, possibly a `Candidate`, for arguments or their shapes."""
        stage = jax.jit(fn.fn if isinstance(fn, Candidate) else fn).lower(*args)
        text = re.sub(r"^module @\S+", "module", stage.as_text())
        text += str([leaf.sharding for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)])
        compiled = fn.compiled if isinstance(fn, Candidate) else dict[str, Any]()
        return cls(hashlib.sha256(text.encode()).hexdigest(), stage, compiled)


class Compilation:
    """Compiles programs on threads while further ones are lowered, equal ones once; leaving waits for all.

    XLA releases the interpreter lock while it compiles.

    >>> double = Lowered.of(lambda x: 2 * x, jnp.ones(4))
    >>> with Compilation() as compilation:
    ...     executables = compilation.start([double, double])
    >>> first, second = executables()
    >>> first is second
    True
    """

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self._started: dict[str, Callable[[], Any]] = {}

    def start(self, programs: Sequence[Lowered]) -> Callable[[], list[Any]]:
        """Begin to compile what was not compiled before; the result waits for the executables, in order."""
        for program in programs:
            if program.digest in program.compiled:
                known = program.compiled[program.digest]
                self._started.setdefault(program.digest, lambda known=known: known)
        for program in programs:
            if program.digest not in self._started:
                self._started[program.digest] = self._pool.submit(program.stage.compile).result

        def finish() -> list[Any]:
            for program in programs:
                program.compiled[program.digest] = self._started[program.digest]()
            return [program.compiled[program.digest] for program in programs]

        return finish

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
