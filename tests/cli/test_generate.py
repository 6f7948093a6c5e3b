"""`leptonx compile` of a generator, and `leptonx generate`."""

import dataclasses
import itertools
import textwrap

import pytest

import lepton_xla as lx
from lepton_xla.cli import _models
from lepton_xla.modelspec import load_named

MODEL = """
import jax
import jax.numpy as jnp
import lepton_xla as lx

def step(w, cache, token, position):  # the next token is the sum of all so far
    total = cache + token
    return jax.nn.one_hot(total % 16, 16) @ w, total

def prefill(w, tokens, length):
    return step(w, 0, tokens.sum(1), length)

generator = lx.Generator(lambda w, B, S: jnp.zeros(B, "int32"), prefill, step, jnp.eye(16), slots=2, capacity=8)
model = lx.ModelSpec(generator=generator, buckets={"length": (4,)})
both = lx.ModelSpec({}, fn=step, generator=generator)
"""


@pytest.fixture(scope="module")
def artifact(cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    (folder / "sums.py").write_text(textwrap.dedent(MODEL))
    cli.ok("compile", f"{folder / 'sums.py'}:model", "-o", folder / "sums.lepton")
    return folder / "sums.lepton"


def test_ids_are_continued(cli, artifact):
    assert cli.ok("generate", artifact, "--ids", "1,2", "--max-tokens", "4").split() == ["3", "6", "12", "8"]
    found = cli.json("generate", artifact, "--ids", "1,2", "--max-tokens", "4")
    assert (found["tokens"], found["text"]) == ([3, 6, 12, 8], "")
    assert found["first_token_s"] > 0


def test_inspect_says_what_it_generates(cli, artifact):
    text = " ".join(cli.ok("inspect", artifact).split())
    assert "generates: 2 sequences at once, of 8 positions, 16 tokens, token ids only; cache 8 B" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either PROMPT or --ids"),
        (["text"], "carries no tokenizer"),
        (["--ids", "1,x"], "expected numbers"),
        (["--ids", "99"], "token 99"),
        (["--ids", "1,1,1,1,1"], "at most 4"),
        (["--ids", "1", "--max-tokens", "9"], "room for 8"),
        (["--ids", "1", "--temperature", "-1"], "temperature is -1"),
        (["--ids", "1", "--seed", "-1"], "seed is -1"),
    ],
)
def test_errors_are_one_line(cli, artifact, arguments, message):
    assert message in cli.refused("generate", artifact, *arguments)


def test_a_spec_is_of_one_model(cli, artifact):
    assert "or generator" in cli.refused("compile", f"{artifact.parent / 'sums.py'}:both")


def test_a_prompt_on_stdin_must_be_utf8(cli, artifact):
    assert "not UTF-8" in cli.refused("generate", artifact, "-", input=b"\xff")


def test_prompts_are_read_as_far_as_they_are_profiled(artifact):
    def prompts():
        yield {"prompt": [[1]]}
        yield {"prompt": [[2]]}
        raise RuntimeError("nobody reads so far")

    spec = load_named(f"{artifact.parent / 'sums.py'}:model", lx.ModelSpec)
    spec = dataclasses.replace(spec, calibration=prompts)
    found = _models.to_profile(spec, spec.program())
    assert [each["prompt"] for each in itertools.islice(found, 2)] == [[[1]], [[2]]]
    assert _models.to_profile(dataclasses.replace(spec, calibration=[{"tokens": 1}]), spec.program()) is None


def test_tune_says_that_a_generator_is_tuned_by_a_step(cli, artifact):
    model = artifact.parent / "sums.py"
    more = (
        "\nprompts = lx.ModelSpec(generator=generator, calibration=[{'prompt': [[1]]}], evaluate=lambda predict: {})\n"
    )
    model.write_text(model.read_text() + more)
    result = cli("tune", f"{model}:prompts", "--max-drop", 1)
    assert result.exit_code == 2
    assert "generates, and its calibration data are prompts; tune a program of one step" in " ".join(
        result.stderr.split()
    )
