"""Promises of the review's server: only holders of a link are answered; nobody's text is lost over HTTP, kill -9 included."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from srpo_jax.data.loaders import load_jsonl
from srpo_jax.data.review import server
from srpo_jax.data.review.server import HEADERS, Links, check_names
from tests.data.candidates import write_world

ROOT = Path(__file__).resolve().parents[3]


class Served:
    """scripts/review.py as a process of its own."""

    def __init__(self, data, folder, *people, port=0, **flags):
        given = [f"--data={data}", f"--folder={folder}", f"--port={port}", *people]
        given += [f"--{name}={value}" for name, value in flags.items()]
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(ROOT / "scripts" / "review.py"), *given]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        self.links, told = {}, []
        for line in self.process.stdout:
            told.append(line)
            if found := re.match(r"(\w+): (http://127\.0\.0\.1:(\d+)/\S+)", line):
                self.links[found[1]], self.port = found[2], int(found[3])
            elif "Ctrl-C" in line:
                break
        assert self.links, "".join(told)

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        code = self.process.wait()
        self.process.stdout.close()
        return code


class Person:
    """A browser's part, without a browser."""

    def __init__(self, served, name):
        self.port, self.name = served.port, name
        token = urllib.parse.parse_qs(urllib.parse.urlparse(served.links[name]).query)["token"][0]
        self.headers = {"Cookie": f"review={token}"}
        page = self.ask("GET", "")[2].decode()
        self.headers["X-Review"] = re.search(r'write-token" content="(\w+)"', page)[1]

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        text = None if body is None else json.dumps(body)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"/{self.name}/{path}", text, self.headers | given)
        answer = connection.getresponse()
        told = answer.status, answer.headers, answer.read()
        connection.close()
        return told

    def act(self, index, action, version, edits=None, note="", **headers):
        body = {"action": action, "version": version, "edits": edits or {}, "note": note, "since": -1}
        status, _, text = self.ask("POST", f"api/records/{index}", body, **headers)
        return status, json.loads(text)

    def view(self, index):
        return json.loads(self.ask("GET", f"api/records/{index}")[2])["view"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")

    def hostile(line):
        if line["id"].endswith("4"):
            line["question"] = "</textarea><script>window.hit = 1</script> \u202eevil\ud800"

    return write_world(folder / "world", 12, change=hostile), folder / "review"


@pytest.fixture(scope="module")
def served(place):
    one = Served(*place, "--reviewer=anna", "--reviewer=boris")
    yield one
    one.kill()


@pytest.fixture(scope="module")
def anna(served):
    return Person(served, "anna")


@pytest.fixture(scope="module")
def boris(served):
    return Person(served, "boris")


def test_only_holders_of_a_link_are_answered(anna, boris):
    paths = ("", "page.js", "page.css", "api/rows", "api/records/0", "images/0/0")
    for path in paths:
        assert anna.ask("GET", path)[0] == 200
        for cookie in ("", "review=", "review=" + "0" * 64, boris.headers["Cookie"]):
            assert anna.ask("GET", path, Cookie=cookie)[0] == 403
    stranger = Person.__new__(Person)
    stranger.port, stranger.name, stranger.headers = anna.port, "carol", dict(anna.headers)
    assert {stranger.ask("GET", path)[0] for path in paths} == {403}


def test_a_link_becomes_a_cookie_of_its_folder_and_leaves_the_address(anna, served):
    query = urllib.parse.urlparse(served.links["anna"]).query
    status, headers, _ = anna.ask("GET", f"?{query}", Cookie="")
    assert (status, headers["Location"]) == (303, "/anna/")
    wrong = anna.ask("GET", "?token=" + "0" * 64, Cookie="")
    assert (wrong[0], wrong[1]["Set-Cookie"]) == (403, None)
    cookie = headers["Set-Cookie"].lower()
    assert all(part in cookie for part in ("path=/anna/", "httponly", "samesite=strict"))


def test_other_names_of_the_host_are_refused(anna):
    for host in ("evil.example", f"evil.example:{anna.port}", "127.0.0.1", f"127.0.0.1:{anna.port + 1}", "[::1]"):
        assert anna.ask("GET", "api/rows", Host=host)[0] == 421
    assert anna.ask("GET", "api/rows", Host=f"localhost:{anna.port}")[0] == 200


def test_a_write_from_another_page_is_refused(anna, boris):
    before = anna.view(1)
    tries = [
        {"X_Review": ""},
        {"X_Review": boris.headers["X-Review"]},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ]
    for headers in (*tries, {"Origin": f"http://127.0.0.1:{anna.port + 1}"}, {"Cookie": boris.headers["Cookie"]}):
        assert anna.ask("POST", "api/records/1", {"action": "reject", "version": 0, "since": -1}, **headers)[0] == 403
    assert anna.view(1) == before


def test_every_answer_carries_the_headers(anna):
    for path in ("", "api/rows", "images/0/0", "nothing", "api/records/999"):
        _, headers, _ = anna.ask("GET", path)
        assert {name: headers[name] for name in HEADERS} == HEADERS
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy and "*" not in policy


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ([], 400),
        ({"action": "reject", "version": "x", "since": 0}, 400),
        ({"action": "publish", "version": 0, "since": 0}, 400),
        ({"action": "draft", "version": 0, "since": 0, "edits": {"meta": "x"}}, 400),
        ({"action": "draft", "version": 0, "since": 0, "edits": {"question": "x" * (9 << 20)}}, 413),
    ],
)
def test_what_is_no_write_is_refused(anna, body, status):
    before = anna.view(1)
    assert anna.ask("POST", "api/records/1", body)[0] == status
    assert anna.view(1) == before


def test_there_are_only_its_own_files(anna):
    for path in (
        "..%2fserver.py",
        "server.py",
        "page.html",
        "images/0/1",
        "images/0/-1",
        "images/999/0",
        "%2e%2e/%2e%2e/etc/passwd",
    ):
        assert anna.ask("GET", path)[0] == 404
    assert anna.ask("DELETE", "api/records/1")[0] == 405


def test_a_picture_is_written_anew(anna, place):
    status, headers, content = anna.ask("GET", "images/1/0")
    assert (status, headers["Content-Type"], content[:4], content[8:12]) == (200, "image/webp", b"RIFF", b"WEBP")
    load_jsonl(place[0])[1].images[0].write_bytes(b"<svg onload='alert(1)'/>")
    status, headers, content = anna.ask("GET", "images/1/0")
    assert (status, headers["Content-Type"]) == (422, "application/json")
    assert "not a picture" in json.loads(content)["error"]


def test_half_characters_of_a_record_do_not_stop_the_page(anna):
    view = anna.view(4)
    assert "\ud800" in view["fields"]["question"]
    status, told = anna.act(4, "accept", view["version"])
    assert status == 422
    assert "question" in dict(told["problems"])


def test_two_windows_over_http(anna):
    version = anna.view(6)["version"]
    assert anna.act(6, "draft", version, {"question": "One window."})[0] == 200
    status, told = anna.act(6, "draft", version, {"question": "Another window."})
    assert status == 409
    assert told["view"]["edits"] == {"question": "One window."}
    assert [one["edits"] for one in told["view"]["aside"]] == [{"question": "Another window."}]


def test_two_people_at_once_never_overwrite_each_other(anna, boris, served):
    """Each writes drafts of each record as fast as they can; in the end each has their last, and one has decided."""
    indices, told = (8, 9, 10, 11), {}

    def work(person):
        for index in indices:
            for number in range(5):
                text = {"question": f"{person.name} {index} {number}"}
                assert person.act(index, "draft", number, text)[0] == 200
            told[person.name, index] = person.act(index, "accept", 5, text)[0]

    threads = [threading.Thread(target=work, args=(person,)) for person in (anna, boris)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in indices:
        twice = anna.view(index)["twice"]
        assert sorted((told["anna", index], told["boris", index])) == ([200, 200] if twice else [200, 409])
        for person in (anna, boris):
            assert person.view(index)["edits"] == {"question": f"{person.name} {index} 4"}


def test_what_was_saved_survives_kill_9_and_the_link_stays(place, tmp_path):
    one = Served(place[0], tmp_path / "review", "--reviewer=anna")
    person = Person(one, "anna")
    for number in range(3):
        assert person.act(2, "draft", number, {"question": f"Version {number}."}, "note")[0] == 200
    one.kill()
    again = Served(place[0], tmp_path / "review", "--reviewer=anna", port=one.port)
    assert again.links == one.links
    view = person.view(2)  # the same cookie
    assert (view["edits"], view["note"], view["version"]) == ({"question": "Version 2."}, "note", 3)
    assert person.act(2, "accept", 3, {"question": "Version 2."})[0] == 200
    assert again.kill(signal.SIGINT) == 75
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts/review.py"), f"--data={place[0]}", f"--folder={tmp_path / 'review'}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, f"--export={out}"], check=True, env=env, stdout=subprocess.DEVNULL)
    assert [record.question for record in load_jsonl(out / "records.jsonl")] == ["Version 2."]


def test_the_secret_is_for_its_owner(tmp_path):
    first = Links(tmp_path)
    assert (tmp_path / ".secret").stat().st_mode & 0o777 == 0o600
    tokens = {first.token(name, purpose) for name in ("anna", "boris") for purpose in ("link", "write")}
    assert len(tokens) == 4
    assert Links(tmp_path).token("anna", "link") in tokens
    assert Links(tmp_path / ".." / tmp_path.name).token("anna", "link") == first.token("anna", "link")
    (tmp_path / "other").mkdir()
    assert Links(tmp_path / "other").token("anna", "link") not in tokens


@pytest.mark.parametrize("names", [[], ["a/b"], [".."], [""], ["anna", "anna"], ["x" * 33], ["anna", "é"]])
def test_names_that_cannot_stand_in_an_address_are_refused(names):
    with pytest.raises(ValueError):
        check_names(names, [])
    assert server.check_names(["anna", "boris-2"], ["chris"]) is None
