"""The routes that change a repository: uploads in pieces, versions made of them, labels, and what is there."""

from __future__ import annotations

import asyncio
import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from lepton_xla.errors import ArtifactError, RepositoryError
from lepton_xla.files.listing import is_sha256
from lepton_xla.serve.app.later import STATUS
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.models.found import Found
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.models.uploads import Uploads
from lepton_xla.serve.protocol import uploads

_log = logging.getLogger("lepton_xla.serve")


class Work(NamedTuple):
    """What a request asks for.

    Attributes:
        do: does it, on a thread, and gives the answer.
        action: what the audit log calls it; empty for what changes no version or label, such as pieces of files, which
            come in thousands.
        long: whether it reads or writes files of weights.
    """

    do: Callable[[], Any]
    action: str = ""
    long: bool = False


class RepositoryChanges:
    """Makes work of requests. What can be checked without the disk is checked at once.

    Args:
        root: the repository's folder.
        record: told of every change, as `Audit.record` is; on the thread that makes it.

    Attributes:
        routes: by name of a route, what makes work of path parameters and an exchange.
    """

    def __init__(self, root: pathlib.Path, record: Callable[..., object] = lambda *_, **__: None) -> None:
        self._root = root
        self._record = record
        self._repository = Repository(root)
        self._uploads = Uploads(self._repository)
        self.routes: dict[str, Callable[[dict[str, str], Exchange], Work]] = {
            "repository_models": self._models,
            "upload_sizes": self._sizes,
            "upload_piece": self._piece,
            "publish": self._publish,
            "remove_version": self._remove,
            "move_label": self._move,
        }

    def run(self, work: Work, parameters: dict[str, str], who: str) -> Any:
        """Do work, and record it; errors become those of HTTP, without the folder's path.

        Args:
            work: what the route makes of the request.
            parameters: of the route's path.
            who: name of the token.
        """
        try:
            result = work.do()
            self._tell(work.action, parameters, who, result)
            return result
        except (RepositoryError, ArtifactError) as error:
            self._tell(work.action, parameters, who, None, reason=without_path(str(error), self._root))
            kind = error.kind if isinstance(error, RepositoryError) else "invalid"
            raise HTTPError(STATUS[kind], without_path(str(error), self._root)) from error

    def _tell(self, action: str, parameters: dict[str, str], who: str, result: Any, **details: str) -> None:
        if not action:
            return
        version = getattr(result, "version", None) or getattr(result, "stands_on", None) or parameters.get("version")
        target = "/".join(filter(None, (parameters["model"], version)))
        if "label" in parameters:
            details["label"] = parameters["label"]
        if isinstance(result, uploads.Published):
            details["artifact"] = str(self._root / result.name / f"{result.version}.lepton")
        if isinstance(result, uploads.Moved):
            details["stood_on"] = result.stood_on or ""
        outcome = "refused" if result is None else "done"
        _log.info("%s: %s %s: %s", who or "a client", action, target[:200], outcome)
        self._record(who, action, target, outcome, **details)

    def _models(self, parameters: dict[str, str], exchange: Exchange) -> Work:
        def work() -> list[uploads.ModelOnDisk]:
            documents = self._repository.describe()
            for document in documents:
                document["problem"] = document["problem"] and without_path(document["problem"], self._root)
            return msgspec.convert(documents, list[uploads.ModelOnDisk])

        return Work(work)

    def _sizes(self, parameters: dict[str, str], exchange: Exchange) -> Work:
        asked = uploads.parse_change(exchange.body, uploads.SizesRequest).sha256
        return Work(lambda: uploads.Sizes(self._uploads.sizes(asked)))

    def _piece(self, parameters: dict[str, str], exchange: Exchange) -> Work:
        digest, offset, body = parameters["sha256"], uploads.offset_of(exchange.head.target), exchange.body
        if not is_sha256(digest):
            raise HTTPError(400, "a file is named by its SHA-256: 64 hexadecimal digits in lower case")
        return Work(lambda: uploads.Piece(self._uploads.write(digest, offset, body)), long=True)

    def _publish(self, parameters: dict[str, str], exchange: Exchange) -> Work:
        asked = uploads.parse_change(exchange.body, uploads.PublishRequest)
        name, version = parameters["model"], parameters.get("version")

        def work() -> uploads.Published:
            made, listing = self._uploads.publish(asked.manifest, name, version, asked.signature)
            return uploads.Published(name, made, listing.size_bytes)

        return Work(work, "push", long=True)

    def _remove(self, parameters: dict[str, str], exchange: Exchange) -> Work:
        name, version = parameters["model"], parameters["version"]

        def work() -> uploads.Removed:
            self._repository.remove(name, version)
            return uploads.Removed(name, version)

        return Work(work, "remove", long=True)

    def _move(self, parameters: dict[str, str], exchange: Exchange) -> Work:
        asked = uploads.parse_change(exchange.body, uploads.LabelRequest)
        name, label, version = parameters["model"], parameters["label"], asked.version
        if asked.rollback == (version is not None):
            raise HTTPError(400, 'the body must have either a version, such as {"version": "4"}, or {"rollback": true}')

        def work() -> uploads.Moved:
            if version is None:
                return uploads.Moved(name, label, *self._repository.rollback(name, label))
            return uploads.Moved(name, label, self._repository.promote(name, version, label), version)

        return Work(work, "rollback" if asked.rollback else "promote")


async def find_model(repository: Repository, model: str) -> Found:
    """A model as it is on the disk now.

    Raises:
        RepositoryError: if there is no such model, or kind `invalid` if it cannot be used; without the folder's path.
    """
    try:
        found = await asyncio.to_thread(repository.find, model)
    except RepositoryError as error:
        raise told(error, repository.root) from error
    if found.problem:
        raise RepositoryError("invalid", without_path(found.problem, repository.root))
    return found


def told(error: RepositoryError, root: pathlib.Path) -> RepositoryError:
    """The error as clients are told it: without the folder of the repository."""
    return RepositoryError(error.kind, without_path(str(error), root))


def without_path(text: str, root: pathlib.Path) -> str:
    """A message without the folder of the repository, which is nobody's business."""
    return text.replace(f"{root}/", "").replace(str(root), "the repository")
