"""A model that generates learns from prompts and their right replies, on files and from a running server."""

import json
import threading
import urllib.error
import urllib.request

import learning_replies
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.learning import Learner, LearningPlan
from lepton_xla.learning.mixing import OldData
from lepton_xla.learning.pushing import Push
from lepton_xla.samples import Kept, LabelHead, SampleHead, record
from lepton_xla.serve import Options, Server
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.models.repository import Repository

STAGES = ({"shadow": 1.0, "answers": 5}, {"share": 0.5, "answers": 5})
PLAN = LearningPlan(least_rows=60, least_held_out=15, stages=STAGES, rollback=("errors > 1%",))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """It knows the replies to some kinds of prompt, in int8, and keeps its float master."""
    path = tmp_path_factory.mktemp("replies") / "replies.lepton"
    recipe, buckets = lx.Recipe.load("int8-weight-only"), {"length": (learning_replies.LONGEST,)}
    small = lx.optimize(learning_replies.trained(), recipe, buckets=buckets, keep_master=True)
    lx.compile(small, buckets, name="replies", recipe=recipe, keep_master=True).save(path)
    return path


def text_of(kind):
    return " ".join(map(str, learning_replies.reply(kind)))


def right(servable, kinds):
    asked = learning_replies.prompts(40, 9, kinds)
    found = servable.generator.generate(asked, max_tokens=5)
    return np.mean([list(each.tokens) == learning_replies.reply(each.prompt[0]) for each in found])


def write(folder, asked):
    records = []
    for number, prompt in enumerate(asked):
        tokens = np.int32([prompt])
        head = SampleHead(f"{number}", "1", number, (Kept("tokens", "int32", tokens.shape),), ())
        records += [record(head, tokens.tobytes()), record(LabelHead(f"{number}", "1", number, (), text_of(prompt[0])))]
    (folder / "replies").mkdir(parents=True)
    (folder / "replies" / "1-1.samples").write_bytes(b"".join(records))


def test_right_replies_to_new_prompts_are_learned_and_old_ones_kept(base, tmp_path):
    write(tmp_path / "samples", learning_replies.prompts(150, 2, learning_replies.NEW))
    spec = learning_replies.spec()
    ended = Learner(spec, base, tmp_path / "samples", tmp_path / "learning", plan=PLAN).once()
    assert (ended.phase, ended.verdict["accuracy_before"], ended.verdict["accuracy"]) == ("kept", 0.0, 1.0)
    before = lx.load(base)
    after = lx.load(tmp_path / "learning/replies/round/update.lepton", base=before)
    assert [right(before, learning_replies.KNOWN), right(before, learning_replies.NEW)] == [1.0, 0.0]
    assert [right(after, learning_replies.KNOWN), right(after, learning_replies.NEW)] == [1.0, 1.0]


def test_what_is_lost_of_old_replies_is_refused(base, tmp_path):
    write(tmp_path / "samples", learning_replies.prompts(150, 2, learning_replies.NEW))
    figures = iter([1.0, 0.9])
    spec = learning_replies.spec(evaluate=lambda predict: {"accuracy": next(figures)})
    ended = Learner(spec, base, tmp_path / "samples", tmp_path / "learning", plan=PLAN).once()
    assert ended.phase == "refused"
    assert ended.reason.startswith("on old data accuracy goes from")


@pytest.mark.parametrize("lacks", ["loss", "examples", "evaluate"])
def test_what_the_spec_lacks_is_named(base, tmp_path, lacks):
    with pytest.raises(lx.LearningError, match=f"the model generates: give the TrainSpec `{lacks}`"):
        Learner(learning_replies.spec(**{lacks: None}), base, tmp_path, tmp_path / "learning")


def test_examples_that_are_no_rows_of_a_batch_are_refused(base, tmp_path):
    write(tmp_path / "samples", learning_replies.prompts(150, 2, learning_replies.NEW))
    spec = learning_replies.spec(examples=lambda prompts, replies: {"tokens": np.zeros((len(prompts), 4), np.int32)})
    with pytest.raises(lx.LearningError, match="a sample has the entries tokens; a batch has tokens, said"):
        Learner(spec, base, tmp_path / "samples", tmp_path / "learning", plan=PLAN).once()


def test_feedback_that_the_examples_do_not_know_is_one_line(base, tmp_path):
    write(tmp_path / "samples", learning_replies.prompts(150, 2, learning_replies.NEW))

    def learner(examples):
        spec = learning_replies.spec(examples=examples)
        return Learner(spec, base, tmp_path / "samples", tmp_path / "learning", plan=PLAN)

    with pytest.raises(lx.LearningError, match=r"^the TrainSpec's examples failed: KeyError: "):
        learner(lambda prompts, replies: {}[replies[0]]).once()
    with pytest.raises(lx.SampleError, match=r"^as it was$"):
        learner(lambda prompts, replies: (_ for _ in ()).throw(lx.SampleError("as it was"))).once()


@pytest.mark.parametrize(
    ("tokens", "labels", "said"),
    [
        (np.zeros((3, 2)), np.zeros(2), "a sample has the rows 3 of 'tokens', 2 of 'label'"),
        (np.zeros((0, 2)), np.zeros(0), "a sample has the rows 0 of 'tokens', 0 of 'label'"),
        (np.zeros((3, 2)), np.float32(1), "the entry 'label' of a sample is \\[\\]"),
    ],
)
def test_rows_that_cannot_be_mixed_are_refused(tokens, labels, said):
    old = OldData([{"tokens": np.zeros((4, 2)), "label": np.zeros(4)}], None, most_rows=4)
    with pytest.raises(lx.LearningError, match=said):
        old.fitting({"tokens": tokens, "label": labels}, "a sample")


def post(url, path, body):
    with urllib.request.urlopen(f"{url}{path}", json.dumps(body).encode(), timeout=30) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_learned_replies_come_through_shadow_canary_and_promotion(base, tmp_path):
    Repository(tmp_path / "models").push(base, "replies")
    (tmp_path / "models" / "replies" / "model.toml").write_text('versions = "all"\n')
    options = Options(port=0, samples=tmp_path / "samples", repository_poll_s=0.05)
    stop, failures = threading.Event(), []

    def ask(url, number):
        (prompt,) = learning_replies.prompts(1, 1000 + number, learning_replies.NEW)
        asked = {"input_ids": prompt, "id": f"{number}", "max_tokens": 5}
        answer = post(url, "/v2/models/replies/generate", asked)
        post(url, "/v2/models/replies/feedback", {"feedback": [{"id": f"{number}", "label": text_of(prompt[0])}]})
        return answer["model_version"], answer["token_ids"] == learning_replies.reply(prompt[0])

    def users(url):
        number = 120
        while not stop.wait(0.005):
            try:
                ask(url, number := number + 1)
            except urllib.error.HTTPError as error:
                failures.append(error)

    with Server(options=options, repository=tmp_path / "models") as running, RepositoryClient(running.url) as client:
        assert {ask(running.url, number) for number in range(120)} == {("1", False)}
        thread = threading.Thread(target=users, args=(running.url,))
        thread.start()
        try:
            push = Push(client, "replies", poll_s=0.05)
            learner = Learner(
                learning_replies.spec(), base, tmp_path / "samples", tmp_path / "learning", push=push, plan=PLAN
            )
            ended = learner.once()
        finally:
            stop.set()
            thread.join()
        assert (ended.phase, ended.version) == ("promoted", "2"), ended.reason
        assert not failures
        assert {ask(running.url, number) for number in range(5000, 5010)} == {("2", True)}
        # The shadow was asked after version 1, and compared; the canary answered some.
        shadow = running.metrics.of("replies", "2").shadow
        assert shadow["different"] > 0
        assert shadow["failed"] == 0
        assert {version for window in learner.tracked() for version in window.versions} == {"1", "2"}
