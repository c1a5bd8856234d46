"""The page on which people rank, killed while they vote."""

import http.client
import json
import re
import signal
import threading
from collections import defaultdict
from pathlib import Path
from random import Random

from world import Lost, World

COUNT, RATERS = 8, ("ada", "grace")
TOTAL = COUNT * len(RATERS)


def a_server_of_votes_is_killed(draw: Random, world: World) -> None:
    """Every vote that was acknowledged is there as it was given, each once."""
    from alignkit.rankers.people.server import left_side
    from alignkit.rankers.people.votes import read_votes

    after = sorted(draw.sample(range(1, TOTAL - 1), draw.choice([1, 2])))
    waits = [draw.uniform(0, 0.02) for _ in after]
    world.told = f"after {' and '.join(map(str, after))} votes"
    case = world.fresh("pairs")
    folder = case.run / "blind"
    _fill(folder)
    sent: dict[tuple[str, str], set[str]] = defaultdict(set)
    acknowledged: dict[tuple[str, str], str] = {}
    for limit, wait in [*zip(after, waits, strict=True), (TOTAL, 0.0)]:
        started = case.start(words=["rank", "serve", str(folder)])
        case.until(lambda started=started: "http://" in started.said, started)
        page = _Page(re.search(r"http://([^/\s]+)/", started.said)[1])
        try:
            for number in range(TOTAL):
                rater = RATERS[number % len(RATERS)]
                pair = page.next(rater)
                if pair is None:
                    continue
                if len(acknowledged) == limit:
                    threading.Timer(wait, started.send, (signal.SIGKILL,)).start()
                answer, name = draw.choice(["left", "right", "tie"]), (rater, pair["prompt"])
                left = left_side(pair["prompt"], rater)
                meant = {"left": left, "right": "b" if left == "a" else "a", "tie": "tie"}[answer]
                sent[name].add(meant)
                page.vote(rater, pair["key"], answer)
                acknowledged[name] = meant
        except (OSError, http.client.HTTPException):  # the server is gone
            if limit == TOTAL:
                raise Lost(f"the page does not answer any more:\n{started.said}") from None
        started.kill()
    kept = {(vote.rater, vote.comparison): vote.answer for vote in read_votes(folder)}
    changed = [name for name, answer in acknowledged.items() if kept.get(name) != answer]
    if changed or len(kept) != TOTAL or any(kept[name] not in sent[name] for name in kept):
        raise Lost(
            f"{len(kept)} votes of {TOTAL}; of {len(acknowledged)} that were acknowledged {len(changed)} are gone"
        )


def _fill(folder: Path) -> None:
    from alignkit.rankers.people import write_comparisons

    (folder / "videos").mkdir(parents=True)
    names = [f"videos/{number}.mp4" for number in range(2 * COUNT)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes([number]) * 1000)
    sides = zip(names[::2], names[1::2], strict=True)
    write_comparisons(folder, [{"id": str(n), "prompt": str(n), "a": a, "b": b} for n, (a, b) in enumerate(sides)])


class _Page:
    def __init__(self, host: str):
        self.host = host
        self.token = re.search(r'name="token" content="([^"]+)"', self._ask("GET", "/"))[1]

    def next(self, rater: str) -> dict | None:
        return json.loads(self._ask("GET", f"/next?rater={rater}"))["pair"]

    def vote(self, rater: str, key: str, answer: str) -> None:
        body = {"rater": rater, "pair": key, "answer": answer}
        headers = {"Content-Type": "application/json", "Origin": f"http://{self.host}", "X-Token": self.token}
        self._ask("POST", "/vote", json.dumps(body), headers)

    def _ask(self, method: str, path: str, body: str | None = None, headers: dict | None = None) -> str:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        if answer.status != 200:
            raise Lost(f"{path} is answered with {answer.status}: {content}")
        return content
