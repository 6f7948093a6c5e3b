"""What clients are told where a change to a repository is refused or fails: one status a kind, on all routes."""

import asyncio

import pytest

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.app.later import Later
from lepton_xla.serve.app.uploads import RepositoryChanges, Work
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.observe.server_metrics import ServerMetrics


@pytest.mark.parametrize(
    ("kind", "status"), [("invalid", 400), ("missing", 404), ("conflict", 409), ("failed", 503), ("large", 507)]
)
def test_a_kind_of_error_has_one_status(tmp_path, kind, status):
    def fails():
        raise RepositoryError(kind, f"{tmp_path}/m: why")

    with pytest.raises(HTTPError, match=r"^m: why$") as caught:
        RepositoryChanges(tmp_path).run(Work(fails, "remove"), {"model": "m", "version": "1"}, "ci")

    async def later():
        told = []
        pages = Later(ServerMetrics(), lambda exchange, refusal: told.append(refusal))

        async def work():
            fails()

        pages.answer(None, work(), "failed to load 'm'")
        while not told:
            await asyncio.sleep(0)
        return told[0]

    refusal = asyncio.run(later())
    assert (caught.value.status, refusal.status) == (status, status)
    assert refusal.message.startswith("failed to load 'm', ")
