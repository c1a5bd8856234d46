"""Reads the report's page as a browser does: text, attributes, and the moving pictures frame by frame."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from alignkit.report import write_report

LEFT_OPEN = {"meta", "link", "img", "input", "br", "path", "line", "circle"}


class Film:
    """A picture whose frames stand one under the other, as its style says."""

    def __init__(self, image: Image.Image, style: str):
        self.motion = {name: float(number) for name, number in re.findall(r"--(\w+):([\d.]+)", style)}
        self.image, self.n_frames = image, int(self.motion["frames"])
        assert image.height % self.n_frames == 0
        self.size = (image.width, image.height // self.n_frames)

    def frame(self, t: int) -> np.ndarray:
        width, height = self.size
        return np.asarray(self.image.crop((0, t * height, width, (t + 1) * height)).convert("RGBA"))


class Page(HTMLParser):
    """The page as a reader's browser sees it: text by section, attributes, pictures; unclosed tags fail."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.images, self.open = [], [], [], []
        self.film, self.hidden = "", False
        self.text = ""
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        attrs = dict(attrs)
        if attrs.get("class") == "read":  # seen only where the pointer is
            self.hidden = True
        if attrs.get("class") == "film":
            self.film = attrs["style"]
        if tag == "img":
            self.images.append(Film(_webp(attrs["src"]), self.film))
        if tag not in LEFT_OPEN:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "g":
            self.hidden = False

    def handle_data(self, data):
        if "style" not in self.open and not self.hidden:
            self.text += data

    def ids(self) -> set[str]:
        return {value for name, value in self.attributes if name == "id"}


def _webp(uri: str) -> Image.Image:
    head, content = uri.split(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def page_of(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))
