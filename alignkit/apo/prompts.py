"""The prompts that rollouts are sampled for."""

from pathlib import Path

from alignkit.errors import DataError
from alignkit.media.captions import TEXT_KEYS
from alignkit.media.rows import is_unicode, read_table

KEYS = ("prompt", *(key for key in TEXT_KEYS if key != "prompt"))


def read_prompts(file: Path | None) -> list[str]:
    """The prompts of `file`, in its order: .txt, one a line; .jsonl or .csv with a column of texts, such as a captions
    file (`prompt` before `caption` and the others). White space is made single spaces, as in captions.

    Raises DataError, naming the line, for a prompt that is empty, no text or there twice, and for a file without any.
    """
    if file is None:
        raise DataError("data.prompts: not set; name the file that holds the prompts")
    file = Path(file)
    texts = _lines(file) if file.suffix.lower() == ".txt" else _column(file)
    lines: dict[str, int] = {}
    for number, text in texts:
        prompt = " ".join(text.split())
        if not prompt:
            raise DataError(f"data.prompts: {file}:{number}: the prompt is empty; delete the line or write one")
        if prompt in lines:
            raise DataError(f"data.prompts: {file}:{number}: the same prompt as line {lines[prompt]}; delete one")
        lines[prompt] = number
    if not lines:
        raise DataError(f"data.prompts: {file}: holds no prompt")
    return list(lines)


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.prompts: {file}: cannot be read as UTF-8 text ({error})") from error
    return list(enumerate(text.removesuffix("\n").split("\n") if text else [], start=1))


def _column(file: Path) -> list[tuple[int, str]]:
    table = read_table(file, "data.prompts:", (".txt", ".jsonl", ".csv"))
    texts = []
    for number, row in table.rows:
        where = f"data.prompts: {file}:{number}"
        if isinstance(row, str):
            raise DataError(f"{where}: {row}")
        value = next((row[key] for key in KEYS if row.get(key) is not None), None)
        if value is None:
            raise DataError(f"{where}: holds no prompt (one of: {', '.join(KEYS)})")
        if not isinstance(value, str) or not is_unicode(value):
            raise DataError(f"{where}: the prompt is not a text but {value!r:.60}")
        texts.append((number, value))
    return texts
