"""A vision-language model as a ranker, over an OpenAI-compatible endpoint.

Each comparison is asked twice, with the videos in both orders: a model that names a place and no video says nothing.
The key is read from the environment for each request. No object here keeps it, and no error of the client library,
which hold the request's headers, leaves `_send`.
"""

import asyncio
import errno
import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from alignkit.config.endpoint import EndpointSection
from alignkit.errors import DataError
from alignkit.rankers.endpoint_messages import (
    Part,
    as_json,
    content_of,
    error_of,
    seconds_to_wait,
    shown,
    text_of,
    verdict_in,
    video_parts,
)
from alignkit.rankers.protocol import Comparison
from alignkit.rankers.spending import Spending

if TYPE_CHECKING:
    import aiohttp

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a question is asked again
LONGEST_ASKED_FOR = 600.0  # seconds: an endpoint that wants a longer pause is come back to another day
LARGEST_ANSWER = 2**20  # bytes; a verdict takes a thousand
KEPT = "what was answered is kept"


@dataclass(frozen=True)
class Reply:
    """status: 0 where no whole answer came, and `body` says why. wait: seconds that the endpoint asks for."""

    status: int
    body: str
    wait: float = 0.0


class ByEndpoint:
    """Raises DataError, also later, where no key is in the environment or aiohttp is not installed.

    first_wait: seconds. `cost` is a line about questions, tokens and money so far.
    """

    def __init__(self, section: EndpointSection, *, first_wait: float = FIRST_WAIT):
        self._section, self._first_wait = section, first_wait
        self._spending = Spending(section)
        self._host = urlsplit(section.url).netloc.lower()
        asked = [section.question, section.send, section.frames if section.send == "frames" else None]
        digest = hashlib.sha256(json.dumps([*asked, section.temperature]).encode()).hexdigest()
        self.who = f"endpoint:{section.model}@{self._host}+{digest[:8]}"
        self.at_once = section.at_once
        _aiohttp()
        _key(section.key_env)

    @property
    def cost(self) -> str:
        return self._spending.line

    async def prepare(self, comparisons: Sequence[Comparison]) -> None:
        pass

    async def compare(self, prompt: str, video_a: Path, video_b: Path) -> float:
        """1 or 0 where both orders name the same video, else 0.5.

        Raises DataError for an endpoint that cannot be used, that goes on failing, or whose budget is used up.
        """
        section, about = self._section, f"{video_a.name} and {video_b.name}"
        question = section.question.replace("{prompt}", prompt)
        a, b = await asyncio.gather(
            *(asyncio.to_thread(video_parts, video, section.send, section.frames) for video in (video_a, video_b))
        )
        timeout = _aiohttp().ClientTimeout(total=section.timeout_s)
        async with self._spending.comparison(), _aiohttp().ClientSession(timeout=timeout) as session:
            one_way = await self._ask(session, content_of(question, a, b), about)
            other_way = await self._ask(session, content_of(question, b, a), about)
        return {("first", "second"): 1.0, ("second", "first"): 0.0}.get((one_way, other_way), 0.5)

    async def _ask(self, session: "aiohttp.ClientSession", content: list[Part], about: str) -> str:
        """One of `VERDICTS`."""
        tries, wait = self._section.retries + 1, self._first_wait
        for left in reversed(range(tries)):
            self._spending.check()
            reply = await self._send(session, content)
            verdict, problem = self._read(reply, about)
            if verdict is not None:
                return verdict
            if left:
                await asyncio.sleep(reply.wait + wait * random.uniform(0.5, 1.0))  # not all askers at one moment
                wait = min(2 * wait, LONGEST_WAIT)
        raise DataError(f"{self._host}: {problem}; asked {tries} time{'s' * (tries > 1)}, {KEPT}")

    async def _send(self, session: "aiohttp.ClientSession", content: list[Part]) -> Reply:
        aiohttp, section = _aiohttp(), self._section
        limits = {"temperature": section.temperature, "max_tokens": section.max_tokens}
        body: dict[str, Any] = {"model": section.model, "messages": [{"role": "user", "content": content}]}
        body |= {name: value for name, value in limits.items() if value is not None}
        key = _key(section.key_env)
        url = section.url.rstrip("/") + "/chat/completions"
        headers = {"Authorization": f"Bearer {key}"} if key else None
        self._spending.sent()
        try:
            # Redirects are not followed: neither the key nor the videos are for other hosts.
            async with session.post(
                url, json=body, headers=headers, proxy=_proxy(url), allow_redirects=False
            ) as response:
                found = bytearray()
                async for chunk in response.content.iter_chunked(2**16):
                    found += chunk
                    if len(found) > LARGEST_ANSWER:
                        return Reply(0, "sent an answer without an end; see that ranker.endpoint.url is right")
                text = found.decode(errors="replace")
                where = response.headers.get("Location", "") if 300 <= response.status < 400 else text
                if not 200 <= response.status < 300:
                    self._spending.not_charged()
                shown_body = where.replace(key, "…") if key else where
                return Reply(response.status, shown_body, seconds_to_wait(response.headers.get("Retry-After")))
        except TimeoutError:
            return Reply(
                0, f"gave no answer within {section.timeout_s:g} s; raise ranker.endpoint.timeout_s or look at its log"
            )
        except aiohttp.ClientConnectorError as error:
            self._spending.not_charged()
            reason = "connection refused" if error.errno == errno.ECONNREFUSED else str(error)
            return Reply(0, f"cannot be reached ({shown(reason)}); start it, or correct ranker.endpoint.url")
        except ValueError:  # of the address only: the rest was checked
            self._spending.not_charged()
            return Reply(0, "is no host's name; correct ranker.endpoint.url, or the proxy in the environment")
        except (aiohttp.ClientError, OSError) as error:
            return Reply(0, f"broke off its answer ({type(error).__name__}); look at its log, or run again later")

    def _read(self, reply: Reply, about: str) -> tuple[str | None, str]:
        """The verdict, or None and the problem. Raises DataError for what asking again does not mend."""
        section, status = self._section, reply.status
        if status == 0:
            return None, reply.body
        if 200 <= status < 300:
            return self._read_answer(reply.body, about)
        message, kinds = error_of(reply.body)
        said = f"HTTP {status}" + (f": {shown(message)}" if message.strip() else "")
        if status < 400:
            raise DataError(f"{self._host}: sends on to {shown(reply.body)}; correct ranker.endpoint.url, {KEPT}")
        if status in (401, 403):
            what = f"set the environment variable {section.key_env} to a key that it takes"
            if section.key_env is None:
                what = "name the environment variable that holds it in ranker.endpoint.key_env"
            raise DataError(f"{self._host}: refuses the key (HTTP {status}); {what}, {KEPT}")
        if status == 402 or "insufficient_quota" in kinds:
            raise DataError(f"{self._host}: the account's quota is used up ({said}); fill it and run again, {KEPT}")
        if status == 404:
            raise DataError(
                f"{self._host}: has no such model or address ({said}); correct ranker.endpoint.model or .url, {KEPT}"
            )
        if reply.wait > LONGEST_ASKED_FOR:
            raise DataError(f"{self._host}: wants a pause of {reply.wait:.0f} s ({said}); run again then, {KEPT}")
        if status == 429:
            return None, f"gets too many questions ({said}); lower ranker.endpoint.at_once, or run again later"
        if status >= 500 or status == 408:
            return None, f"fails ({said}); look at its log, or run again later"
        raise DataError(f"{self._host}: refuses the question about {about} ({said}); correct ranker.endpoint, {KEPT}")

    def _read_answer(self, body: str, about: str) -> tuple[str | None, str]:
        answer = as_json(body)
        if isinstance(answer, dict) and "choices" in answer:
            self._spending.answered(answer.get("usage"))
        text, end = text_of(answer)
        verdict = verdict_in(text) if text else None
        if verdict is not None:
            return verdict, ""
        what = 'where {"better": "first"}, "second" or "tie" was asked for'
        todo = "raise ranker.endpoint.max_tokens" if end == "length" else "change ranker.endpoint.question or .model"
        return None, f"answered {shown(text or error_of(body)[0])} about {about}, {what}; {todo}"


def _aiohttp() -> ModuleType:
    try:
        import aiohttp
    except ImportError:
        raise DataError("ranker.by=endpoint: needs aiohttp: pip install 'alignkit[rank]'") from None
    return aiohttp


def _key(variable: str | None) -> str:
    """Raises DataError, without the key, for one that is not set or cannot be sent."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise DataError(
            f"ranker.endpoint.key_env: the environment variable {variable} is not set; set it to the key, or "
            "key_env to null for an endpoint that takes none"
        )
    if not (key.isascii() and key.isprintable()):
        raise DataError(f"ranker.endpoint.key_env: the environment variable {variable} holds no key; set it again")
    return key


def _proxy(url: str) -> str | None:
    """As the environment says. The client library would look itself, but then sends passwords out of .netrc too."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
