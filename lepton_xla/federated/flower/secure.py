"""Secure aggregation by Flower's SecAgg+ (Bell et al. 2020, eprint 2020/704): the server learns only a sum of updates.

Flower's workflow is of its older interface, of which it uses a strategy's two methods and the numbers of nodes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lepton_xla.errors import first_line
from lepton_xla.federated.flower.messages import flower
from lepton_xla.federated.members import Answer
from lepton_xla.federated.settings import Federation
from lepton_xla.tables import printable

# Share of the shares that recovers a key: more than half, so that no two parts of the clients can be told different
# things, and less than all, so that clients may vanish.
_THRESHOLD = 2 / 3
_RANGE = 1 << 22
_LARGEST = 8.0


def quantization_step(settings: Federation) -> float:
    """How far the weighted mean may be off for each client, in the units of the weights, if all have `most_rows` rows.

    >>> quantization_step(lx.federated.Federation(most_norm=1.0)) < 1e-6
    True
    """
    return 2 * (settings.most_norm or _LARGEST) / _RANGE


class Workflow:
    """A round of secure aggregation at the server.

    Args:
        grid: Flower's.
        context: of the server app.
        settings: `most_rows` is the largest weight: the nearer to the clients' rows, the finer the sum. `most_norm`, or
            8, is the largest number in an update.
        round_s: how long a client may take for each of the four messages.
    """

    def __init__(self, grid: Any, context: Any, settings: Federation, round_s: float) -> None:
        self._grid, self._context, self._settings, self._round_s = grid, context, settings, round_s
        self._sent = 0
        self._fault: Exception | None = None  # of the grid

    def run(self, round_: int, vector: np.ndarray, config: dict[str, Any], nodes: Sequence[int]) -> Answer | str:
        """The mean of the updates of these nodes, or why there is none."""
        server, common = flower("server"), flower("common")
        workflows, constant = flower("server.workflow"), flower("server.workflow.constant")
        legacy = flower("server.compat.legacy_context")
        parameters = common.ndarrays_to_parameters([vector])
        found: list[Any] = []

        def configure_fit(*_: Any) -> Any:
            task = common.FitIns(parameters, config)
            return [(types.SimpleNamespace(node_id=node), task) for node in nodes]

        def aggregate_fit(_: Any, results: Any, __: Any) -> Any:
            found.extend(result for _, result in results)
            return None, {}

        strategy = types.SimpleNamespace(configure_fit=configure_fit, aggregate_fit=aggregate_fit)
        manager = types.SimpleNamespace(num_available=lambda: len(nodes))
        context = legacy.LegacyContext(self._context, server.ServerConfig(), strategy, manager)
        app = flower("app")
        context.state.config_records[constant.MAIN_CONFIGS_RECORD] = app.ConfigRecord(
            {constant.Key.CURRENT_ROUND: round_ + 1}
        )
        context.state.array_records[constant.MAIN_PARAMS_RECORD] = app.ArrayRecord(
            {"values": app.Array(ndarray=vector)}
        )
        self._sent = 0
        counting = types.SimpleNamespace(send_and_receive=self._send_and_receive)
        workflow = workflows.SecAggPlusWorkflow(
            num_shares=1.0,
            reconstruction_threshold=_THRESHOLD,
            max_weight=float(self._settings.most_rows),
            clipping_range=float(self._settings.most_norm or _LARGEST),
            quantization_range=_RANGE,
            timeout=self._round_s,
        )
        try:
            workflow(counting, context)
            if not found:
                return "secure aggregation ended without a sum: too few clients stayed, or one refused; see their logs"
            mean = common.parameters_to_ndarrays(found[0].parameters)[0]
            rows = sum(result.num_examples for result in found)
            return Answer({"values": np.asarray(mean, np.float32)}, rows, {}, len(found), self._sent)
        except Exception as error:  # Flower checks nothing of what clients send, and nearly anything can be raised
            if error is self._fault:
                raise
            return f"a client sent what cannot be added up: {printable(first_line(error))}"

    def _send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
        key = flower("common.secure_aggregation.secaggplus_constants").Key.MASKED_PARAMETERS
        try:
            replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        except Exception as error:
            self._fault = error
            raise
        for reply in replies:
            if not reply.has_error():
                for record in reply.content.config_records.values():
                    self._sent += sum(map(len, record.get(key, ())))
        return replies


def is_secure(message: Any) -> bool:
    """Whether a message is of secure aggregation."""
    constants = flower("common.secure_aggregation.secaggplus_constants")
    return constants.RECORD_KEY_CONFIGS in message.content.config_records


def answer_secure(message: Any, context: Any, answer: Callable[[np.ndarray, dict[str, Any]], Answer]) -> Any:
    """A client's reply to a message of secure aggregation; `answer(vector, config)` is called in one of its stages."""
    common, app = flower("common"), flower("app")
    compat = flower("compat.common.recorddict_compat")

    def train(asked: Any, _: Any) -> Any:
        task = compat.recorddict_to_fitins(asked.content, keep_input=True)
        given = answer(common.parameters_to_ndarrays(task.parameters)[0], dict(task.config))
        result = common.FitRes(
            common.Status(common.Code.OK, ""),
            common.ndarrays_to_parameters([np.asarray(given.update["values"], np.float64)]),
            given.rows,
            {},
        )
        return app.Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=asked)

    return flower("client.mod").secaggplus_mod(message, context, train)
