"""Files: errors that name them, JSON and JSONL, writing that is never seen half done, and where a
model is."""

import json
import os
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "data/tiny"  # the small world: its model and its problems

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")


class UserError(Exception):
    """An error the user can fix. Its text is one sentence that names the thing and the fix. The
    command line prints it without a traceback and exits with status 2."""


def read_json(path):
    """The content of a JSON file. Raises UserError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_lines(path):
    """The lines of a UTF-8 file that are not blank, as (number, line) pairs. Raises UserError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # a byte order mark is allowed
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from None
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def write_text(path, text):
    """Writes a file atomically: a reader sees the old content or the new, never a part of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    flush(temporary)
    temporary.replace(path)


def flush(path):
    """Waits until a file, or the list of files of a directory, is on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_lines(path, entries):
    """Writes JSON objects as JSONL, atomically."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def find_model(name):
    """The directory of a model. A name such as Qwen/Qwen3-0.6B is downloaded from the Hugging Face
    Hub, or taken from its cache. Raises UserError if that fails."""
    if Path(name).is_dir() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return Path(name)
    import huggingface_hub

    files = [*TOKENIZER_FILES, "config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the library's own errors, the network's, the disk's
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--model {name} is not a directory, and the Hugging Face Hub did not "
                        f"provide it ({type(error).__name__}: {reason})") from None
