"""
The training problems and the benchmarks of the paper, as JSONL files for bcr.py and evaluate.py.

    python -m data.prepare                  deepmath, aime25, amc23, minerva, math500, olympiadbench
    python -m data.prepare aime25 math500   only these; also aime24, gsm8k_train and gsm8k_test
    python -m data.prepare --from DIR       raw rows in DIR instead of the Hugging Face Hub:
                                            <name>.jsonl, .json or .parquet, or <name>/*.parquet

Each line is {"id", "problem", "answer", "difficulty", "source"}. `difficulty` is DeepMath's own,
the level of a MATH problem, and 0 elsewhere. Groups of N are made of about equal difficulty.

The number of problems is checked, and that each gold equals itself under the checker. A benchmark
that fails is refused: results without the problem would not be comparable. DeepMath problems that
fail are left out and counted, and so are those whose text is in a benchmark in the output folder.
A file appears when it is complete, so a run that was stopped continues with the missing ones.

The problems belong to others. Their licences are named in BENCHMARKS below and in the output.
"""

import argparse
import json
import logging
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.files import UserError, read_lines, write_lines
from reward import answers_equal, extract_answers

MAA = "MAA copyright, no licence named"  # Mathematical Association of America


class Benchmark(NamedTuple):
    repo: str  # on the Hugging Face Hub
    config: str | None  # None: the only one
    split: str
    counts: tuple  # the numbers of problems it can have
    licence: str


# OlympiadBench: open-ended, text only, English. Its authors withdrew one problem; the copy in
# Qwen2.5-Math, which many papers used, has it. DeepMath had 103,110 problems at its release; it is
# last because it excludes the problems of the others.
BENCHMARKS = {
    "aime25": Benchmark("math-ai/aime25", None, "test", (30,), MAA),
    "amc23": Benchmark("math-ai/amc23", None, "test", (40,), MAA),
    "minerva": Benchmark("math-ai/minervamath", None, "test", (272,), "CC BY-NC-SA 4.0 (MIT OCW)"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", None, "test", (500,), "MIT"),
    "olympiadbench": Benchmark("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", (674, 675),
                               "MIT (GitHub), Apache-2.0 (Hub)"),
    "aime24": Benchmark("math-ai/aime24", None, "test", (30,), MAA),
    "gsm8k_train": Benchmark("openai/gsm8k", "main", "train", (7473,), "MIT"),
    "gsm8k_test": Benchmark("openai/gsm8k", "main", "test", (1319,), "MIT"),
    "deepmath": Benchmark("zwhe99/DeepMath-103K", None, "train", (103022, 103110), "MIT"),
}
WHOLE = ("aime24", "aime25", "amc23", "gsm8k_test", "gsm8k_train")  # all golds are integers
COLUMNS = ["question", "final_answer", "difficulty"]  # of DeepMath; the rest are 5 GB of solutions
DEFAULT = ("aime25", "amc23", "minerva", "math500", "olympiadbench", "deepmath")
# In JSON written by hand, the \f of \frac is a form feed and the \t of \triangle is a tab. Copies
# of AIME 2025 have this error. These are the same characters in Python.
ESCAPES = {"\f": r"\f", "\b": r"\b", "\a": r"\a", "\v": r"\v", "\triangle": r"\triangle",
           "\times": r"\times", "\theta": r"\theta", "\text{": r"\text{", "\tfrac{": r"\tfrac{"}


# ----------------------------------------------------------------------------------------------
# Raw rows, from the Hub or from files


def rows_of_hub(name):
    repo, config, split, _, _ = BENCHMARKS[name]
    print(f"{name}: loading {repo} from the Hugging Face Hub", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    options = {"columns": COLUMNS} if name == "deepmath" else {}
    try:
        import datasets
        return datasets.load_dataset(repo, config, split=split, **options).to_list()
    except Exception as error:  # no package, no network and no such dataset have no common class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load {repo} from the Hugging Face Hub ({reason}): pip install "
                        "datasets and try again, or use local files with --from DIR") from None


def files_of(name, folder):
    """The files in a folder that have the rows of a benchmark."""
    single = [folder / f"{name}{suffix}" for suffix in (".jsonl", ".json", ".parquet")]
    found = [path for path in single if path.is_file()]
    return found[:1] or sorted((folder / name).glob("*.parquet"))


def rows_of_file(name, path):
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    import pyarrow.parquet  # of the package datasets

    columns = COLUMNS if name == "deepmath" else None
    return pyarrow.parquet.read_table(path, columns=columns).to_pylist()


def read_jsonl(path):
    return [json.loads(line) for _, line in read_lines(path)]


# ----------------------------------------------------------------------------------------------
# A row as a problem


def first(row, columns, default=""):
    """The value of the first of the columns that is not empty."""
    for column in columns:
        if row.get(column) not in (None, "", []):
            return row[column]
    return default


def problem_of(name, number, row):
    """The row as a problem with five fields. Problem or answer is "" if the row has none."""
    source = name.split("_")[0]  # gsm8k_train and gsm8k_test are both GSM8K
    key = str(first(row, ("id", "unique_id"), number))
    if not key.startswith(f"{source}/"):
        key = f"{name.replace('_', '/')}/{key}"
    text = str(first(row, ("problem", "question")))
    if row.get("context"):  # OlympiadBench: text that several problems share comes first
        text = f"{row['context']}\n{text}"
    level = re.search(r"-?\d+(\.\d+)?", str(first(row, ("difficulty", "level"))))  # 5.5, Level 3
    return {"id": key, "problem": repair(text), "answer": gold_of(name, row),
            "difficulty": float(level[0]) if level else 0.0, "source": source}


def gold_of(name, row):
    """The gold as text, from any form that a source has."""
    value = first(row, ("final_answer", "answer", "solution"))
    if isinstance(value, list):  # OlympiadBench: all answers, often in one string
        value = ", ".join(map(str, value))
    text = repair(str(value))
    if name.startswith("gsm8k"):  # a solution, then #### and the gold
        text = text.split("####")[-1].strip()
    if r"\boxed{" in text:
        text = extract_answers(text, 1)[0] or ""
    if re.fullmatch(r"\$[^$]+\$", text):
        text = text[1:-1].strip()
    if name in WHOLE:  # 27.0, 025, 70,000, 336^\circ are 27, 25, 70000, 336
        text = re.sub(r"(?<=\d),(?=\d\d\d)", "", text)
        number = re.fullmatch(r"(-?)0*(\d+)(\.0*)?(\^\{?\\circ\}?)?", text)
        text = number[1] + number[2] if number else ""
    return text


def repair(text):
    for broken, command in ESCAPES.items():
        text = text.replace(broken, command)
    return text.strip()


def bare(text):
    """Letters and digits only: copies of a problem differ in spaces, dollars and full stops. That
    a + b becomes a - b costs DeepMath a few problems."""
    return re.sub(r"[\W_]+", "", text.lower())


# ----------------------------------------------------------------------------------------------
# Checks, and files


def fault_of(problem, known):
    """What is wrong with a problem, None if nothing is. known: texts that are excluded."""
    if not problem["problem"]:
        return "without a text"
    if not problem["answer"]:
        return "without a gold answer that can be read"
    if not answers_equal(problem["answer"], problem["answer"]):
        return "whose gold does not equal itself"
    if bare(problem["problem"]) in known:
        return "found in a benchmark"
    return None


def problems_of(name, rows, where, known):
    """The problems of the rows, and a Counter of what was left out. Raises UserError if their
    number is wrong or a benchmark has a faulty one."""
    counts = BENCHMARKS[name].counts
    if len(rows) not in counts:
        expected = " or ".join(f"{count:,}" for count in counts)
        raise UserError(f"{where} has {len(rows):,} problems, but {name} has {expected}")
    problems = []
    left_out = Counter()
    for number, row in enumerate(tqdm(rows, desc=name, leave=False, disable=None)):
        problem = problem_of(name, number, row)
        fault = fault_of(problem, known)
        if fault is None:
            problems.append(problem)
        elif name == "deepmath":
            left_out[fault] += 1
        else:
            raise UserError(f"{where} has a problem {fault}: {problem['id']}, of the columns "
                            f"{', '.join(row)}")
    return problems, left_out


def benchmark_texts(out):
    """The texts of the problems of all benchmarks in directory `out`."""
    names = [n for n in BENCHMARKS if n not in ("deepmath", "gsm8k_train")]
    paths = [out / f"{n}.jsonl" for n in names if (out / f"{n}.jsonl").is_file()]
    found = ", ".join(path.stem for path in paths) or "nothing: no benchmark is there"
    print(f"deepmath: excludes the problems of {found}")
    return {bare(row["problem"]) for path in paths for row in read_jsonl(path)}


def prepare(name, folder, out, force):
    """Writes one file. Returns its line of the table: file, problems, licence, source."""
    path = out / f"{name}.jsonl"
    licence = BENCHMARKS[name].licence
    known = benchmark_texts(out) if name == "deepmath" else set()
    if path.is_file() and not force:
        rows = read_jsonl(path)
        if not any(bare(row["problem"]) in known for row in rows):
            print(f"{name}: {path} is there, and is kept (--force writes it again)", flush=True)
            return path.name, f"{len(rows):,}", licence, "kept"
        print(f"{name}: {path} shares problems with a benchmark: written again", flush=True)
    if folder:
        where = folder / name
        rows = [row for file in files_of(name, folder) for row in rows_of_file(name, file)]
    else:
        where = BENCHMARKS[name].repo
        rows = rows_of_hub(name)
    problems, left_out = problems_of(name, rows, where, known)
    write_lines(path, problems)
    print(f"{name}: {len(problems):,} problems", flush=True)
    for fault, count in left_out.items():
        print(f"{name}: left out {count:,} {fault}", flush=True)
    return path.name, f"{len(problems):,}", licence, str(where)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR",
                        help="local files instead of the Hub")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent,
                        help="output directory (default: that of this script)")
    parser.add_argument("--force", action="store_true", help="write existing files again")
    s = parser.parse_args(argv)
    for name in s.names:
        if name not in BENCHMARKS:
            raise UserError(f"unknown benchmark {name!r}: known are {', '.join(BENCHMARKS)}")
    return s


def main(argv=None):
    table = [("file", "problems", "licence", "from")]
    try:
        s = parse(argv)
        s.out.mkdir(parents=True, exist_ok=True)
        for name in [name for name in BENCHMARKS if name in (s.names or DEFAULT)]:
            if not s.folder or files_of(name, s.folder):
                table.append(prepare(name, s.folder, s.out, s.force))
            elif s.names:
                raise UserError(f"--from {s.folder} has no {name}.jsonl, .json or .parquet")
            else:
                print(f"{name}: not in {s.folder}, skipped")
    except UserError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    main()
