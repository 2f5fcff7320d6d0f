"""The tokenizer side of a Hugging Face model: prompts as token ids, completions as text."""

import datetime
import functools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from data.files import TOKENIZER_FILES, UserError, read_json
from data.problems import answer_section, batch_prompt


@dataclass
class Chat:
    """What turns a message into token ids and token ids into text."""

    path: Path
    tokenizer: Tokenizer
    template: jinja2.Template | None  # None: the message is passed as plain text
    variables: dict  # bos_token, ... and --template-options, for the template
    eos_ids: list[int]  # the ids that end a completion


def encode_chat(chat, message):
    """Token ids of a user message, to be answered. Raises UserError if the template fails."""
    if chat.template is None:
        return chat.tokenizer.encode(message + "\n\n").ids
    try:
        text = chat.template.render(
            messages=[{"role": "user", "content": message}], tools=None, documents=None,
            add_generation_prompt=True, **chat.variables)
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(f"the chat template in {chat.path} fails: {error}") from None
    return chat.tokenizer.encode(text, add_special_tokens=False).ids  # the template wrote them


def decode(chat, ids):
    """Texts of lists of token ids, without special tokens."""
    return chat.tokenizer.decode_batch(ids, skip_special_tokens=True)


def fitting_problems(chat, problems, sizes, positions, skip_long):
    """The problems of which any N fit in a prompt: for each (N, budget) of `sizes`, the prompt of
    the N longest (in tokens) and the budget fit the model's `positions`, so all others do. If they
    do not fit, the longest is left out with skip_long, and otherwise named in a UserError."""
    lines = [f"Problem 1: {problem['problem']}\n" for problem in problems]
    encodings = chat.tokenizer.encode_batch(lines, add_special_tokens=False)
    order = sorted(range(len(problems)), key=lambda i: -len(encodings[i].ids))  # longest first
    for n, budget in sizes:
        while order:
            tokens = len(encode_chat(chat, batch_prompt([problems[i] for i in order[:n]])))
            if tokens + budget <= positions:
                break
            longest = problems[order.pop(0)]
            if not skip_long:
                raise UserError(
                    f"{longest['where']}: a prompt of {n} with this problem may have {tokens} "
                    f"tokens, too many for a budget of {budget} and {positions} positions: lower "
                    "the budget or N, or leave out long problems with --skip-long")
    return [problems[i] for i in sorted(order)]


def check_budget(chat, problems, budget):
    """Raises UserError if the budget cannot hold even the bare answers to these problems."""
    sections = [answer_section(i, "", p["answer"]) for i, p in enumerate(problems, start=1)]
    tokens = len(chat.tokenizer.encode("\n\n".join(sections), add_special_tokens=False).ids)
    if budget < tokens:
        raise UserError(f"a budget of {budget} tokens cannot hold the {tokens} tokens of the bare "
                        f"answers to {len(problems)} problems: raise --budget or lower --n")


def load_chat(path, date=None, options=""):
    """The Chat of a Hugging Face directory. date: what a template takes for now, by default the
    present. options: a JSON object, further variables for the template. Raises UserError for a
    missing or broken file, or other options."""
    path = Path(path)
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} has no usable tokenizer.json ({error}): --model should name a "
                        "Hugging Face directory, or a model on the Hub as owner/name") from None
    tokenizer.no_truncation()  # the file may have saved either setting
    tokenizer.no_padding()
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    files = {name: read_json(path / name) for name in names if (path / name).is_file()}
    settings = files.get("tokenizer_config.json", {})
    special = {}
    for name, token in settings.items():
        token = token.get("content") if isinstance(token, dict) else token  # an AddedToken
        if name.endswith("_token") and isinstance(token, str):  # neither null nor add_bos_token
            special[name] = token
    eos_ids = {tokenizer.token_to_id(special.get("eos_token", ""))}
    for file in files.values():  # they differ in practice: all of their ids count
        ids = file.get("eos_token_id")
        eos_ids |= set(ids if isinstance(ids, list) else [ids])
    eos_ids = sorted(eos_ids - {None})
    if not eos_ids:
        raise UserError(f"{path} names no eos_token: a completion could not end")
    now = date or datetime.datetime.now()
    template = load_template(path, settings.get("chat_template"), now)
    variables = special | template_options(options)
    return Chat(path, tokenizer, template, variables, eos_ids)


def template_options(text):
    """The JSON object of --template-options as a dict."""
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise UserError("--template-options should be a JSON object, as in "
                        f"'{{\"enable_thinking\": false}}', not {text}")
    return options


def load_template(path, source, date):
    """The template in chat_template.jinja or, without this file, in `source`, the text or list of
    named texts in tokenizer_config.json. None if there is none."""
    if (path / "chat_template.jinja").is_file():
        source = (path / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if source is None:
            raise UserError(f"{path} has several chat templates, but none is called default: save "
                            "one of them as chat_template.jinja")
    if not source:
        return None
    # Templates for training put the assistant's part between generation tags.
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # As transformers configures it. Sandboxed, because a template is code that was downloaded.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": date.strftime}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template in {path} is not valid: {error}") from None


def copy_tokenizer(source, target):
    """Copies the tokenizer files of one Hugging Face directory to another."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
