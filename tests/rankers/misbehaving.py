"""A local server that answers as a model behind an endpoint does, or in every way in which one misbehaves."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

USAGE = {"prompt_tokens": 1000, "completion_tokens": 10}


class Server:
    """Answers the n-th question with the n-th of `replies`, then with the last. `asked`: headers, body and path."""

    def __init__(self, *replies):
        self.replies, self.asked, self.gone = list(replies), [], threading.Event()
        self.open = self.most = 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append((dict(self.headers), body, self.path))
                    outer.open += 1
                    outer.most = max(outer.most, outer.open)
                    reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                try:
                    reply(self, body)
                finally:
                    with lock:
                        outer.open -= 1

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.host = f"127.0.0.1:{self._http.server_port}"
        self.url = f"http://{self.host}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.Handler = Handler
        Handler.gone = self.gone

    def close(self):
        self.gone.set()
        self._http.shutdown()
        self._http.server_close()


def send(handler, status, body, **headers):
    content = body if isinstance(body, bytes) else body.encode()
    handler.send_response(status)
    for name, value in ({"Content-Length": len(content)} | headers).items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(content)


def says(text, usage=USAGE, end="stop"):
    answer = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": end}], "usage": usage}
    return lambda handler, _: send(handler, 200, json.dumps(answer))


def verdict(word):
    return says(json.dumps({"better": word}))


def status(code, body="", **headers):
    return lambda handler, _: send(handler, code, body, **headers)


def error(code, message, kind=None, **headers):
    return status(code, json.dumps({"error": {"message": message, "type": kind, "code": kind}}), **headers)


def sides(body):
    """Data URLs of the first video and of the second, and the question."""
    found, now = {"first": [], "second": []}, None
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            now = {"The first video:": "first", "The second video:": "second"}.get(part["text"])
        else:
            found[now].append(part[part["type"]]["url"])
    return found["first"], found["second"], body["messages"][0]["content"][-1]["text"]


def levels(urls):
    """The mean grey level of each JPEG."""
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]
    assert all(picture.size == (48, 32) for picture in pictures)
    return np.array([np.asarray(picture).mean() for picture in pictures])


def prefers_bright(handler, body):
    first, second, _ = sides(body)
    verdict("first" if levels(first).mean() > levels(second).mean() else "second")(handler, body)


def hangs(handler, _):
    handler.gone.wait(10)


def cut_off(handler, _):
    send(handler, 200, '{"choices": [', Content_Length=1000)


def garbled(content):
    return lambda handler, _: handler.wfile.write(content)


def endless(handler, _):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" " * 2**16)
