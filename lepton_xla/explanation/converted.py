"""Explanations of inputs that the host converts: what the model saw of a text or an image is given beside."""

from __future__ import annotations

from lepton_xla.conversion import Conversion, Images, Labels, Texts
from lepton_xla.conversion.huggingface import HuggingFace
from lepton_xla.program import Program

SEEN = "seen/"
"""Before the name of an input: the output that gives it back, tokens by name."""

LABEL = "label"


def steps(program: Program) -> list[Texts | Images]:
    """What makes tokens and pixels of what clients send."""
    known = program.conversion.inputs.values() if program.conversion is not None else ()
    return [step for step in known if isinstance(step, Texts | Images)]


def pixels(program: Program) -> dict[str, Images]:
    """The inputs that are pixels of images -> what makes them."""
    return {step.pixels: step for step in steps(program) if isinstance(step, Images)}


def tokens(program: Program) -> dict[str, Texts]:
    """The inputs that are tokens of texts -> what makes them."""
    return {step.tokens: step for step in steps(program) if isinstance(step, Texts)}


def beside(program: Program) -> set[str]:
    """Inputs that only say how much of another one there is: masks of tokens, sizes of images."""
    return {name for step in steps(program) for name in step.gives[1:]}


def seen(program: Program) -> list[str]:
    """Inputs that clients do not send themselves, and get back: tokens, pixels and the size of the image there."""
    return [name for step in steps(program) for name in (step.gives if isinstance(step, Images) else (step.tokens,))]


def classes(program: Program, output: str) -> tuple[str, ...]:
    """Names of the classes of an output; empty if the program gives none."""
    known = program.conversion.outputs.values() if program.conversion is not None else ()
    count = program.outputs[output].shape[-1]
    return next((step.names for step in known if len(step.names) == count), ())


def conversion(program: Program, names: tuple[str, ...]) -> Conversion | None:
    """The conversion of a program that explains `program`, whose classes have these names.

    Raises:
        ArtifactError: if a tokenizer cannot be read.
    """
    if program.conversion is None:
        return None
    found = {
        f"{SEEN}{name}": Labels(names=tuple(HuggingFace(step.tokenizer.encode()).names()))
        for name, step in tokens(program).items()
    }
    return Conversion(inputs=program.conversion.inputs, outputs=found | ({LABEL: Labels(names=names)} if names else {}))
