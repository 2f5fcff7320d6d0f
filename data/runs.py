"""
The directory of a run: what it began with (settings.json) and its checkpoints.

A run is resumed from its directory alone. The settings are those in settings.json, and the contents
of data, reward and model must be those that it began with, under whatever path; the rest is in the
last checkpoint. The order of the data and every draw are functions of the settings and the step.
"""

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import distributed
from data.chat import copy_tokenizer
from data.files import REPO, UserError, find_model, flush, read_json, write_json

# ----------------------------------------------------------------------------------------------
# settings.json


def open_out(s, default):
    """Makes the directory of a new run, or checks that of the run to resume; writes settings.json.

    A directory must be new: making it is what keeps two runs apart. Raises UserError for one that
    exists, and if contents have changed; --accept-changes continues and keeps all digests."""
    digests = fingerprints(s)
    if s.resume:
        out = Path(s.resume)
        history = read_json(out / "settings.json")["sha256"]
        changed = [role for role in digests if digests[role] != history[-1].get(role)]
        if changed and not s.accept_changes:
            raise UserError(f"--resume: the contents of {' and '.join(changed)} have changed since "
                            "the run began: restore them, or continue with --accept-changes")
        if changed:
            history.append(digests)
    else:
        out = make_directory(s.out, default)
        history = [digests]
    settings = dataclasses.asdict(s) | {"resume": "", "accept_changes": False, "sha256": history}
    for name, value in settings.items():
        if isinstance(value, str):  # a path within the repo, so that a checkout can move
            settings[name] = value.replace(f"{REPO}{os.sep}", "")
    write_json(out / "settings.json", settings)
    return out


def make_directory(name, default):
    """A new directory: `name`, or without it the next free of default-1, default-2, ..."""
    k = 1
    while not name and Path(f"{default}-{k}").exists():
        k += 1
    out = Path(name or f"{default}-{k}")
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} is in use or cannot be made ({error.strerror}): name a new "
                        f"directory, or continue the run in it with --resume {out}") from None
    return out


def read_settings(settings_class, out):
    """The settings of the run in directory `out`. Raises UserError if there is none."""
    path = Path(out) / "settings.json"
    if not path.is_file():
        raise UserError(f"--resume finds no run in {out}: name the directory of a run")
    saved = read_json(path)
    values = {}
    for field in dataclasses.fields(settings_class):
        if field.name not in saved:
            raise UserError(f"{path} is of another program or version: it has no {field.name}")
        values[field.name] = field.type(saved[field.name])  # a tuple is saved as a list
        if field.type is str:
            values[field.name] = ",".join(map(find_path, saved[field.name].split(",")))
    return settings_class(**values)


def find_path(name):
    """The path of a file that is saved by its path within the repo."""
    return name if Path(name).exists() or not (REPO / name).exists() else str(REPO / name)


def resume_restarted(s):
    """Settings that resume the run in s.out if torchrun has restarted the processes."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if restarted and not s.resume and (Path(s.out) / "settings.json").is_file():
        return dataclasses.replace(read_settings(type(s), s.out), resume=s.out)
    return s


def fingerprints(s):
    """{role: sha256 of each file} of what a run depends on: model, problems and reward."""
    model = find_model(s.model)
    files = {
        "the weights": sorted(model.glob("model*.safetensors*")),
        "config.json": [model / "config.json", model / "generation_config.json"],
        "the tokenizer": [model / "tokenizer.json"],
        "the chat template": [model / "chat_template.jinja", model / "tokenizer_config.json"]}
    for name in ("data", "eval_data", "solve", "reward"):
        if getattr(s, name, ""):
            files["--" + name.replace("_", "-")] = map(Path, getattr(s, name).split(","))
    digests = {}
    for role, paths in files.items():
        digests[role] = [sha256(path) for path in paths if path.is_file()]
    return digests


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(out):
    """The checkpoint directories in `out`, oldest first."""
    return sorted(out.glob("checkpoint-" + "[0-9]" * 6))


def save_checkpoint(out, step, metrics, model, master, optimizer, tokenizer):
    """Writes what the steps after `step` depend on: float32 weights, AdamW's state and the metrics
    so far. It is written under another name, flushed and renamed, then all but the last two are
    removed: at any moment the last `checkpoint-*` is complete. Any number of processes can resume.

    With config.json and the files in the directory `tokenizer` it is also a Hugging Face model."""
    temporary = out / "checkpoint.tmp"
    weights = {name: weight for (name, _), weight in zip(model.named_parameters(), master)}
    state = {}
    for name, weight in weights.items():
        for key, tensor in optimizer.state[weight].items():
            state[f"{key}.{name}"] = tensor
    if distributed.rank() == 0:
        temporary.mkdir(exist_ok=True)
    save_tensors(temporary / "model.safetensors", weights)
    save_tensors(temporary / "adamw.safetensors", state)
    if distributed.rank() > 0:
        return
    copy_tokenizer(tokenizer, temporary)
    write_json(temporary / "config.json", model.config.to_hf(torch.float32))
    write_json(temporary / "state.json", {"step": step, "metrics": metrics})
    for path in (*temporary.iterdir(), temporary):
        flush(path)
    temporary.replace(out / f"checkpoint-{step:06d}")
    flush(out)
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old)


def save_tensors(path, tensors):
    """Writes {name: tensor} as a safetensors file. Shares are gathered one by one, in the memory of
    the first process's host. All processes call this together."""
    gathered = {}
    for name, tensor in tensors.items():
        value = distributed.whole(tensor.detach())
        if distributed.rank() == 0:
            gathered[name] = value.cpu()
    if distributed.rank() == 0:
        save_file(gathered, path, {"format": "pt"})


@torch.no_grad()
def load_checkpoint(out, model, master, optimizer):
    """Restores the last checkpoint. Returns its step and the metrics so far; without one, 0, []."""
    if not checkpoints(out):
        return 0, []
    path = checkpoints(out)[-1]
    weights = {name: weight for (name, _), weight in zip(model.named_parameters(), master)}
    for name, tensor in load_file(path / "model.safetensors").items():
        weights[name].copy_(distributed.share_of(tensor, weights[name]))
    for key, tensor in load_file(path / "adamw.safetensors").items():
        kind, name = key.split(".", 1)
        tensor = tensor.clone()  # not a view of the mapped file
        if tensor.dim():  # AdamW's step is one number, which all processes have
            tensor = distributed.share_of(tensor, weights[name])
        optimizer.state[weights[name]][kind] = tensor
    state = read_json(path / "state.json")
    return state["step"], state["metrics"]
