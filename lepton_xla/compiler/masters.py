"""The float master of an artifact: the weights before they were made small, and the steps that make them small again.

Each step is a portable program with compiled code, so it is taken without tracing, and where the code fits the machine
without compiling. Steps stay apart, as they were when the artifact was made: one program for all of them would round
otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.compiler import _xla
from lepton_xla.compiler.code import Code
from lepton_xla.compiler.devices import Devices
from lepton_xla.compiler.elements import from_words, to_words, words_of
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.compiler.manifest import Manifest, MasterCode, MasterEntry, MasterStep, Tensor
from lepton_xla.compiler.portable import compile_portable, export_programs
from lepton_xla.compiler.storage import VerifiedFiles
from lepton_xla.derivations import Derivation, Step
from lepton_xla.errors import ArtifactError, CompileError
from lepton_xla.program import Program
from lepton_xla.trees import abstract

FILE = "master/weights.bin"


@dataclasses.dataclass(frozen=True)
class Master:
    """Float weights, and the steps from them to the stored ones.

    Attributes:
        weights: path -> what the steps read, and what is stored as it is.
        data: arrays that the steps read besides: masks, factors, ranges.
        steps: in order.
        stored: path of the stored weights, in order, and how many arrays each has.
        programs: digest -> portable program.
        codes: digest -> compiled code for this process's first device, where it is known.
    """

    weights: Mapping[str, np.ndarray]
    data: tuple[np.ndarray, ...]
    steps: tuple[MasterStep, ...]
    stored: Mapping[str, int]
    programs: Mapping[str, bytes]
    codes: dict[str, Code]

    @classmethod
    def made(cls, program: Program) -> Master:
        """Take the master of an optimized program, and check that its steps give the program's weights.

        Raises:
            CompileError: if they do not, because weights were changed outside of passes, say, or if the program has
                forgotten them.
        """
        if program.derivation is None and program.history:
            raise CompileError("no master can be kept: the program was optimized without keep_master=True")
        known = program.derivation or Derivation(program.weights)
        maker = _Maker(known)
        for step in known.steps:
            maker.add(step)
        counts = {path: len(jax.tree.leaves(tree)) for path, tree in program.weights.items()}
        leaves = {path: jax.tree.leaves(tree) for path, tree in program.weights.items()}
        ordered = sorted(counts)  # as JAX flattens a dict
        given = {path for step in maker.steps for path in step.gives}
        lost = [path for path in ordered if path not in given and path not in known.weights]
        if lost:
            raise CompileError(f"no master can be kept: weight {lost[0]!r} was added outside of passes")
        taken = {path for step in maker.steps for path in step.takes} | (set(ordered) - given)
        weights = {path: np.asarray(array) for path, array in known.weights.items() if path in taken}
        master = cls(
            weights,
            tuple(maker.data),
            tuple(maker.steps),
            {path: counts[path] for path in ordered},
            maker.programs,
            maker.codes,
        )
        if not any(step.reason for step in master.steps):
            made = iter(master.lowered(weights))
            for path in ordered:
                for array in leaves[path]:
                    if not _same(next(made), array):
                        raise CompileError(
                            f"no master can be kept: its steps do not give weight {path!r} as it is. Was it changed "
                            "after it was optimized?"
                        )
        return master

    def check(self, *, nearest: bool = False) -> None:
        """Check that all steps can be taken with other weights.

        Args:
            nearest: whether to leave out steps that choose codes by calibration data, and so round to nearest.

        Raises:
            ArtifactError: naming the first that cannot.
        """
        for step in self.steps:
            if step.reason and not (nearest and step.skippable):
                advice = "; --nearest rounds to the nearest codes instead" if step.skippable else ""
                raise ArtifactError(
                    f"new weights cannot be made small as the artifact's were: {step.name}: {step.reason}{advice}"
                )

    def checked(self, weights: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
        """Check that weights can take the place of the master's.

        Raises:
            ArtifactError: naming the first difference: a path, a shape, a dtype, or values that are not finite.
        """
        for path in self.weights:
            if path not in weights:
                raise ArtifactError(f"{what}: it lacks weight {path!r}")
        found: dict[str, np.ndarray] = {}
        for path, value in weights.items():
            mine = self.weights.get(path)
            if mine is None:
                raise ArtifactError(f"{what}: weight {path!r} is not in the float master")
            array = np.asarray(value)
            if (array.shape, array.dtype) != (mine.shape, mine.dtype):
                raise ArtifactError(
                    f"{what}: weight {path!r} is {array.dtype}{list(array.shape)}, and the float master has "
                    f"{mine.dtype}{list(mine.shape)}"
                )
            if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array[~_infinite(mine)]).all():
                raise ArtifactError(f"{what}: weight {path!r} holds NaN or infinity")
            found[path] = array
        return found

    def lowered(self, weights: Mapping[str, np.ndarray], *, nearest: bool = False) -> list[jax.Array]:
        """Make the stored weights of float weights.

        Args:
            weights: path -> array, as `checked` gives them.
            nearest: as `check` takes it.

        Raises:
            ArtifactError: as `check`; if a step does not bear these weights; or a program does not compile here.
            ExecutionError: if a step fails, such as for want of memory.
        """
        self.check(nearest=nearest)
        devices = Devices(_xla.first_device())
        values = {path: [jax.device_put(array, devices.first)] for path, array in weights.items()}
        for step in self.steps:
            if step.reason:
                continue
            data = [jax.device_put(self.data[index], devices.first) for index in step.data]
            outputs = data
            if step.program:
                arguments = [leaf for path in step.takes for leaf in values[path]] + data
                outputs = self._run(step.program, arguments, devices)
            if step.flagged and not bool(outputs[-1]):
                raise ArtifactError(f"{step.name} of {', '.join(step.gives)} loses values with these weights")
            start = 0
            for path, count in step.gives.items():
                values[path] = list(outputs[start : start + count])
                start += count
        return [leaf for path in self.stored for leaf in values[path]]

    def _run(self, digest: str, arguments: Sequence[jax.Array], devices: Devices) -> Sequence[jax.Array]:
        if digest not in self.codes:
            shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arguments]
            self.codes[digest] = compile_portable(self.programs[digest], "a step of the float master", shapes, [])
        execute = devices.executor(self.codes[digest].loaded, ())
        try:
            outputs = jax.block_until_ready(execute(list(arguments)))
            return [_xla.known(each, devices.first) for each in outputs]
        except _xla.ERROR as error:
            raise _xla.failed(error, "a step of the float master") from error

    def write(self, write: Callable[[str, bytes], None]) -> MasterEntry:
        """Write its files, and give what the manifest says of it."""
        programs: dict[str, str] = {}
        for number, (digest, blob) in enumerate(self.programs.items()):
            programs[digest] = f"programs/master-{number}.stablehlo"
            write(programs[digest], blob)
        target = Fingerprint.of(_xla.first_device(), 1)
        files: dict[str, str] = {}
        for number, digest in enumerate(self.programs):
            code = self.codes.get(digest)
            if code is not None and code.blob is not None:
                files[digest] = f"executables/{target.digest}/master-{number}.xla"
                write(files[digest], code.blob)
        write(FILE, b"".join(to_words(array).tobytes() for array in (*self.weights.values(), *self.data)))
        return MasterEntry(
            file=FILE,
            weights=tuple(_tensor(path, array) for path, array in self.weights.items()),
            data=tuple(_tensor(str(number), array) for number, array in enumerate(self.data)),
            steps=self.steps,
            stored=dict(self.stored),
            programs=programs,
            code=MasterCode(target=target, files=files),
        )

    @classmethod
    def read(cls, manifest: Manifest, files: VerifiedFiles, where: str) -> Master:
        """Read the master of an artifact.

        Raises:
            ArtifactError: if it has none, or a file is damaged.
        """
        entry = manifest.master
        if entry is None:
            raise ArtifactError(f"{where}: has no float master; compile it with keep_master=True (--keep-master)")
        arrays = _arrays([*entry.weights, *entry.data], files.read(entry.file), entry.file)
        device = _xla.first_device()
        codes: dict[str, Code] = {}
        if entry.code.target.digest == Fingerprint.of(device, 1).among([entry.code.target.digest]).digest:
            codes = {
                digest: Code.read(files.read(file), [device], f"of step {file}")
                for digest, file in entry.code.files.items()
            }
        return cls(
            {tensor.name: array for tensor, array in zip(entry.weights, arrays, strict=False)},
            tuple(arrays[len(entry.weights) :]),
            entry.steps,
            entry.stored,
            {digest: files.read(file) for digest, file in entry.programs.items()},
            codes,
        )


class _Maker:
    """Exports the steps of a derivation, each once."""

    def __init__(self, known: Derivation) -> None:
        self._shapes: dict[str, Any] = abstract(dict(known.weights))
        self.steps: list[MasterStep] = []
        self.data: list[np.ndarray] = []
        self.programs: dict[str, bytes] = {}
        self.codes: dict[str, Code] = {}

    def add(self, step: Step) -> None:
        """Add a step, if it changes something."""
        if step.reason:
            given = dict.fromkeys(step.gives, 0)
            self.steps.append(MasterStep(name=step.name, gives=given, reason=step.reason, skippable=step.skippable))
            return
        if step.fn is None and not step.data:
            return
        numbers = tuple(range(len(self.data), len(self.data) + len(step.data)))
        self.data += [np.asarray(array) for array in step.data]
        taken = [self._shapes[path] for path in step.takes]
        data = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in step.data]
        digest, outputs = "", list[Any](data)
        if step.fn is not None:
            digest, outputs = self._exported(step.fn, taken, data)
        flagged = len(outputs) > len(step.gives)
        given = {path: len(jax.tree.leaves(tree)) for path, tree in zip(step.gives, outputs, strict=False)}
        self._shapes |= dict(zip(step.gives, outputs, strict=False))
        self.steps.append(
            MasterStep(name=step.name, takes=step.takes, gives=given, data=numbers, program=digest, flagged=flagged)
        )

    def _exported(self, fn: Callable[..., Any], taken: Sequence[Any], data: Sequence[Any]) -> tuple[str, list[Any]]:
        leaves, treedef = jax.tree.flatten([*taken, *data])

        def flat(*arrays: Any) -> tuple[Any, ...]:
            return tuple(jax.tree.leaves(list(fn(*jax.tree.unflatten(treedef, arrays)))))

        (portable,), _ = export_programs(flat, leaves, {}, {})
        if portable.digest not in self.programs:
            self.programs[portable.digest] = portable.blob
            self.codes[portable.digest] = compile_portable(portable.blob, "a step of the float master", leaves, [])
        return portable.digest, list(jax.eval_shape(lambda *trees: list(fn(*trees)), *taken, *data))


def _arrays(tensors: Sequence[Tensor], data: bytes, file: str) -> list[np.ndarray]:
    """The arrays that lie in a file one after the other."""
    found: list[np.ndarray] = []
    start = 0
    for tensor in tensors:
        shape = tuple(int(size) for size in tensor.shape)
        words, word = words_of(shape, tensor.dtype)
        size = math.prod(words) * word.itemsize
        if start + size > len(data):
            raise ArtifactError(f"{file}: {len(data)} bytes are too few for its tensors")
        elements = np.frombuffer(data, np.uint8, size, start).copy().view(word).reshape(words)
        found.append(from_words(elements, shape, tensor.dtype))
        start += size
    if start != len(data):
        raise ArtifactError(f"{file}: {len(data)} bytes are more than its tensors have")
    return found


def _tensor(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name=name, shape=array.shape, dtype=array.dtype.name)


def _infinite(array: np.ndarray) -> np.ndarray:
    """Where an array is infinite, as masks of attention are on purpose."""
    return np.isinf(array)


def _same(one: Any, two: Any) -> bool:
    first, second = np.asarray(one), np.asarray(two)
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and to_words(first).tobytes() == to_words(second).tobytes()
    )
