"""Flags of the command line, as fields of a settings class."""

import argparse
import dataclasses
import datetime
import math
import os
import re

from data.files import REPO, UserError
from data.runs import read_settings

# The flags that may be given beside --resume. All others are read from settings.json.
ANEW = ("steps", "device", "rows", "micro_tokens", "checkpointing", "processes", "shard")


def flag(default, doc, least=0, choices=None, group=None):
    """A field of a settings class: a flag with its help text, and without one no flag. Numbers are
    finite and at least `least`. group: the title, in --help, of this flag and those that follow."""
    metadata = {"doc": doc, "least": least, "choices": choices, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(name):
    return "--" + name.replace("_", "-")


def parse_flags(settings_class, description, argv=None):
    """The command line as an instance of a settings class. With --resume DIR the settings are those
    of the run in DIR, and only the flags in ANEW may be given. Raises UserError for other use."""
    given = vars(make_parser(settings_class, description).parse_args(argv))
    least = {field.name: field.metadata["least"] for field in dataclasses.fields(settings_class)}
    for name, value in given.items():
        if isinstance(value, (int, float)) and not least[name] <= value < math.inf:
            raise UserError(f"{flag_name(name)} should be a finite number of at least "
                            f"{least[name]}, not {value}")
        if "resume" in given and name not in ("resume", "accept_changes", *ANEW):
            raise UserError(f"{flag_name(name)} cannot be given with --resume: a run keeps the "
                            "settings that it began with")
    if "resume" in given:
        return dataclasses.replace(read_settings(settings_class, given["resume"]), **given)
    return settings_class(**{"date": str(datetime.date.today())} | given)


def make_parser(settings_class, description):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = refuse
    for field in dataclasses.fields(settings_class):
        name = flag_name(field.name)
        doc = field.metadata["doc"].replace("%", "%%")
        if not doc:
            continue
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        if field.type is bool:
            group.add_argument(name, help=doc, action=argparse.BooleanOptionalAction)
            continue
        default = field.default
        if field.type is tuple:
            default = ",".join(map(str, default))
        if default != "":
            doc += f" (default: {default})".replace(f"{REPO}{os.sep}", "")
        group.add_argument(name, help=doc, choices=field.metadata["choices"],
                           type=whole_numbers if field.type is tuple else field.type)
    return parser


def refuse(message):
    raise UserError(message)


def whole_numbers(text):
    """The type of flags such as `--n 2,4,8`: a tuple of integers above 0."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers above 0, as in 4 or 2,4,8, not {text!r}")
    return tuple(map(int, text.split(",")))


def one_for_each(s, name, other):
    """Settings in which the tuple `name` has one number for each number of the tuple `other`."""
    values = getattr(s, name)
    count = len(getattr(s, other))
    if len(values) not in (1, count):
        raise UserError(f"{flag_name(name)} should be one number, or one for each of the {count} "
                        f"of {flag_name(other)}")
    return dataclasses.replace(s, **{name: values * (count // len(values))})
