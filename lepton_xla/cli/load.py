"""`leptonx load`: sends requests to a server at a given rate and measures latency."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import InputError, LeptonError

if TYPE_CHECKING:
    import numpy as np

    from lepton_xla.serve.load.result import Load, Result

_SPARE_FILES = 64
_VALUES = 100  # random integers are below this, so they fit every integer type and every vocabulary
_file = click.Path(dir_okay=False)


class _Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers above zero, separated by commas."""

    name = "numbers"

    def __init__(self, kind: Callable[[str], float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number <= 1e6 for number in numbers):
            self.fail(f"{value!r}: expected one or more numbers from 1 to a million, such as 1000,2000", param, ctx)
        return numbers


@click.command()
@click.argument("url")
@click.option("--model", metavar="NAME", help="Model to send requests to. By default the server's only model.")
@click.option(
    "--rate",
    "rates",
    type=_Numbers(float),
    metavar="N[,N...]",
    help="Open loop: requests per second, at random moments. Several rates run in turn. By default 100.",
)
@click.option(
    "--connections",
    type=_Numbers(int),
    metavar="N[,N...]",
    help="Closed loop: number of connections; each sends its next request when it has its answer.",
)
@click.option(
    "--seconds", default=10.0, show_default=True, help="Seconds to measure each rate or number of connections."
)
@click.option("--warmup", default=2.0, show_default=True, help="Seconds of the same load before the measurement.")
@click.option("--timeout", default=10.0, show_default=True, help="Seconds after which a request is given up.")
@click.option(
    "--max-connections",
    default=1000,
    show_default=True,
    type=click.IntRange(1, 60_000),
    help="Connections of the open loop. While all are busy, due requests wait; the wait counts as latency.",
)
@click.option(
    "--input",
    "sources",
    multiple=True,
    metavar="NAME=FILE.npy|FILE.npz|FILE.json|-",
    help="Inputs to send. Inputs without a file are random. Repeatable.",
)
@click.option("--rows", default=1, show_default=True, type=click.IntRange(1), help="Rows of random inputs.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="[INPUT=]N",
    help="Size of the variable dimensions other than rows, for one input or for all. Repeatable.",
)
@click.option("--plot", metavar="FILE.svg", help="Draw latency by percentile, over time and by rate; needs matplotlib.")
@click.option("--token-file", type=_file, help="File with the access token. By default the variable LEPTON_TOKEN.")
@click.option("--tls-ca", type=_file, help="CA certificates (PEM) to trust instead of the system's.")
@click.option("--tls-cert", type=_file, help="Client certificate (PEM).")
@click.option("--tls-key", type=_file, help="Private key of --tls-cert, if not in the same file.")
@_common.json_option
def load(
    url: str,
    *,
    model: str | None,
    rates: tuple[float, ...] | None,
    connections: tuple[float, ...] | None,
    seconds: float,
    warmup: float,
    timeout: float,
    max_connections: int,
    sources: tuple[str, ...],
    rows: int,
    sizes: tuple[str, ...],
    plot: str | None,
    as_json: bool,
    **access: Any,
) -> None:
    """Send the same inference request to the server at URL repeatedly, and measure latency.

    With --rate (open loop), requests are due at random moments, whether or not earlier ones were answered, and latency
    counts from then. So if the server stalls, every request that is due meanwhile is late, as users would see it. With
    --connections (closed loop), each connection waits for its answer before it sends again; use this to find the
    maximum throughput. Latency covers good answers and requests given up. Rejected requests are only counted.

    \b
      leptonx load http://127.0.0.1:8000 --rate 1000
      leptonx load http://127.0.0.1:8000 --rate 1000,2000,5000 --seconds 30 --plot rates.svg
      leptonx load http://127.0.0.1:8000 --connections 64 --rows 8
      leptonx load https://models.example --model encoder --size 128 --token-file token --json
      leptonx load http://127.0.0.1:8000 --input image=images.npy

    Works with any server of the Open Inference Protocol v2 that supports binary tensors. Ctrl-C ends a run early. Exit
    code 0 if every request succeeded, 1 if any failed, 2 if nothing could be measured.
    """
    figure = _common.figure() if plot is not None else None
    _common.check_folder(plot)
    with _common.progress() as step:
        step("ask for the model")
        from lepton_xla.cli import _load_views
        from lepton_xla.serve.client import Client
        from lepton_xla.serve.client.arrays import write_infer
        from lepton_xla.serve.client.calls import route
        from lepton_xla.serve.client.endpoint import endpoint
        from lepton_xla.serve.load.generator import generate

        loads = _loads(rates, connections, max_connections, seconds, warmup, timeout)
        target = endpoint(url, **access)
        with Client(url, timeout_s=timeout, **access) as client:
            metadata = client.metadata(model)
            name = str(metadata.get("name", model))
            inputs = _inputs(metadata, sources, rows, sizes)
            client.infer(name, inputs)  # fails here, with a readable message, if the request is wrong
    head, tail = write_infer(inputs)
    request = target.request("POST", f"{route(name)}/infer", (head, *tail), len(head))
    _allow_files(max(entry.connections for entry in loads))
    results: list[Result] = []
    with _load_views.live(len(loads)) as watch:
        for entry in loads:
            results.append(generate(target, request, entry, watch=watch, interruptible=True))
    document: dict[str, Any] = {
        "url": url,
        "model": name,
        "inputs": {key: {"dtype": str(array.dtype), "shape": list(array.shape)} for key, array in inputs.items()},
        "request_bytes": len(request),
        "warmup_s": warmup,
        "timeout_s": timeout,
        "runs": [result.to_json() for result in results],
    }
    if plot is not None:
        _common.write(plot, lambda: _load_views.draw(figure, document, results, plot))
    if as_json:
        _common.print_json(document)
    else:
        _load_views.show(document)
    if any(result.errors for result in results):
        sys.exit(1)


def _loads(
    rates: tuple[float, ...] | None,
    connections: tuple[float, ...] | None,
    most: int,
    seconds: float,
    warmup_s: float,
    timeout_s: float,
) -> list[Load]:
    from lepton_xla.serve.load.result import Load

    if rates is not None and connections is not None:
        raise LeptonError("give either --rate (open loop) or --connections (closed loop), not both")
    if connections is not None:
        return [Load(None, int(count), seconds, warmup_s, timeout_s) for count in connections]
    return [Load(rate, most, seconds, warmup_s, timeout_s) for rate in rates or (100.0,)]


def _allow_files(connections: int) -> None:
    """Raise the limit of open files so that this process can open this many connections.

    Raises:
        LeptonError: if the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = connections + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
        except (ValueError, OSError) as error:
            raise LeptonError(f"{connections} connections need {need} open files, the limit is {hard}") from error


@dataclasses.dataclass(frozen=True)
class _Input:
    """An input as the server describes it; -1 is a variable dimension."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size < 0 else str(size) for size in self.shape)}]"


def _inputs(
    metadata: Mapping[str, Any], sources: Sequence[str], rows: int, sizes: Sequence[str]
) -> dict[str, np.ndarray]:
    """The arrays to send: from files, or random."""
    import numpy as np

    from lepton_xla.cli import _arrays

    declared = {str(entry["name"]): _declared(entry) for entry in metadata["inputs"]}
    given: dict[str, Any] = {}
    for source in sources:
        for name, value in _arrays.read(source).items():
            if name in given or name not in declared:
                why = "given twice" if name in given else f"not an input of the model: {', '.join(declared)}"
                raise InputError(f"input {name!r} is {why}")
            given[name] = value
    chosen = _sizes(sizes, declared)
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, spec in declared.items():
        if name not in given:
            arrays[name] = _random(random, spec, _shape(name, spec, rows, chosen))
            continue
        (value,) = _arrays.as_declared({name: given[name]}, {name: spec}).values()
        try:
            arrays[name] = value if isinstance(value, np.ndarray) else np.asarray(value, spec.dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"input {name!r} is not {spec}: {error}") from error
    return arrays


def _declared(entry: Mapping[str, Any]) -> _Input:
    from lepton_xla.serve.protocol.datatypes import DATATYPES

    row = DATATYPES.get(entry["datatype"])
    if row is None:
        raise InputError(f"input {entry['name']!r} is {entry['datatype']}, which is not a datatype of the protocol")
    # Triton writes sizes as numbers, some others as text.
    return _Input("object" if row.dtype is None else row.dtype.name, tuple(int(size) for size in entry["shape"]))


def _sizes(texts: Sequence[str], declared: Mapping[str, _Input]) -> dict[str, int]:
    """Parse `--size` into sizes by input; '' stands for all inputs."""
    found: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not (number.isascii() and number.isdigit() and int(number)) or (name and name not in declared):
            raise InputError(
                f"--size {text!r}: expected a size such as 128, or ids=128 for one of {', '.join(declared)}"
            )
        found[name] = int(number)
    return found


def _shape(name: str, spec: _Input, rows: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
    other = sizes.get(name, sizes.get(""))
    if other is None and any(size < 0 for size in spec.shape[1:]):
        raise InputError(f"input {name!r} is {spec}: set its variable dimensions with --size")
    return tuple(size if size >= 0 else rows if axis == 0 else other or 0 for axis, size in enumerate(spec.shape))


def _random(random: np.random.Generator, spec: _Input, shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    whole = random.integers(0, _VALUES, shape)
    if spec.dtype == "object":
        return whole.astype(np.bytes_)
    if spec.dtype == "bool":
        return whole % 2 == 0
    return whole.astype(spec.dtype) if "int" in spec.dtype else random.random(shape).astype(spec.dtype)
