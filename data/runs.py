"""
The directory of a run: what it began with (settings.json) and its checkpoints.

A run is resumed from its directory alone. The settings are those in settings.json, and the contents
of data, reward and model must be those that it began with, under whatever path; the rest is in the
last checkpoint. The order of the data and every draw are functions of the settings and the step.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

import distributed
from data.chat import copy_tokenizer
from data.files import REPO, UserError, find_model, flush, read_json, write_json

# ----------------------------------------------------------------------------------------------
# settings.json


def open_out(s, default):
    """Makes the directory of a new run with its settings.json, or checks that of the run to resume.

    A directory must be new: making it is what keeps two runs apart. Raises UserError for one that
    exists, and if contents have changed; --accept-changes continues and records both digests."""
    settings = saved_form(s) | {"sha256": fingerprints(s), "accepted_changes": []}
    if s.resume:
        out = Path(s.resume)
        saved = read_json(out / "settings.json")
        pairs = {role: [saved["sha256"].get(role), new] for role, new in settings["sha256"].items()}
        changed = {role: pair for role, pair in pairs.items() if pair[0] != pair[1]}
        if changed and not s.accept_changes:
            raise UserError(f"--resume: the contents of {' and '.join(changed)} have changed since "
                            "the run began: restore them, or continue with --accept-changes")
        settings["accepted_changes"] = saved["accepted_changes"]
        if changed:
            settings["accepted_changes"].append(changed)
        write_json(out / "settings.json", settings)
        return out
    for name in [s.out] if s.out else (f"{default}-{k}" for k in itertools.count(1)):
        try:
            Path(name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the directory --out {name}: {error.strerror}") from None
        write_json(Path(name) / "settings.json", settings)
        return Path(name)
    raise UserError(f"--out {s.out} is in use: name a new directory, or continue the run in it "
                    f"with --resume {s.out}")


def saved_form(s):
    """Settings as in settings.json. Files of this repo are saved by their path within it, so that a
    checkout can move."""
    settings = json.loads(json.dumps(dataclasses.asdict(s)))  # tuples as lists
    del settings["resume"], settings["accept_changes"]
    return {name: value.replace(f"{REPO}{os.sep}", "") if isinstance(value, str) else value
            for name, value in settings.items()}


def read_settings(settings_class, out):
    """The settings of the run in directory `out`. Raises UserError if there is none."""
    path = Path(out) / "settings.json"
    if not path.is_file():
        raise UserError(f"--resume finds no run in {out}: name the directory of a run")
    saved = read_json(path)
    values = {}
    for field in dataclasses.fields(settings_class):
        if field.name in ("resume", "accept_changes"):
            continue
        if field.name not in saved:
            raise UserError(f"{path} is of another program or version: it has no {field.name}")
        value = saved[field.name]
        if field.type is tuple:
            value = tuple(value)
        elif field.type is str:
            value = ",".join(map(find_path, value.split(",")))
        values[field.name] = value
    return settings_class(**values)


def resume_restarted(s):
    """Settings that resume the run in s.out if torchrun has restarted the processes."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if restarted and not s.resume and (Path(s.out) / "settings.json").is_file():
        return dataclasses.replace(read_settings(type(s), s.out), resume=s.out)
    return s


def find_path(name):
    """The path of a file that `saved_form` has written."""
    return name if Path(name).exists() or not (REPO / name).exists() else str(REPO / name)


def fingerprints(s):
    """{role: sha256} of the files that a run depends on: model, problems and reward."""
    model = find_model(s.model)
    files = {
        "the weights": sorted(model.glob("model*.safetensors*")),
        "config.json": [model / "config.json", model / "generation_config.json"],
        "the tokenizer": [model / "tokenizer.json"],
        "the chat template": [model / "chat_template.jinja", model / "tokenizer_config.json"]}
    for name in ("data", "eval_data", "solve", "reward"):
        if getattr(s, name, ""):
            files["--" + name.replace("_", "-")] = map(Path, getattr(s, name).split(","))
    return {role: sha256(paths) for role, paths in files.items()}


def sha256(paths):
    """The digest of the contents of files, one after the other. A missing file is an empty one."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(out):
    """The checkpoint directories in `out`, oldest first."""
    return sorted(out.glob("checkpoint-" + "[0-9]" * 6))


def save_checkpoint(out, step, metrics, model, master, optimizer, tokenizer):
    """Writes what the steps after `step` depend on: float32 weights, AdamW's state and the metrics
    so far. (The order of the data and every draw are functions of the settings and the step.)

    With config.json and the files of the tokenizer, copied from the directory `tokenizer`, a
    checkpoint is also a Hugging Face model. It is written under another name, flushed and renamed,
    then all but the last two are removed: at any moment the last `checkpoint-*` is complete. Any
    number of processes can resume from it."""
    temporary = out / "checkpoint.tmp"
    weights = {}
    state = {}
    for (name, _), weight in zip(model.named_parameters(), master):
        weights[name] = weight.detach()
        for key, tensor in optimizer.state[weight].items():
            state[f"{key}.{name}"] = tensor
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    write_tensors(temporary / "model.safetensors", weights)
    write_tensors(temporary / "adamw.safetensors", state)
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


def write_tensors(path, tensors):
    """Writes {name: float32 tensor} as a safetensors file. Shares are gathered and written one
    tensor at a time, so that memory holds one of them twice. All processes call this together.

    Source: the format in the README of github.com/huggingface/safetensors."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    first = distributed.rank() == 0
    with open(path if first else os.devnull, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            value = distributed.whole(tensor)
            if first:
                file.write(value.flatten().cpu().numpy().data)
            del value  # before the next one is gathered


@torch.no_grad()
def load_checkpoint(out, model, master, optimizer):
    """Restores the last checkpoint. Returns its step and the metrics so far; without one, 0, []."""
    if not checkpoints(out):
        return 0, []
    path = checkpoints(out)[-1]
    weights = {name: weight for (name, _), weight in zip(model.named_parameters(), master)}
    with safe_open(path / "model.safetensors", framework="pt") as file:
        for name, weight in weights.items():
            weight.copy_(distributed.share_of(file.get_tensor(name), weight))
    with safe_open(path / "adamw.safetensors", framework="pt") as file:
        for key in file.keys():
            kind, name = key.split(".", 1)
            weight = weights[name]
            tensor = file.get_tensor(key).clone()  # not a view of the mapped file
            if tensor.dim():  # AdamW's step is one number, which all processes have
                tensor = distributed.share_of(tensor, weight)
            optimizer.state[weight][kind] = tensor
    state = read_json(path / "state.json")
    return state["step"], state["metrics"]
