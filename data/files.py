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
    """The JSON object in file `path`. Raises UserError if it is missing or not a JSON object."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def read_lines(path):
    """The lines of a UTF-8 text file that are not blank, as (number, line) pairs. Raises
    UserError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # a byte order mark is allowed
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: expected a JSONL file") from None
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def write_text(path, text):
    """Writes a file atomically: a reader sees the old content or the new, never a part of it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        flush(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def flush(path):
    """Waits until a file, or the list of files of a directory, is on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_lines(path, entries):
    """Writes JSON objects as JSONL, atomically."""
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def find_model(name):
    """The directory of a model. A name such as Qwen/Qwen3-0.6B that is not a directory is
    downloaded from the Hugging Face Hub, or taken from its cache. Raises UserError if that
    fails."""
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
