import contextlib
import json
import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_fakes import exchange, label

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol.routes import CONTROL, OPEN_PATHS, ROUTES, TOKENLESS_PATHS, find

REFUSED = [route for route in ROUTES if route.refusal]
SERVED = [route for route in ROUTES if not route.refusal and route.name not in CONTROL | {"audit"}]
names = st.text(min_size=1, max_size=8).filter(lambda name: name not in ("stats",))


def filled(path, values):
    return re.sub(r"{(\w+)}", lambda match: quote(values[match[1]], safe=""), path)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
@given(names, names, names, names)
def test_every_route_is_found_at_all_its_paths_with_any_name_in_them(route, model, version, label, region):
    values = {"model": model, "version": version, "label": label, "region": region, "sha256": region}
    for path in route.paths:
        wanted = {name: values[name] for name in re.findall(r"{(\w+)}", path)}
        target = filled(path, values).encode()
        methods = (b"GET", b"HEAD") if route.method == "GET" else (route.method.encode(),)
        for method in methods:
            assert find(method, target) == (route, wanted)
            assert find(method, target + b"?a=/x") == (route, wanted)
        with pytest.raises(HTTPError, match="no such route"):
            find(methods[0], target + b"//")
        with pytest.raises(HTTPError) as caught:
            find(b"PATCH", target)
        assert caught.value.status == 405
        assert (route.method in caught.value.headers[0]) == (route.status != 405)


def test_no_two_routes_share_a_method_and_a_path_and_none_goes_by_two_names():
    places = [(route.method, re.sub("{.*?}", "{}", path)) for route in ROUTES for path in route.paths]
    assert len(set(places)) == len(places)
    assert len({route.name for route in ROUTES}) == len(ROUTES)


def test_only_health_is_open_and_all_that_changes_anything_needs_admin():
    assert set(OPEN_PATHS) == {b"/v2/health/live", b"/v2/health/ready"}
    assert {b"/ui", b"/ui/", b"/ui/ui.css"} | {
        f"/ui/{name}.js".encode() for name in ("ui", "figures", "drawing", "explain", "traffic")
    } == TOKENLESS_PATHS - OPEN_PATHS
    for route in ROUTES:
        assert (route.scope == "health") == route.path.startswith("/v2/health/")
        assert (route.scope == "page") == route.path.startswith("/ui")
        if route.method in ("PUT", "DELETE"):
            assert route.scope == "admin"
        if route.method == "POST":
            asked = (
                "infer",
                "explain",
                "model_feedback",
                "generate",
                "generate_stream",
                "completions",
                "chat_completions",
            )
            scopes = dict.fromkeys(asked, "infer") | {"repository_index": "read"}
            assert route.scope == scopes.get(route.name, "admin")


targets = st.binary(max_size=30) | st.text("v2/models{}%.", max_size=20).map(str.encode)


@given(targets, st.sampled_from([b"GET", b"POST", b"\xff"]))
def test_any_target_is_found_or_refused(target, method):
    with contextlib.suppress(HTTPError):
        assert find(method, target)[0] in ROUTES


@pytest.mark.parametrize("route", SERVED, ids=lambda route: route.name)
def test_every_route_of_the_table_is_answered(server, route):
    values = {"model": "affine", "version": "3", "label": "stable"}
    label(server, stable="3")
    for path in route.paths:
        status, headers, body = exchange(server, route.method, filled(path, values))
        expected = 400 if route.scope == "infer" else 200  # these need a body
        # No model explains this one.
        assert status == (404 if route.name == "explain" else expected)
        assert body
        if route.method == "GET" and route.scope != "infer":
            probe, probed, nothing = exchange(server, "HEAD", filled(path, values))
            assert (probe, nothing) == (200, b"")
            assert probed["content-type"] == headers["content-type"]
            if route.response is not None:
                assert probed["content-length"] == headers["content-length"]


@pytest.mark.parametrize("route", REFUSED, ids=lambda route: route.name)
def test_what_is_not_offered_says_so(server, route):
    for path in route.paths:
        target = filled(path, {"model": "affine", "region": "r"})
        status, headers, body = exchange(server, route.method, target, b"{}")
        assert (status, json.loads(body)) == (route.status, {"error": route.refusal})
        assert headers.get("allow") == ("GET, HEAD" if status == 405 else None)


@pytest.mark.parametrize("route", [route for route in ROUTES if route.name in CONTROL], ids=lambda route: route.name)
def test_a_server_without_a_repository_says_so(server, route):
    values = {"model": "affine", "version": "3", "label": "stable", "sha256": "0" * 64}
    for path in route.paths:
        status, _, body = exchange(server, route.method, filled(path, values), b"" if route.method == "GET" else b"{}")
        assert status == 501
        assert "has no repository" in json.loads(body)["error"]
