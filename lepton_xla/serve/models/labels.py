"""Labels of a model, in its `model.toml`, and what each stood on before, in a file beside it.

`model.toml` alone says where a label stands. The history names where it believes the label to stand; if the two differ,
because someone edited the file or a process was killed between the two writes, the history is caught up first.
"""

from __future__ import annotations

import re

import msgspec

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.models.settings import SETTINGS, parse_settings

HISTORY = ".labels.json"
_DEPTH = 100
_TABLE = re.compile(r"\s*\[\s*labels\s*\]\s*(#.*)?")
_ANY_TABLE = re.compile(r"\s*\[")


class Track(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a label stands, and where it stood before, the last one last."""

    stands: str | None = None
    before: tuple[str, ...] = ()

    def caught_up(self, stands: str | None) -> Track:
        """The track of a label that really stands on `stands`.

        >>> Track("3", ("1", "2")).caught_up("2"), Track("3", ("1",)).caught_up("4")
        (Track(stands='2', before=('1',)), Track(stands='4', before=('1', '3')))
        """
        if stands == self.stands:
            return self
        if self.before and self.before[-1] == stands:
            return Track(stands, self.before[:-1])
        return self.moved(stands)

    def moved(self, version: str | None) -> Track:
        """The track after the label moved on to another version."""
        past = self.before if self.stands is None else (*self.before, self.stands)
        return Track(version, past[-_DEPTH:])


def read_history(data: bytes) -> dict[str, Track]:
    """Read the tracks of all labels; none where the file is damaged, because only going back needs it.

    >>> read_history(b'{"stable": {"stands": "2", "before": ["1"]}}'), read_history(b"{")
    ({'stable': Track(stands='2', before=('1',))}, {})
    """
    try:
        return msgspec.json.decode(data, type=dict[str, Track])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}


def with_label(text: str, label: str, version: str) -> str:
    """The text of a `model.toml` in which a label stands on a version; everything else stays as it is written.

    Raises:
        RepositoryError: if the labels are not written as a table `[labels]` with one on a line.

    >>> print(with_label('versions = "all"  # keep', "stable", "4"))
    versions = "all"  # keep
    <BLANKLINE>
    [labels]
    stable = "4"
    <BLANKLINE>
    """
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    start = next((index for index, line in enumerate(lines) if _TABLE.fullmatch(line)), None)
    entry = f'{label} = "{version}"'
    if start is None:
        lines += [*([""] if lines else []), "[labels]", entry]
    else:
        inside = range(start + 1, len(lines))
        end = next((index for index in inside if _ANY_TABLE.match(lines[index])), len(lines))
        known = re.compile(rf"""(\s*)(["']?){re.escape(label)}\2\s*=\s*(["'])[0-9]*\3(.*)""")
        for index in range(start + 1, end):
            if found := known.fullmatch(lines[index]):
                lines[index] = f"{found[1]}{entry}{found[4]}"
                break
        else:
            lines.insert(start + 1, entry)
    changed = "\n".join(lines) + "\n"
    before = parse_settings(text)
    wanted = msgspec.structs.replace(before, labels={**before.labels, label: version})
    try:
        is_right = parse_settings(changed) == wanted
    except RepositoryError:
        is_right = False
    if not is_right:
        raise RepositoryError(
            "conflict", f"{SETTINGS}: cannot be changed: write the labels as a table [labels], one a line: {entry}"
        )
    return changed
