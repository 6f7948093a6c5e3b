"""The recommender: its metrics against cases by hand, its network against NumPy, and films whose parts are missing."""

import importlib
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "apps"
PARTS = ("run", "films", "network", "ranking", "reports", "training", "targets", "loop")


@pytest.fixture
def app(monkeypatch, tmp_path):
    """The modules of the application, by name; they write into a folder of the test."""
    monkeypatch.setenv("LEPTON_APPS", str(tmp_path))
    for folder in (FOLDER, FOLDER / "recommender"):
        monkeypatch.syspath_prepend(str(folder))
    # The example is written as users write.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield {name: importlib.import_module(name) for name in PARTS}
    for name in PARTS:
        sys.modules.pop(name, None)


def test_a_ranking_by_hand(app):
    # 200 films; user 0's film is the best, user 1's is behind 30 unseen ones, user 2's ties with all.
    scores = np.tile(-np.arange(201.0), (3, 1))
    last = np.array([1, 31, 5])
    scores[2] = 0.0
    seen = np.zeros((3, 201), bool)
    seen[:, 0] = True
    found = app["ranking"].judge(scores, last, seen)
    assert found["recall@20"] == pytest.approx(1 / 3)
    assert found["precision@20"] == pytest.approx(1 / 60)
    assert found["ndcg@20"] == pytest.approx(1 / 3)  # the first place of one of three
    # Of 99 uniform ones about 15 % are among the 30 that are better than user 1's.
    assert found["pairwise"] == pytest.approx((1 + 0.85 + 0.5) / 3, abs=0.04)
    assert found["hit@20"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    seen[1, 1:31] = True
    assert app["ranking"].judge(scores, last, seen)["recall@20"] == pytest.approx(2 / 3)


def test_baselines_never_see_the_last_film(app):
    sessions = [np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([1, 3])]
    counts = app["ranking"].popularity(sessions, 4)[0]
    assert counts.tolist() == [0, 3, 2, 0, 0]
    near = app["ranking"].item_neighbours(sessions, 4)
    assert near.shape == (3, 5)
    assert near[0, 2] > near[0, 3] == 0


def test_the_network_is_a_gru(app):
    """Against a GRU in NumPy, float64; nothing before the session changes it."""
    network = app["network"]
    genres = np.ones((8, 2), np.float32)
    weights = {name: np.asarray(leaf) * 5 for name, leaf in network.begin(7, {"genres": genres}, 0, width=4).items()}
    weights["films"] = weights["films"] + genres @ weights["from_genres"]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    state = np.zeros(4)
    for film in (3, 5, 2):
        entering = weights["films"][film].astype(np.float64) @ weights["gru/input"]
        (reset, update, new), (own_reset, own_update, own) = (
            np.split(entering, 3),
            np.split(state @ weights["gru/state"], 3),
        )
        gate = sigmoid(update + own_update)
        state = (1 - gate) * state + gate * np.tanh(new + sigmoid(reset + own_reset) * own)
    weights["age"] = np.arange(60, dtype=np.float32)
    years = np.array([0, 1990, 2000, 2001, 2010, 1990, 1940, 1900], np.int32)
    expected = state @ weights["out"] @ weights["films"].T + np.clip(2000 - years + 1, 0, 59)
    arrays = {name: jnp.asarray(leaf) for name, leaf in weights.items()} | {"years": jnp.asarray(years)}
    for before in (0, 4):
        session = jnp.asarray([[0] * before + [3, 5, 2]], jnp.int32)
        found = np.asarray(network.scores(arrays, session, jnp.asarray([2000], jnp.int32)))[0]
        np.testing.assert_allclose(found[[1, 4, 6, 7]], expected[[1, 4, 6, 7]], rtol=1e-4, atol=1e-5)
        assert (found[[0, 2, 3, 5]] < -1e8).all()  # none, and those of the session


def test_films_without_a_part_are_served_and_the_best_come_first(app):
    network, films = app["network"], app["films"].made_up(users=20, films=60)
    features = {"genres": films.genres, "years": app["films"].year_table(films.years)}
    weights = network.begin(films.count, features, 0)
    inputs, _, _ = films.tests()
    whole = network.served(weights, features, films.years)
    missing = {**features, "genres": np.zeros_like(features["genres"])}
    without = network.served(weights, missing, films.years)
    expected = np.asarray(weights["films"]) + features["years"] @ np.asarray(weights["from_years"])
    np.testing.assert_allclose(without.weights["films"], expected, atol=1e-6)
    assert np.abs(np.asarray(whole.weights["films"]) - expected)[1:].max() > 1e-3
    top = network.with_top(without, 5)
    found = jax.device_get(top(top.weights, inputs["session"], inputs["year"]))
    scores = np.asarray(without(without.weights, inputs["session"], inputs["year"]))
    assert found["films"].tolist() == np.argsort(-scores, axis=1, kind="stable")[:, :5].tolist()
    assert all(not set(row) & set(session) for row, session in zip(found["films"], inputs["session"], strict=True))


def test_films_that_nobody_knows_are_left_out_of_a_session(app):
    network = app["network"]
    genres = np.ones((8, 2), np.float32)
    weights = network.served(network.begin(7, {"genres": genres}, 0, width=4), {"genres": genres}, np.zeros(8)).weights
    sessions = np.zeros((5, 6), np.int32)
    sessions[:, -2:] = [3, 5]
    sessions[1:, :4] = [[9, -1, 8, 0], [2**31 - 1] * 4, [-(2**31)] * 4, [-2] * 4]
    found = np.asarray(network.scores(weights, jnp.asarray(sessions), jnp.full(5, 2000)))
    np.testing.assert_array_equal(found[1:], found[:1].repeat(4, 0))
    assert (found[0] < -1e8).nonzero()[0].tolist() == [0, 3, 5]


def test_windows_hold_what_follows_and_nobodys_last_two_films(app):
    films = app["films"].made_up(users=30, films=80)
    windows = films.windows(length=8)
    for session, following in zip(windows["session"], windows["next"], strict=True):
        kept = session[session > 0]
        assert kept[1:].tolist() == following[following > 0][: len(kept) - 1].tolist()
    pairs = set(zip(windows["session"].ravel().tolist(), windows["next"].ravel().tolist(), strict=True))
    last = {tuple(pair) for session in films.sessions for pair in itertools.pairwise(session[-3:].tolist())}
    known = {pair for session in films.sessions for pair in itertools.pairwise(session[:-2].tolist())}
    assert len(known) > 100
    assert known <= pairs
    assert not (last - known) & pairs


def test_the_films_to_choose_by_come_before_those_to_judge_on(app):
    films = app["films"].made_up(users=10, films=60)
    for place in (1, 2):
        inputs, last, seen = films.tests(place=place)
        for user, session in enumerate(films.sessions):
            assert last[user] == session[-place]
            assert not seen[user, last[user]]
            assert inputs["session"][user, -1] == session[-place - 1]
            assert sorted(np.flatnonzero(seen[user])[1:]) == sorted(session[:-place])


def test_a_film_of_which_a_part_is_not_known_is_what_the_others_say(app, monkeypatch):
    training = app["training"]
    own = training.setting(1, made_up=True)
    weights = {name: np.asarray(leaf) for name, leaf in app["network"].begin(own.films.count, own.features, 0).items()}
    monkeypatch.setattr(training, "trained", lambda *_: dict(weights))
    parts = {name: table @ weights[f"from_{name}"] for name, table in own.features.items()} | {"ids": weights["films"]}
    assert own.parts == ["ids", "genres", "years"]
    for part in own.parts:
        expected = sum(each for name, each in parts.items() if name != part)
        np.testing.assert_allclose(own.served(0, missing=part).weights["films"], expected, atol=1e-5)
    assert own.without("ids").parts == ["genres", "years"]
    assert own.without("years").parts == ["ids", "genres"]


def test_a_festival_changes_what_is_watched_and_nobody_judges_what_was_sent(app):
    films = app["films"].made_up(users=40, films=400)
    plan, shown = app["run"].users(films), set(app["targets"].festival(films).tolist())
    inputs, labels = plan.ask(3, False)
    assert inputs["session"].shape == (8, 50)
    assert plan.ask(3, False)[1] == labels
    shifted, following = plan.ask(3, True)
    assert set(following) <= shown
    for row, label in zip(shifted["session"], following, strict=True):
        assert len(shown & set(row.tolist())) > 10
        assert label not in row
    last = {(tuple(app["films"].padded(each[:-1], 50).tolist()), int(each[-1])) for each in films.sessions}
    judging = [plan.ask(number, False) for number in plan.judges[:3]]
    sent = [plan.ask(number, False) for number in range(3)]
    for asked, inside in ((judging, True), (sent, False)):
        rows = [
            (tuple(row), label)
            for given, right in asked
            for row, label in zip(given["session"].tolist(), right, strict=True)
        ]
        assert all((row in last) is inside for row in rows)
    assert plan.score({"films": np.array([[1, 2], [3, 4]])}, [2, 5]) == 0.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_to_its_end_on_made_up_films(app, tmp_path):
    figures = app["run"].main(["--quick"])
    assert figures["pairwise"] > 0.65
    assert figures["steps"]["tuned (served)"]["bytes"] < 0.6 * figures["steps"]["float"]["bytes"]
    assert json.loads((tmp_path / "summary.json").read_text())["recommender"]["data"] == "made up"
    assert lx.load(tmp_path / "recommender" / "films.lepton").name == "films"
    assert figures["round"] in ("promoted", "refused")
    page = (tmp_path / "recommender" / "report.html").read_text()
    assert page.count("<svg") >= 2
