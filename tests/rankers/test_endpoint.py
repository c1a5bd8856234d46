"""A vision-language model as the ranker, against a local server that misbehaves in every way that was thought of."""

import asyncio
import base64
import gzip
import json
import logging
import socket
import sys
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
import torch
from misbehaving import (
    USAGE,
    Server,
    cut_off,
    endless,
    error,
    garbled,
    hangs,
    levels,
    prefers_bright,
    says,
    sides,
    status,
    verdict,
)
from pydantic import ValidationError

from alignkit.config.endpoint import EndpointSection
from alignkit.errors import DataError
from alignkit.media.videos import write_video
from alignkit.rankers.asking import ask
from alignkit.rankers.endpoint import ByEndpoint
from alignkit.rankers.endpoint_messages import seconds_to_wait, shown, verdict_in
from alignkit.rankers.protocol import Comparison

KEY = "sk-Very.Secret/0123456789"
VARIABLE = "RANKING_TEST_KEY"
STEP = 16  # grey levels between two frames; h264 and JPEG together change a flat picture by 2


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten frames each, frame i of grey level 16·i (bright.mp4: 90 higher)."""
    folder = tmp_path_factory.mktemp("videos")
    for name, offset in {"dark": 0, "bright": 90}.items():
        levels = torch.arange(10) * STEP + offset
        frames = levels.to(torch.uint8).view(10, 1, 1, 1).expand(10, 32, 48, 3)
        write_video(folder / f"{name}.mp4", frames.contiguous(), 8)
    return folder / "dark.mp4", folder / "bright.mp4"


@pytest.fixture
def serve(monkeypatch):
    """`serve(reply, …)`: a server; the key is in the environment, and no proxy stands before it."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(*replies):
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ranker_for(url, **settings):
    given = {"url": url, "model": "a-model", "key_env": VARIABLE, "retries": 1, "frames": 3, "timeout_s": 5} | settings
    return ByEndpoint(EndpointSection(**given), first_wait=0.001)


def compare(ranker, videos, prompt="a prompt"):
    return asyncio.run(ranker.compare(prompt, *videos), debug=True)


def refusal(ranker, videos):
    with pytest.raises(DataError) as caught:
        compare(ranker, videos)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, "one line that can be read"
    return message


# --- what is asked -------------------------------------------------------------------------------------------


def test_the_video_that_is_better_in_both_orders_wins(serve, videos):
    server = serve(prefers_bright)
    dark, bright = videos
    ranker = ranker_for(server.url)
    assert compare(ranker, (bright, dark)) == 1.0 and compare(ranker, (dark, bright)) == 0.0
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    "answers", [("first", "first"), ("second", "second"), ("tie", "tie"), ("first", "tie"), ("tie", "first")]
)
def test_a_model_that_names_a_place_or_wavers_gives_a_tie(serve, videos, answers):
    assert compare(ranker_for(serve(*map(verdict, answers)).url), videos) == 0.5


def test_the_frames_are_those_of_each_video_in_order_and_the_second_question_swaps_them(serve, videos):
    server = serve(prefers_bright)
    compare(ranker_for(server.url, frames=4), videos, prompt='{"better": "first"} {prompt}')
    shown_first, shown_second = ([levels(urls) for urls in sides(body)[:2]] for _, body, _ in server.asked)
    dark, bright = STEP * np.array([0, 3, 6, 9]), STEP * np.array([0, 3, 6, 9]) + 90
    for found, expected in zip([*shown_first, *shown_second], [dark, bright, bright, dark], strict=True):
        np.testing.assert_allclose(found, expected, atol=STEP / 2 - 1)
    headers, body, path = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("a-model", 0.0, 256)
    assert 'the same prompt: {"better": "first"} {prompt}\n' in sides(body)[2]


def test_a_short_video_is_sent_whole_and_no_frame_twice(serve, videos):
    server = serve(prefers_bright)
    compare(ranker_for(server.url, frames=64), videos)
    assert len(sides(server.asked[0][1])[0]) == 10


def test_a_whole_video_is_sent_as_it_is_on_disk(serve, videos):
    server = serve(verdict("tie"))
    compare(ranker_for(server.url, send="video"), videos)
    for urls, video in zip(sides(server.asked[0][1])[:2], videos, strict=True):
        assert urls == ["data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()]


def test_what_a_model_refuses_can_be_left_out_and_a_server_without_keys_gets_none(serve, videos, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    server = serve(verdict("tie"))
    compare(ranker_for(server.url + "/", key_env=None, temperature=None, max_tokens=None), videos)
    headers, body, path = server.asked[0]
    assert set(body) == {"model", "messages"} and "Authorization" not in headers and path == "/v1/chat/completions"


def test_no_more_questions_are_open_than_comparisons_at_once(serve, videos, tmp_path):
    """The caller keeps to at_once comparisons; each has one question open."""

    def slowly(handler, body):
        end = time.monotonic() + 2
        while server.most < 2 and time.monotonic() < end:
            time.sleep(0.005)
        verdict("tie")(handler, body)

    server = serve(slowly)
    comparisons = [Comparison(str(i), f"prompt {i}", *videos) for i in range(6)]
    ask(ranker_for(server.url, at_once=2), comparisons, tmp_path / "answers.jsonl", show=False)
    assert server.most == 2 and len(server.asked) == 12


def test_who_says_what_the_answer_depends_on(serve):
    who = ranker_for("http://localhost:8000/v1").who
    assert who.startswith("endpoint:a-model@localhost:8000+")
    assert who == ranker_for("http://LOCALHOST:8000/v1/", retries=9, timeout_s=1, max_tokens=9, price_in=1).who
    assert who == ranker_for("http://localhost:8000/v1", send="frames").who
    others = [{"frames": 4}, {"send": "video"}, {"temperature": 1}, {"question": '{prompt}: {"better": "first"}?'}]
    assert who not in (found := {ranker_for("http://localhost:8000/v1", **other).who for other in others})
    assert len(found) == 4
    of_video = [ranker_for("http://localhost:8000/v1", send="video", frames=frames).who for frames in (2, 3)]
    assert of_video[0] == of_video[1]


def test_the_proxy_of_the_environment_is_taken_and_passwords_of_netrc_are_not(serve, videos, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine elsewhere.invalid login me password of-netrc")
    server = serve(verdict("tie"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", f"http://{server.host}")
    compare(ranker_for("http://elsewhere.invalid/v1", key_env=None), videos)
    headers, _, path = server.asked[0]
    assert path == "http://elsewhere.invalid/v1/chat/completions" and "Authorization" not in headers


# --- what comes back -----------------------------------------------------------------------------------------

PASSES = {
    "html from a gateway": status(502, "<html>Bad Gateway</html>"),
    "too many questions": error(429, "slow down", "rate_limit_exceeded", Retry_After="0.01"),
    "busy": status(503),
    "prose": says("The first video is better."),
    "html as the answer": status(200, "<html>Sign in</html>"),
    "cut off": cut_off,
    "no answer": garbled(b""),
    "no HTTP": garbled(b"\x00\xff garbage\r\n\r\n"),
    "wrong compression": status(200, "no gzip", Content_Encoding="gzip"),
}


@pytest.mark.parametrize("reply", PASSES.values(), ids=PASSES)
def test_what_may_pass_is_asked_again(serve, videos, reply):
    server = serve(reply, prefers_bright)
    assert compare(ranker_for(server.url), videos) == 0.0
    assert len(server.asked) == 3


def test_it_waits_as_long_as_it_is_told_to(serve, videos, monkeypatch):
    waited = []
    real = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: waited.append(seconds) or real(0))
    server = serve(error(429, "slow down", Retry_After="7"), *[status(500)] * 4, verdict("tie"))
    ranker = ByEndpoint(EndpointSection(url=server.url, model="m", key_env=VARIABLE, retries=5))
    assert compare(ranker, videos) == 0.5
    assert 7.5 <= waited[0] <= 8, "what it was told, and its own first second"
    for seconds, longest in zip(waited[1:], (2, 4, 8, 16), strict=True):
        assert longest / 2 <= seconds <= longest


MALFORMED = {
    "prose": (says("I like the\n\x1b[31mfirst"), "'I like the [31mfirst'"),
    "truncated": (says('{"better": "fir', end="length"), "raise ranker.endpoint.max_tokens"),
    "another shape": (says('{"winner": 1}'), """'{"winner": 1}'"""),
    "another word": (says('{"better": "both"}'), "both"),
    "two verdicts": (says('{"better": "first"} or {"better": "second"}'), "or"),
    "no text": (says(None), "choices"),
    "a list of parts": (says([{"text": "first"}]), "choices"),
    "empty text": (says(""), "choices"),
    "empty choices": (status(200, json.dumps({"choices": [], "usage": USAGE})), "choices"),
    "choices of another type": (status(200, json.dumps({"choices": 5, "usage": USAGE})), "choices"),
    "html": (status(200, "<html>Sign in</html>"), "<html>Sign in</html>"),
    "an error that is called a success": (error(200, "no capacity"), "no capacity"),
    "nothing": (status(200), "''"),
    "deeply nested": (status(200, "[" * 100_000), "[[["),
    "a deeply nested verdict": (says('{"better": ' * 3000), '{"better": {"better": '),
    "a number": (status(200, "12"), "'12'"),
}


@pytest.mark.parametrize("reply, part", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_is_shown_in_short_after_the_retries(serve, videos, reply, part):
    server = serve(reply)
    message = refusal(ranker_for(server.url, retries=2), videos)
    assert part in message and "dark.mp4 and bright.mp4" in message and "asked 3 times" in message
    assert len(server.asked) == 3


FAILS = {
    "failing for good": (status(500, "trace\nback"), 2, "fails (HTTP 500: 'trace back'); look at its log"),
    "too many for good": (error(429, "slow down"), 2, "lower ranker.endpoint.at_once"),
    "hanging": (hangs, 2, "no answer within 0.1 s; raise ranker.endpoint.timeout_s"),
    "cut off": (cut_off, 2, "broke off its answer"),
    "endless": (endless, 2, "without an end"),
    "out of quota": (error(429, "check your plan", "insufficient_quota"), 1, "quota is used up (HTTP 429: 'check"),
    "to be paid": (status(402), 1, "quota is used up (HTTP 402); fill it"),
    "a pause of a day": (error(429, "daily limit", Retry_After="86400"), 1, "a pause of 86400 s"),
    "key refused": (error(401, f"Incorrect API key {KEY}"), 1, f"set the environment variable {VARIABLE}"),
    "forbidden": (status(403, "<html>no</html>"), 1, f"set the environment variable {VARIABLE}"),
    "unknown model": (error(404, "The model `a-model` does not exist."), 1, "correct ranker.endpoint.model or .url"),
    "too large": (status(413), 1, "refuses the question about dark.mp4 and bright.mp4 (HTTP 413)"),
    "refused": (error(400, "Unsupported parameter: 'max_tokens'"), 1, "Unsupported parameter: 'max_tokens'"),
    "the key repeated": (error(400, f"Bearer {KEY} may not"), 1, "'Bearer … may not'"),
}


@pytest.mark.parametrize("reply, asked, part", FAILS.values(), ids=FAILS)
def test_what_goes_wrong_is_one_line_that_says_what_to_do(serve, videos, reply, asked, part):
    server = serve(reply)
    message = refusal(ranker_for(server.url, timeout_s=0.1 if reply is hangs else 5), videos)
    assert message.startswith(server.host) and part in message and "what was answered is kept" in message
    end = time.monotonic() + 2
    while len(server.asked) < asked and time.monotonic() < end:  # a busy machine's server may read after the timeout
        time.sleep(0.005)
    assert len(server.asked) == asked


def test_a_redirect_is_not_followed_so_that_no_other_host_gets_the_key(serve, videos):
    other = serve(verdict("tie"))
    for code in (301, 302, 307, 308):
        server = serve(status(code, Location=f"{other.url}/chat/completions"))
        message = refusal(ranker_for(server.url), videos)
        assert f"sends on to '{other.url}/chat" in message and "correct ranker.endpoint.url" in message
    assert other.asked == []


def test_a_server_that_is_down_is_one_line(serve, videos):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    ranker = ranker_for(f"http://{host}/v1", budget=1, price_in=1, price_out=1)
    assert refusal(ranker, videos).startswith(f"{host}: cannot be reached ('connection refused'); start it, or correct")
    assert ranker.cost.startswith("0 questions")
    for host in ("a..b", "a" * 70, "xn--ü"):
        assert "is no host's name; correct ranker.endpoint.url" in refusal(ranker_for(f"http://{host}/v1"), videos)


def test_a_video_that_cannot_be_read_costs_no_question(serve, videos, tmp_path):
    server = serve(verdict("tie"))
    (tmp_path / "broken.mp4").write_bytes(videos[0].read_bytes()[:500])
    assert "broken.mp4" in refusal(ranker_for(server.url), (videos[0], tmp_path / "broken.mp4"))
    assert "none.mp4" in refusal(ranker_for(server.url, send="video"), (videos[0], tmp_path / "none.mp4"))
    assert server.asked == []


@pytest.mark.parametrize(
    "text, found",
    [
        ('{"better": "first"}', "first"),
        ('  {"better":"Second "}\n', "second"),
        ('```json\n{"better": "tie"}\n```', "tie"),
        ('Video {1} is sharper, so: {"better": "first", "why": "sharp {edges}"} as asked.', "first"),
        ('{"better": "first"} — as I said, {"better": "first"}', "first"),
        ('{"note": {"better": "first"}}', None),  # not what was asked for
        ('{"better": "first", "better": "second"}', None),
        ('{"better": "first"} but perhaps {"better": null}', None),
        ('{"better": ["first"]}', None),
        ('["first"]', None),
        ("first", None),
    ],
)
def test_a_verdict_is_read_only_where_it_is_unambiguous(text, found):
    assert verdict_in(text) == found


def test_what_came_back_is_shown_without_control_characters():
    assert shown("a\x00b\x1b[2J\u202e\ud800\n" + "c" * 200) == "'a b [2J " + "c" * 71 + "…'"


def test_a_pause_may_be_given_in_seconds_or_as_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert seconds_to_wait("3") == 3 and 98 < seconds_to_wait(later) <= 100
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert [seconds_to_wait(text) for text in (None, "", "soon", "nan", "inf", "-3", past)] == [0.0] * 7


# --- money ---------------------------------------------------------------------------------------------------


def test_questions_tokens_and_cost_are_told(serve, videos):
    """What the endpoint refused or failed at is no question of its account's."""
    server = serve(status(500), says("prose"), verdict("tie"))
    ranker = ranker_for(server.url, retries=2, price_in=2, price_out=100)
    compare(ranker, videos)
    assert ranker.cost == "3 questions, 3000 tokens in, 30 out, cost 0.009"  # 3 · (1000 · 2 + 10 · 100) / 10⁶


def test_tokens_that_are_not_said_are_not_made_up(serve, videos):
    for usage in (None, {}, {"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": "9"}, [1]):
        ranker = ranker_for(serve(says('{"better": "tie"}', usage)).url)
        assert compare(ranker, videos) == 0.5
        assert ranker.cost == (
            "2 questions, 0 tokens in, 0 out; without 2 of them, whose tokens the endpoint did not say"
        )
        ranker = ranker_for(serve(says('{"better": "tie"}', usage)).url, budget=1, price_in=1, price_out=1)
        assert "does not say how many tokens" in refusal(ranker, videos)


@pytest.mark.parametrize("at_once", [1, 4])
def test_the_budget_is_not_overspent_and_what_was_ranked_is_kept(serve, videos, tmp_path, at_once):
    """A question costs 0.003, and 0.0215 lasts for three comparisons and one question more."""

    def slowly(handler, body):
        time.sleep(0.01)
        prefers_bright(handler, body)

    server, file = serve(slowly), tmp_path / "answers.jsonl"
    comparisons = [Comparison(str(i), f"prompt {i}", *videos) for i in range(6)]
    settings = {"price_in": 2, "price_out": 100, "at_once": at_once}
    ranker = ranker_for(server.url, budget=0.0215, **settings)
    with pytest.raises(DataError, match=r"budget of 0\.0215 is used up after 6 questions, .* cost 0\.018; raise it"):
        ask(ranker, comparisons, file, show=False)
    assert len(server.asked) == 6 and len(file.read_text().splitlines()) == 3
    assert len(ask(ranker_for(server.url, budget=1, **settings), comparisons, file, show=False)) == 6
    assert len(server.asked) == 12, "nothing is asked twice"


def test_a_malformed_answer_and_a_lost_one_are_paid_from_the_budget(serve, videos):
    ranker = ranker_for(serve(says("prose")).url, retries=9, budget=0.01, price_in=2, price_out=100)
    assert "used up after 3 questions" in refusal(ranker, videos)
    ranker = ranker_for(serve(verdict("tie"), cut_off).url, retries=9, budget=0.01, price_in=2, price_out=100)
    assert "used up after 3 questions" in refusal(ranker, videos)
    assert ranker.cost.endswith("cost 0.003; without 2 of them, whose tokens the endpoint did not say")


def test_a_comparison_that_failed_does_not_hold_up_the_others(serve, videos):
    server = serve(status(400), prefers_bright)
    ranker = ranker_for(server.url, budget=1, price_in=1, price_out=1)

    async def two():
        return await asyncio.gather(*(ranker.compare("p", *videos) for _ in range(2)), return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(two(), 5))
    assert {type(answer) for answer in found} == {DataError, float} and 0.0 in found


def test_a_comparison_that_is_called_off_ends_at_once(serve, videos):
    ranker = ranker_for(serve(hangs).url, timeout_s=60)

    async def called_off():
        await asyncio.wait_for(ranker.compare("p", *videos), 0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(called_off())


# --- the key -------------------------------------------------------------------------------------------------

LEAKS = {name: reply for name, (reply, *_) in FAILS.items() if reply is not hangs} | PASSES
LEAKS |= {
    "echoed": lambda handler, body: says(f"Bearer {KEY}")(handler, body),
    "in the redirect": status(302, Location=f"http://127.0.0.1:1/?key={KEY}"),
    "as a page": status(500, f"{'x' * 70}{KEY}"),
    "no HTTP at all": garbled(f"HTTP/1.1 {KEY}\r\n\r\n".encode()),
    "a long header": garbled(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 20_000 + b"\r\n\r\n"),
    "a compressed page": status(500, gzip.compress(KEY.encode()), Content_Encoding="gzip"),
}


@pytest.mark.parametrize("reply", LEAKS.values(), ids=LEAKS)
def test_the_key_is_in_no_error_no_log_and_no_representation(serve, videos, caplog, reply):
    caplog.set_level(logging.DEBUG)
    ranker = ranker_for(serve(reply).url, retries=0)
    with pytest.raises(DataError) as caught:
        compare(ranker, videos)
    told, error = [repr(ranker), str(vars(ranker)), ranker.who, ranker.cost, caplog.text], caught.value
    while error is not None:  # and in what an error reporter sees, which takes the frames' variables along
        told += [
            str(error),
            repr(error),
            *traceback.TracebackException.from_exception(error, capture_locals=True).format(),
        ]
        error = error.__cause__ or error.__context__
    told = "\n".join(line for line in told if "tests/rankers" not in line.split("\n")[0])
    assert "compare" in told and KEY not in told and KEY[:12] not in told


@pytest.mark.parametrize("value", ["", "  \n", "two\nlines", "ключ"])
def test_a_key_that_is_missing_or_cannot_be_sent_is_one_line(serve, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(DataError, match=f"environment variable {VARIABLE}") as caught:
        ranker_for("http://localhost:1/v1")
    assert "\n" not in str(caught.value) and (not value.strip() or value not in str(caught.value))


def test_the_line_end_of_a_key_file_is_no_part_of_the_key(serve, videos, monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY + "\r\n")
    server = serve(verdict("tie"))
    compare(ranker_for(server.url), videos)
    assert server.asked[0][0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"url": f"http://me:{KEY}@localhost/v1"}, "url: holds '@'"),
        ({"url": f"http://localhost/v1?key={KEY}"}, "url: holds"),
        ({"url": f"http://localhost:{KEY}"}, "url: is no http"),
        ({"url": "ftp://localhost"}, "url: is no http"),
        ({"url": "http://[::1/v1"}, "url: is no http"),
        ({"url": "localhost:8000"}, "url: is no http"),
        ({"url": "http:// localhost"}, "url: is no http"),
        ({"key_env": KEY}, "never the key itself"),
        ({"key_env": "hf_AbCdEf0123456789"}, "never the key itself"),
        ({"question": "Which is better?"}, "question: must hold {prompt}"),
        ({"question": "{prompt}"}, "question: must hold"),
        ({"budget": 5, "price_in": 1}, "budget: needs price_in and price_out"),
        ({"frames": 1}, "frames"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_showing_them(settings, part):
    with pytest.raises(ValidationError) as caught:
        EndpointSection(**{"url": "http://localhost/v1", "model": "m"} | settings)
    assert part in str(caught.value) and KEY not in str(caught.value) and "AbCdEf" not in str(caught.value)
    assert KEY not in caught.value.errors()[0]["msg"]


def test_without_the_client_library_it_says_what_to_install(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(DataError, match=r"pip install 'alignkit\[rank\]'"):
        ranker_for("http://localhost:1/v1")
