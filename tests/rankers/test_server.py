"""The page's server: on this machine alone, for its own page alone, nothing but the videos of its comparisons."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from alignkit.errors import DataError
from alignkit.rankers.people import read_comparisons, waiting, write_comparisons
from alignkit.rankers.people.server import application, left_side, serve
from alignkit.rankers.people.votes import read_votes

uvicorn = pytest.importorskip("uvicorn", reason="the extra 'rank' is not installed")
pytest.importorskip("starlette", reason="the extra 'rank' is not installed")

COUNT = 4
KIND = "the-secret-method"


def fill(folder):
    (folder / "videos").mkdir(parents=True)
    for number in range(2 * COUNT):
        (folder / "videos" / f"{KIND}-{number}.mp4").write_bytes(bytes([number]) * (1000 + number))
    names = [f"videos/{KIND}-{number}.mp4" for number in range(2 * COUNT)]
    write_comparisons(
        folder,
        [
            {"id": f"{KIND}/{n}", "prompt": "a <b>ball</b>", "a": a, "b": b, "kind_a": KIND, "kind_b": "sft"}
            for n, (a, b) in enumerate(zip(names[::2], names[1::2], strict=True))
        ],
    )


class Page:
    """A running server, asked in plain HTTP so that nothing is tidied up on the way."""

    def __init__(self, folder):
        self.folder = folder
        listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{listener.getsockname()[1]}"
        settings = uvicorn.Config(application(folder), log_level="error", lifespan="off", ws="none")
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        self.token = re.search(rb'name="token" content="([^"]+)"', self.get("/")[2])[1].decode()

    def ask(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection(self.host, timeout=20)
        connection.putrequest(method, path, skip_host=True)
        sent = {"Host": self.host, **dict(headers)}
        if body is not None:
            sent["Content-Length"] = str(len(body))
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        try:
            content = answer.read()
        except ConnectionResetError:  # refused before the body was read: what is left of the answer may be gone
            content = b""
        found = answer.status, dict(answer.getheaders()), content
        connection.close()
        return found

    def get(self, path, **headers):
        return self.ask("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path, body, **changed):
        own = {"Content-Type": "application/json", "Origin": f"http://{self.host}", "X-Token": self.token}
        headers = own | {name.replace("_", "-"): value for name, value in changed.items()}
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, content = self.ask("POST", path, body, headers)
        return status, json.loads(content)

    def next(self, rater="ada"):
        return json.loads(self.get(f"/next?rater={rater}")[2])

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def page(tmp_path):
    fill(tmp_path / "ranked")
    found = Page(tmp_path / "ranked")
    yield found
    found.close()


def test_votes_are_taken_one_by_one_until_all_are_done_and_undone_again(page):
    state, keys = page.next(), []
    for number in range(COUNT):
        assert (state["done"], state["total"]) == (number, COUNT)
        keys.append(state["pair"]["key"])
        answer = ("left", "right", "tie", "skip")[number]
        status, state = page.post("/vote", {"rater": "Ada", "pair": keys[-1], "answer": answer})
        assert status == 200 and state["last"] == keys[-1]
    assert state["pair"] is None and (state["done"], state["skipped"]) == (COUNT, 1) and len(set(keys)) == COUNT
    votes = read_votes(page.folder)
    assert [vote.answer for vote in votes[2:]] == ["tie", "skip"]
    assert votes[0].answer == votes[0].left and votes[1].answer != votes[1].left
    for key in reversed(keys):
        _, state = page.post("/undo", {"rater": "ada", "pair": key})
        assert state["pair"]["key"] == key
    assert state["done"] == 0 and state["last"] is None and read_votes(page.folder) == []


def test_skipped_pairs_can_be_answered_when_all_else_is_done(page):
    """A stage that waits for votes would wait for ever where its only rater has skipped a pair."""
    for answer in ("left", "skip", "skip", "tie"):
        _, state = page.post("/vote", {"rater": "ada", "pair": page.next()["pair"]["key"], "answer": answer})
    assert state["pair"] is None
    status, state = page.post("/again", {"rater": "Ada"})
    assert status == 200 and (state["done"], state["skipped"]) == (2, 0)
    while state["pair"]:
        _, state = page.post("/vote", {"rater": "ada", "pair": state["pair"]["key"], "answer": "right"})
    assert waiting(page.folder) == 0


def test_a_vote_sent_twice_counts_once_and_never_for_the_next_pair(page):
    first = page.next()["pair"]["key"]
    vote = {"rater": "ada", "pair": first, "answer": "left"}
    with ThreadPoolExecutor(4) as pool:
        states = [state for _, state in pool.map(lambda _: page.post("/vote", vote), range(4))]
    assert {state["done"] for state in states} == {1} and len(read_votes(page.folder)) == 1
    _, state = page.post("/vote", vote | {"answer": "right"})
    assert state["done"] == 1 and len(read_votes(page.folder)) == 1, "the newest wins"


def test_sides_and_order_are_a_raters_own_and_do_not_change(page):
    sides = [[left_side(str(pair), rater) for pair in range(400)] for rater in ("ada", "bo")]
    assert sides[0] == [left_side(str(pair), "ada") for pair in range(400)]
    for left in (*sides, ["ab"[one == other] for one, other in zip(*sides, strict=True)]):
        assert 150 < left.count("a") < 250
    assert page.next("ada") == page.next("ada")
    assert len({page.next(f"rater{number}")["pair"]["key"] for number in range(40)}) == COUNT


def test_each_side_is_the_video_that_the_vote_is_counted_for(page):
    by_id = {pair.id: pair for pair in read_comparisons(page.folder)}
    for rater in ("ada", "bo", "cy", "di"):
        key = page.next(rater)["pair"]["key"]
        status, _, left = page.get(f"/video/{key}/left?rater={rater}")
        page.post("/vote", {"rater": rater, "pair": key, "answer": "left"})
        vote = read_votes(page.folder)[-1]
        pair = by_id[vote.comparison]
        assert status == 200 and left == (pair.video_a if vote.answer == "a" else pair.video_b).read_bytes()


def test_nothing_that_is_sent_tells_the_method(page):
    sent = []
    for path in ("/", "/page.js", "/page.css", "/next?rater=ada", "/favicon.ico"):
        sent.append(page.get(path))
    key = page.next()["pair"]["key"]
    for side in ("left", "right"):
        status, headers, content = page.get(f"/video/{key}/{side}?rater=ada")
        assert status == 200 and headers["content-type"] == "video/mp4"
        sent.append((status, headers, content))
    dates = {headers.get("last-modified") for _, headers, _ in sent[-2:]}
    assert dates == {"Thu, 01 Jan 1970 00:00:00 GMT"}, "when a file was made tells with which others"
    assert KIND not in repr(sent) and "sft" not in repr([one[:2] for one in sent])


def test_a_video_is_served_in_parts(page):
    key = page.next()["pair"]["key"]
    status, headers, content = page.get(f"/video/{key}/left?rater=ada", Range="bytes=10-19")
    assert status == 206 and len(content) == 10 and headers["content-range"].startswith("bytes 10-19/")
    assert page.get(f"/video/{key}/left?rater=ada", Range="bytes=5000-")[0] == 416


@pytest.mark.parametrize(
    "host", ["example.com", "127.0.0.1.example.com", "10.0.0.1:80", "", None, "localhost.example.com:80", "[::1]"]
)
def test_another_name_for_this_machine_is_refused(page, host):
    for path in ("/", "/next?rater=ada", "/video/x/left?rater=ada"):
        assert page.get(path, Host=host)[0] in (400, 403)
    status, _, _ = page.ask("POST", "/vote", b"{}", {"Host": host, "Content-Type": "application/json"})
    assert status in (400, 403)


def test_a_tunnel_from_another_machine_works(page):
    assert page.get("/", Host="localhost:9000")[0] == 200
    vote = {"rater": "ada", "pair": page.next()["pair"]["key"], "answer": "tie"}
    assert page.post("/vote", vote, Host="localhost:9000", Origin="http://localhost:9000")[0] == 200


@pytest.mark.parametrize(
    "changed, status",
    [
        ({"Origin": "http://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": None}, 415),
        ({"X_Token": None}, 403),
        ({"X_Token": "another server's"}, 403),
        ({"X_Token": "é"}, 403),
    ],
)
def test_a_vote_that_another_site_sends_is_refused(page, changed, status):
    vote = {"rater": "ada", "pair": page.next()["pair"]["key"], "answer": "left"}
    for path in ("/vote", "/undo"):
        found, answer = page.post(path, vote, **changed)
        assert found == status and answer["error"].endswith(("alone.", "sites.", "json.", "Reload it."))
    assert read_votes(page.folder) == []


def test_other_sites_cannot_show_videos_or_frame_the_page(page):
    key = page.next()["pair"]["key"]
    assert page.get(f"/video/{key}/left?rater=ada", Sec_Fetch_Site="cross-site")[0] == 403
    status, headers, _ = page.get("/", Sec_Fetch_Site="cross-site")
    assert status == 200, "a link to the page is fine"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    for path in ("/page.js", "/nothing", f"/video/{key}/left?rater=ada"):
        assert page.get(path)[1]["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/../votes.sqlite",
        "/votes.sqlite",
        "/comparisons.jsonl",
        "/server.py",
        "/page.html",
        "/video/../votes.sqlite",
        "/video/..%2f..%2fvotes.sqlite/left?rater=ada",
        "/video/%2e%2e/%2e%2e/comparisons.jsonl?rater=ada",
        "/video/..%5c..%5cvotes.sqlite/left?rater=ada",
        "/video/KEY/left%2f..%2f..?rater=ada",
        "/video/KEY/..?rater=ada",
        "/video/KEY/both?rater=ada",
        "/video/KEY/left",
        "/video/KEY/left?rater=%00",
        "/video/%00/left?rater=ada",
        "//etc/passwd",
        "/page.js/../../server.py",
        "/page.js%2f..%2fserver.py",
    ],
)
def test_nothing_else_is_served_however_it_is_asked_for(page, path):
    path = path.replace("KEY", page.next()["pair"]["key"])
    status, headers, content = page.get(path)
    assert status in (400, 404, 409) and headers["content-type"] == "application/json" and len(content) < 200


@pytest.mark.parametrize(
    "changed, status, said",
    [
        ({"rater": None}, 400, "needs a rater's name"),
        ({"rater": " "}, 400, "needs a rater's name"),
        ({"rater": {"$ne": 1}}, 400, "needs a rater's name"),
        ({"pair": "unknown"}, 409, "not among the comparisons any more. Reload"),
        ({"pair": None}, 409, "not among the comparisons any more. Reload"),
        ({"pair": ["a"]}, 409, "not among the comparisons any more. Reload"),
        ({"answer": "a"}, 400, "one of left, right, tie and skip"),
        ({"answer": None}, 400, "one of left, right, tie and skip"),
        ({"answer": ["left"]}, 400, "one of left, right, tie and skip"),
    ],
)
def test_a_vote_that_belongs_to_nobody_or_nothing_is_refused_in_a_sentence(page, changed, status, said):
    vote = {"rater": "ada", "pair": page.next()["pair"]["key"], "answer": "left"}
    found, answer = page.post("/vote", vote | changed)
    assert found == status and said in answer["error"] and answer["error"][0].isupper()
    assert read_votes(page.folder) == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"' + b"x" * 5000 + b'"', b"\xff", b"[" * 4000])
def test_what_is_no_vote_at_all_is_refused(page, body):
    status, answer = page.post("/vote", body)
    assert status in (400, 413) and answer["error"].startswith("A vote ")


def test_a_video_that_changes_or_goes_is_not_voted_on_but_can_be_skipped(page):
    state = page.next()
    key = state["pair"]["key"]
    for video in (page.folder / "videos").iterdir():
        video.write_bytes(b"made again")
    vote = {"rater": "ada", "pair": key, "answer": "left"}
    status, answer = page.post("/vote", vote)
    assert status == 409 and answer["error"] == "A video of this pair was changed or deleted. Start the server again."
    for video in (page.folder / "videos").iterdir():
        video.unlink()
    assert page.get(f"/video/{key}/left?rater=ada")[0] == 409
    assert page.post("/vote", vote | {"answer": "skip"})[0] == 200
    assert page.post("/undo", {"rater": "ada", "pair": key})[1]["done"] == 0


@pytest.mark.parametrize("disguised", [False, True])
def test_a_video_that_became_a_link_to_the_outside_is_not_served(page, disguised):
    """Also where what it leads to has the video's size and date, by which a changed one is known."""
    key = page.next()["pair"]["key"]
    for video in (page.folder / "videos").iterdir():
        secret, facts = page.folder.parent / video.name, video.stat()
        secret.write_bytes(b"secret".ljust(facts.st_size))
        if disguised:
            os.utime(secret, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        video.unlink()
        video.symlink_to(secret)
    status, _, content = page.get(f"/video/{key}/left?rater=ada")
    assert status == (404 if disguised else 409) and b"secret" not in content


def test_an_undo_from_another_window_is_refused(page):
    keys = []
    for _ in range(2):
        keys.append(page.next()["pair"]["key"])
        page.post("/vote", {"rater": "ada", "pair": keys[-1], "answer": "left"})
    status, answer = page.post("/undo", {"rater": "ada", "pair": keys[0]})
    assert status == 409 and "another window" in answer["error"] and len(read_votes(page.folder)) == 2


def test_votes_that_cannot_be_kept_are_said_to_the_rater(page):
    vote = {"rater": "ada", "pair": page.next()["pair"]["key"], "answer": "left"}
    for file in page.folder.glob("votes.sqlite*"):
        file.unlink()
    (page.folder / "votes.sqlite").write_bytes(b"no database at all\n" * 60)
    status, answer = page.post("/vote", vote)
    assert status == 500 and "votes cannot be written" in answer["error"]


def test_the_command_listens_on_this_machine_alone_and_ends_without_a_traceback(tmp_path):
    fill(tmp_path / "ranked")
    code = "import sys, pathlib; from alignkit.rankers.people.server import serve; serve(pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "ranked"], stderr=subprocess.PIPE, text=True)
    said = process.stderr.readline()
    host, port = re.search(r"http://([\d.]+):(\d+)/ ", said).groups()
    with socket.create_connection((host, int(port))):  # left open, as browsers do
        with open("/proc/net/tcp") as table:
            listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
        assert f"0100007F:{int(port):04X}" in listening
        with pytest.raises(DataError, match=rf"^port {port} cannot be had \(.*in use\); choose another one"):
            serve(tmp_path / "ranked", port=int(port))
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and rest == ""


def test_without_the_packages_one_line_says_what_to_install(tmp_path, monkeypatch):
    fill(tmp_path / "ranked")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(DataError, match=r"pip install 'alignkit\[rank\]'$"):
        application(tmp_path / "ranked")


def test_votes_are_read_without_the_packages():
    code = (
        "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None\n"
        "from alignkit.rankers.people import answers, summary, waiting"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_folder_without_comparisons_is_not_served(tmp_path):
    with pytest.raises(DataError, match=r"holds no comparisons.jsonl"):
        serve(tmp_path)
    (tmp_path / "comparisons.jsonl").touch()
    with pytest.raises(DataError, match="holds no comparison; write a line"):
        serve(tmp_path)
    assert not (tmp_path / "votes.sqlite").exists()
