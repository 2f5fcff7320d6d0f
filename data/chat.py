"""The tokenizer side of a Hugging Face model: chat template, token ids of a prompt, text of a completion."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from tokenizers import Tokenizer

from data.files import TOKENIZER_FILES, UserError, read_json
from data.problems import answer_section, batch_prompt
from rollout import check_length

@dataclass
class Chat:
    """What turns a message into token ids and token ids into text."""

    path: Path
    tokenizer: Tokenizer
    template: jinja2.Template | None  # None: the message is passed as plain text
    special: dict  # bos_token, eos_token, ... for the template
    eos_ids: list[int]  # the ids that end a completion


def encode_chat(chat, message):
    """Token ids of a user message, ready for the model to answer. Raises UserError if the template fails."""
    if chat.template is None:
        return chat.tokenizer.encode(message + "\n\n").ids
    try:
        text = chat.template.render(messages=[{"role": "user", "content": message}], tools=None,
                                    documents=None, add_generation_prompt=True, **chat.special)
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(f"the chat template in {chat.path} fails: {error}") from None
    ids = chat.tokenizer.encode(text, add_special_tokens=False).ids  # the template has written them
    if not ids:
        raise UserError(f"the chat template in {chat.path} renders nothing")
    return ids


def decode(chat, ids):
    """Texts of lists of token ids, without special tokens."""
    return chat.tokenizer.decode_batch(ids, skip_special_tokens=True)


def keep_fitting(model, chat, problems, groups_of, skip_long):
    """The problems whose prompts fit the model's positions, before anything is sampled. groups_of(problems)
    yields every (group of indices, budget) to come. Where a prompt does not fit, its longest problem is left
    out with skip_long, and otherwise named in a UserError."""
    while True:
        too_long = set()
        for group, budget in groups_of(problems):
            ids = encode_chat(chat, batch_prompt([problems[i] for i in group]))
            longest = max(group, key=lambda i: len(problems[i]["problem"]))
            try:
                check_length(model, len(ids), budget)
            except UserError as error:
                if not skip_long:
                    raise UserError(f"{problems[longest]['where']}: {error}, or leave out long problems with "
                                    "--skip-long") from None
                too_long.add(longest)
        if not too_long:
            return problems
        problems = [problem for i, problem in enumerate(problems) if i not in too_long]


def check_budget(chat, problems, budget):
    """Raises UserError if the budget cannot hold even the bare answers to these problems."""
    sections = [answer_section(i, "", p["answer"]) for i, p in enumerate(problems, start=1)]
    tokens = len(chat.tokenizer.encode("\n\n".join(sections), add_special_tokens=False).ids)
    if budget < tokens:
        raise UserError(f"a budget of {budget} tokens cannot hold even the bare answers to {len(problems)} "
                        f"problems (about {tokens} tokens): raise --budget or lower --n")


def load_chat(path):
    """Reads the tokenizer of a Hugging Face directory. The template is in chat_template.jinja or in
    tokenizer_config.json. Raises UserError for a missing or broken file."""
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path} has no tokenizer.json: --model should name a Hugging Face model directory, "
                        "or a model on the Hub as owner/name")
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"cannot read {path / 'tokenizer.json'}: {error}") from None
    tokenizer.no_truncation()  # the file may have saved either setting
    tokenizer.no_padding()
    settings = {name: read_json(path / name) if (path / name).is_file() else {}
                for name in ("config.json", "generation_config.json", "tokenizer_config.json")}
    special = {}
    for name, token in settings["tokenizer_config.json"].items():
        token = token.get("content") if isinstance(token, dict) else token  # an AddedToken is a dict
        if name.endswith("_token") and isinstance(token, str):  # neither null nor add_bos_token
            special[name] = token
    eos_ids = {tokenizer.token_to_id(special.get("eos_token") or "")}
    for name in ("config.json", "generation_config.json"):
        eos_ids |= read_eos_ids(path / name, settings[name])
    eos_ids = sorted(eos_ids - {None})
    if not eos_ids:
        raise UserError(f"{path} names no eos_token: a completion could not end")
    template = load_template(path, settings["tokenizer_config.json"].get("chat_template"))
    return Chat(path, tokenizer, template, special, eos_ids)


def read_eos_ids(file, settings):
    """The eos_token_id of a JSON file as a set of ids. The files of a model differ in practice, therefore
    `load_chat` takes the union."""
    ids = settings.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    if not all(i is None or type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{file}: eos_token_id should be a token id or a list of them, not {ids}")
    return set(ids)


def load_template(path, source):
    """The chat template of a model directory, or None. source: what tokenizer_config.json has of it."""
    try:
        if (path / "chat_template.jinja").is_file():
            source = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(source, list):  # several named templates
            source = next((t["template"] for t in source if t.get("name") == "default"), None)
        return chat_environment().from_string(source) if source else None
    except Exception as error:  # jinja2's own errors, or Python's for what is not text
        raise UserError(f"the chat template in {path} is not valid: {error}") from None


def copy_tokenizer(source, target):
    """Copies the tokenizer files of one Hugging Face directory to another."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's part for supervised training. Prompts
    contain the text between the tags."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        content = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(content, lineno=line)


def chat_environment():
    """Jinja as transformers configures it for chat templates. It is sandboxed, because a template is code
    that comes with a download."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = time.strftime
    return environment
