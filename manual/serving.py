"""Reference of the server: routes, errors, limits and metrics, from the tables that it works with."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator

from lepton_xla.serve.batching import rejections
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.observe import exposition, triton_metrics
from lepton_xla.serve.protocol import openapi
from lepton_xla.serve.protocol.routes import ROUTES
from manual.tables import code, plain, table

_SCOPES = {"health": "none", "page": "none"}


def routes_page() -> str:
    """Every route, and what each status means."""
    served = [route for route in ROUTES if not route.refusal]
    refused = [route for route in ROUTES if route.refusal]
    statuses = openapi._REFUSALS | openapi._INFER_REFUSALS
    reasons = [(status, text) for status, text in rejections._ERRORS.values()]
    return (
        "# HTTP\n\n"
        "The server speaks the Open Inference Protocol v2 with Triton's extension for binary tensors, so clients of "
        "Triton and KServe work; generated text also goes to clients of OpenAI. `GET /v2/openapi.json` describes the "
        "models that a server has, with the types of every body.\n\n"
        "## Routes\n\nThe scope is what a [token](../guides/secure.md) has to be good for, where the server asks for "
        "tokens. A part in brackets may be left out.\n\n"
        + table(
            ["method", "path", "meaning", "scope"],
            [
                (route.method, code(route.path), plain(route.summary), _SCOPES.get(route.scope, route.scope))
                for route in served
            ],
        )
        + '\n## Errors\n\nThe body of an error is `{"error": "what is wrong, and what to do"}`.\n\n'
        + table(["status", "meaning"], sorted(statuses.items()))
        + "\nA request that was understood and gets no result for want of time or room says which:\n\n"
        + table(["status", "error"], sorted(reasons))
        + "\n## Refused routes\n\nClients of Triton may ask for these; the answer says why they are not to be had.\n\n"
        + table(
            ["method", "path", "status", "error"],
            [(route.method, code(route.path), route.status, plain(route.refusal)) for route in refused],
        )
    )


def limits_page() -> str:
    """Every limit of the server, and how to set it."""
    rows = [
        (code("--" + field.name.replace("_", "-")), code("LEPTON_" + field.name.upper()), f"{field.default:,}",
         plain(field.metadata["help"]))
        for field in dataclasses.fields(Limits)
    ]  # fmt: skip
    return (
        "# Limits\n\n"
        "What exceeds a limit is refused before work is done for it, and never buffered. Each is an option of "
        "`leptonx serve`, an environment variable, and a field of "
        "[`Limits`](python/lepton_xla.serve.md#lepton_xla.serve.Limits). The options `--max-queue-rows`, "
        "`--max-queue-bytes` and `--memory` of [`leptonx serve`](commands.md#leptonx-serve) bound what waits and what "
        "is loaded.\n\n" + table(["option", "environment variable", "default", "meaning"], rows)
    )


def metrics_page() -> str:
    """Every metric that `/metrics` may show."""
    families = list(metrics())
    return (
        "# Metrics\n\n"
        "`GET /metrics` answers in Prometheus' text format. Labels are names and versions of models, never what "
        "clients send, so their number is bounded. Metrics of what a model does not do, such as generate, are absent "
        "until it does. With `--workers` they are sums over all processes.\n\n"
        + table(
            ["metric", "kind", "labels", "meaning"],
            [
                (code(family.name), family.kind, ", ".join(map(code, family.labels)), plain(family.text))
                for family in families
                if not family.name.startswith("nv_")
            ],
        )
        + "\n## Triton's names\n\nThe same figures under the names that dashboards for Triton look for.\n\n"
        + table(
            ["metric", "kind", "meaning"],
            [(code(each.name), each.kind, plain(each.text)) for each in families if each.name.startswith("nv_")],
        )
        + "\nMetrics of the process itself are those of `prometheus_client`, such as `process_resident_memory_bytes`.\n"
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A metric: its name as samples have it, without a histogram's suffixes."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def metrics() -> Iterator[Family]:
    """What the server exports, read from the calls that make the families."""
    tree = ast.parse(inspect.getsource(exposition))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("MetricFamily"):
                    yield from _families(node, function)
    for name, kind, text, _ in triton_metrics._FIGURES:
        yield Family(f"nv_inference_{name}", kind, ("model", "version"), text)
    for node in ast.walk(ast.parse(inspect.getsource(triton_metrics))):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "_family"
            and isinstance(node.args[0], ast.Constant)
        ):
            name, kind, text = (ast.literal_eval(each) for each in node.args)
            yield Family(name, kind, ("model", "version"), text)


def _families(call: ast.Call, function: ast.FunctionDef) -> Iterator[Family]:
    """The families of one call: one, or one for each entry of the table that the loop around it goes through."""
    kind = ast.unparse(call.func).removesuffix("MetricFamily").lower()
    labels = next((keyword.value for keyword in call.keywords if keyword.arg == "labels"), None)
    names = tuple(_labels(labels, function)) if labels is not None else ()
    name = call.args[0]
    if isinstance(name, ast.Constant):
        yield Family(_sample(name.value, kind), kind, names, ast.literal_eval(call.args[1]))
        return
    for table_name in _tables(call, function):
        for each, entry in getattr(exposition, table_name).items():
            text = entry if isinstance(entry, str) else entry[0]
            yield Family(_sample(f"lepton_{each}", kind), kind, names, text)


def _tables(call: ast.Call, function: ast.FunctionDef) -> Iterator[str]:
    """Names of the module's tables whose entries a call makes families of."""
    for loop in ast.walk(function):
        if isinstance(loop, ast.For) and call in ast.walk(loop):
            source = ast.unparse(loop.iter).removesuffix(".items()")
            if hasattr(exposition, source):
                yield source
            else:  # a parameter: the tables that callers give
                position = [argument.arg for argument in function.args.args].index(source)
                for node in ast.walk(ast.parse(inspect.getsource(exposition))):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == function.name:
                        yield ast.unparse(node.args[position])


def _labels(node: ast.expr, function: ast.FunctionDef) -> Iterator[str]:
    if isinstance(node, ast.List | ast.Tuple):
        for each in node.elts:
            yield from _labels(each.value, function) if isinstance(each, ast.Starred) else [ast.literal_eval(each)]
        return
    name = ast.unparse(node)
    for each in ast.walk(function):
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == name:
            yield from _labels(each.value, function)
            return
    yield from getattr(exposition, name)


def _sample(name: str, kind: str) -> str:
    return f"{name}_total" if kind == "counter" else name
