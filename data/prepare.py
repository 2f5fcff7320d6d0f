"""
The training problems and the benchmarks of the paper, as JSONL files for bcr.py and evaluate.py.

    python data/prepare.py                    deepmath, aime25, amc23, minerva, math500, olympiadbench
    python data/prepare.py aime25 math500     only these; also aime24, gsm8k_train, gsm8k_test (gsm8k: both)
    python data/prepare.py --from DIR         raw rows in DIR instead of the Hugging Face Hub:
                                              <name>.jsonl, .json or .parquet, or a folder <name>/*.parquet

Each line is {"id", "problem", "answer", "difficulty", "source"}. `difficulty` is DeepMath's own, the level of
a MATH problem, and 0 elsewhere. bcr.py uses it to make groups of about equal difficulty, so the paper's 3,000
groups of N = 3 need no other preparation.

The script checks the number of problems, that ids differ, that each problem has a text, and that each gold
equals itself under the checker. A benchmark that fails is refused with the id of the problem, because figures
without it would not be comparable. DeepMath problems that fail are left out and counted, and so are those
whose text is also in a benchmark in the output directory.

Complete and valid files are kept; --force writes them again. The problems belong to others. Their licences
are named in BENCHMARKS below and in the output: MIT for DeepMath-103K, MATH and GSM8K, MIT or Apache-2.0 for
OlympiadBench, CC BY-NC-SA 4.0 for Minerva (MIT OpenCourseWare); AIME and AMC are copyrighted by the
Mathematical Association of America, which names no licence.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data.files import UserError, read_lines, write_lines  # noqa: E402
from reward import answers_equal  # noqa: E402

MAA = "MAA copyright, no licence named"
# hub: repository, configuration (None: the only one) and split. counts: the numbers of problems it can have.
# whole: all golds are integers, and are written as integers.
BENCHMARKS = {
    "aime25": dict(hub=("math-ai/aime25", None, "test"), counts=(30,), licence=MAA, whole=True),
    "amc23": dict(hub=("math-ai/amc23", None, "test"), counts=(40,), licence=MAA, whole=True),
    "minerva": dict(hub=("math-ai/minervamath", None, "test"), counts=(272,),
                    licence="CC BY-NC-SA 4.0 (MIT OpenCourseWare)"),
    "math500": dict(hub=("HuggingFaceH4/MATH-500", None, "test"), counts=(500,), licence="MIT"),
    # Open-ended, text only, mathematics, English. Its authors withdrew one problem: the Hub has 674, the copy
    # in Qwen2.5-Math, which many papers used, has 675.
    "olympiadbench": dict(hub=("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"), counts=(674, 675),
                          licence="MIT (GitHub), Apache-2.0 (Hub)"),
    "aime24": dict(hub=("math-ai/aime24", None, "test"), counts=(30,), licence=MAA, whole=True),
    "gsm8k_train": dict(hub=("openai/gsm8k", "main", "train"), counts=(7473,), licence="MIT", whole=True),
    "gsm8k_test": dict(hub=("openai/gsm8k", "main", "test"), counts=(1319,), licence="MIT", whole=True),
    # 103,022 today, 103,110 at its release. It is last because it excludes the problems of the others.
    "deepmath": dict(hub=("zwhe99/DeepMath-103K", None, "train"), counts=(103022, 103110), licence="MIT"),
}
DEFAULT = ("aime25", "amc23", "minerva", "math500", "olympiadbench", "deepmath")
# The columns of the sources: the first of these that a row has and that is not empty.
PROBLEM, ANSWER = ("problem", "question"), ("final_answer", "answer", "solution")
DIFFICULTY, ID = ("difficulty", "level"), ("id", "unique_id")
COLUMNS = {*PROBLEM, *ANSWER, *DIFFICULTY, *ID, "context"}
MOST_LEFT_OUT = 0.1  # of DeepMath; a larger share means that the file is bad
# In JSON written by hand, the \f of \frac is a form feed and the \t of \triangle is a tab. Copies of AIME
# 2025 have this error. These are the same characters in Python.
ESCAPES = {"\f": r"\f", "\b": r"\b", "\a": r"\a", "\v": r"\v", "\triangle": r"\triangle", "\times": r"\times",
           "\theta": r"\theta", "\text{": r"\text{", "\tfrac{": r"\tfrac{"}


# ----------------------------------------------------------------------------------------------
# Raw rows, from the Hub or from files


def rows_of_hub(name):
    repo, config, split = BENCHMARKS[name]["hub"]
    if not sys.stderr.isatty():
        os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        import datasets
    except ImportError:
        raise UserError("reading from the Hub needs the package datasets: pip install datasets, or use local "
                        "files with --from DIR") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    print(f"{name}: loading {repo} from the Hugging Face Hub", flush=True)
    # DeepMath has 5 GB, of which all but these columns are solutions by R1.
    columns = {"columns": ["question", "final_answer", "difficulty"]} if name == "deepmath" else {}
    try:
        data = datasets.load_dataset(repo, config, split=split, **columns)
    except Exception as error:  # no network, no such dataset and a full disk have no common class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load {repo} from the Hugging Face Hub ({reason}): try again (what was "
                        "downloaded is kept), or use local files with --from DIR") from None
    return data.select_columns([column for column in data.column_names if column in COLUMNS]).to_list()


def files_of(name, folder):
    """The files in a folder that have the rows of a benchmark."""
    single = [folder / f"{name}.{ending}" for ending in ("jsonl", "json", "parquet")]
    return [path for path in single if path.is_file()][:1] or sorted((folder / name).glob("*.parquet"))


def rows_of_file(path):
    """The rows of parquet, of JSON lines or of a JSON list, as dicts. Raises UserError."""
    rows = rows_of_parquet(path) if path.suffix == ".parquet" else rows_of_json(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {number} is not a JSON object")
    return rows


def rows_of_parquet(path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"reading {path} needs the package datasets: pip install datasets") from None
    try:
        found = [column for column in parquet.read_schema(path).names if column in COLUMNS]
        return parquet.read_table(path, columns=found).to_pylist()
    except (OSError, ValueError) as error:  # the base classes of pyarrow's errors
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def rows_of_json(path):
    lines, rows = read_lines(path), []
    if lines and lines[0][1].lstrip().startswith("["):  # one list over all lines
        lines = [(lines[0][0], "\n".join(line for _, line in lines))]
    for number, line in lines:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            number += getattr(error, "lineno", 1) - 1
            raise UserError(f"{path}, line {number}: not valid JSON") from None
        rows += content if isinstance(content, list) else [content]
    return rows


# ----------------------------------------------------------------------------------------------
# A row as a problem


def problem_of(name, number, row):
    """The row as a problem with five fields; problem or answer is "" if the row has none. A problem that this
    function returned is returned unchanged, which is how finished files are checked."""

    def first(columns, default=""):
        for column in columns:
            if row.get(column) not in (None, "", []):
                return column, row[column]
        return None, default

    source = name.split("_")[0]  # gsm8k_train and gsm8k_test are both GSM8K
    key = str(first(ID, number)[1])
    text = str(first(PROBLEM)[1])
    if row.get("context"):  # OlympiadBench: text that several problems share; its own prompt puts it first
        text = f"{row['context']}\n{text}"
    level = re.search(r"-?\d+(\.\d+)?", str(first(DIFFICULTY)[1]))  # 5.5, or 3 in "Level 3"
    return {"id": key if key.startswith(f"{source}/") else f"{name.replace('_', '/')}/{key}",
            "problem": repair(text), "answer": gold_of(name, *first(ANSWER)),
            "difficulty": float(level[0]) if level else 0.0, "source": source}


def gold_of(name, column, value):
    """The gold as text, from any form that a source has."""
    if isinstance(value, list):  # OlympiadBench: all answers, often in one string
        value = ", ".join(map(str, value))
    text = repair(str(value))
    if name.startswith("gsm8k"):  # a solution, then #### and the gold
        text = text.split("####")[-1].strip()
    elif column == "solution" or re.fullmatch(r"\$?\\boxed\{.*\}\$?", text):
        text = last_boxed(text)
    if re.fullmatch(r"\$[^$]+\$", text):
        text = text[1:-1].strip()
    if BENCHMARKS[name].get("whole"):  # 27.0, 025, 70,000 and 336^\circ are 27, 25, 70000 and 336
        number = re.fullmatch(r"(-?)0*(\d+)(\.0*)?(\^\{?\\circ\}?)?", re.sub(r"(?<=\d),(?=\d\d\d)", "", text))
        text = number[1] + number[2] if number else ""
    return text


def last_boxed(text):
    r"""The content of the last \boxed{...}, "" if there is none."""
    rest, depth = text.rpartition(r"\boxed{")[2] if r"\boxed{" in text else "", 1
    for end, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if not depth:
            return rest[:end].strip()
    return ""


def repair(text):
    for broken, command in ESCAPES.items():
        text = text.replace(broken, command)
    return text.strip()


def bare(text):
    """Letters and digits only: copies of a problem differ in spaces, dollars and full stops. Problems that
    become equal (a + b and a - b) cost DeepMath a few problems."""
    return re.sub(r"[\W_]+", "", text.lower())


# ----------------------------------------------------------------------------------------------
# Checks, and files


def problems_of(name, rows, where, known, most=MOST_LEFT_OUT):
    """The problems of the rows, and a Counter of what was left out (of DeepMath only). known: texts that are
    excluded; most: the largest share that is left out. Raises UserError for anything else that is wrong."""
    problems, ids, left_out = [], set(), Counter()
    for number, row in enumerate(tqdm(rows, desc=name, leave=False, disable=not sys.stderr.isatty())):
        problem = problem_of(name, number, row)
        wrong = fault_of(problem, known)
        if wrong and name != "deepmath":
            raise UserError(f"{where} has a problem {wrong}: {problem['id']}, of the columns "
                            f"{', '.join(row)}")
        if problem["id"] in ids:
            raise UserError(f"{where} has two problems with the id {problem['id']}")
        ids.add(problem["id"])
        if not wrong:
            problems.append(problem)
            continue
        left_out[wrong] += 1
        if sum(left_out.values()) > most * len(rows):
            raise UserError(f"{where} has too many problems to leave out, {words(left_out)} in its first "
                            f"{number:,} rows, of the columns {', '.join(row)}")
    return problems, left_out


def fault_of(problem, known):
    """What is wrong with a problem, None if nothing is."""
    if not problem["problem"]:
        return "without a text"
    if not problem["answer"]:
        return "without a gold answer that can be read"
    if not answers_equal(problem["answer"], problem["answer"]):
        return "whose gold does not equal itself"
    return "found in a benchmark" if bare(problem["problem"]) in known else None


def words(left_out):
    return ", ".join(f"{count:,} {wrong}" for wrong, count in left_out.items())


def finished(name, path, known):
    """The number of problems in a file that this script wrote, if it is complete and valid, else 0."""
    try:
        rows, counts = rows_of_file(path), BENCHMARKS[name]["counts"]
        least = (1 - MOST_LEFT_OUT) * min(counts) if name == "deepmath" else min(counts)
        valid = least <= len(rows) <= max(counts) and problems_of(name, rows, path, known, most=0)[0] == rows
        return len(rows) if valid else 0
    except UserError:
        return 0


# ----------------------------------------------------------------------------------------------


def prepare(name, folder, out, force):
    """Writes one file. Returns its line of the table: file, problems, licence, source."""
    path, counts, known = out / f"{name}.jsonl", BENCHMARKS[name]["counts"], set()
    if name == "deepmath":
        benchmarks = [n for n in BENCHMARKS if n not in ("deepmath", "gsm8k_train")]
        excluded = [n for n in benchmarks if (out / f"{n}.jsonl").is_file()]
        known = {bare(str(row.get("problem"))) for n in excluded for row in rows_of_file(out / f"{n}.jsonl")}
        print(f"deepmath: excludes the problems of {', '.join(excluded) or 'nothing: no benchmark is there'}")
    if not force and path.is_file():
        if count := finished(name, path, known):
            print(f"{name}: {path} is complete and valid, and is kept (--force writes it again)", flush=True)
            return path.name, f"{count:,}", BENCHMARKS[name]["licence"], "kept"
        print(f"{name}: {path} is incomplete, invalid or shares problems with a benchmark: written again",
              flush=True)
    files = files_of(name, folder) if folder else []
    where = str(files[0] if len(files) == 1 else folder / name) if folder else BENCHMARKS[name]["hub"][0]
    rows = [row for file in files for row in rows_of_file(file)] if folder else rows_of_hub(name)
    if len(rows) not in counts:
        expected = " or ".join(f"{count:,}" for count in counts)
        raise UserError(f"{where} has {len(rows):,} problems, but {name} has {expected}")
    problems, left_out = problems_of(name, rows, where, known)
    try:
        write_lines(path, problems)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"{name}: {len(problems):,} problems" + (f"; left out: {words(left_out)}" if left_out else ""),
          flush=True)
    return path.name, f"{len(problems):,}", BENCHMARKS[name]["licence"], where


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR",
                        help="local files instead of the Hub")
    parser.add_argument("--out", type=Path, default=HERE,
                        help="output directory (default: that of this script)")
    parser.add_argument("--force", action="store_true", help="write valid files again")
    s = parser.parse_args(argv)
    named = {n for name in s.names for n in (("gsm8k_train", "gsm8k_test") if name == "gsm8k" else (name,))}
    if unknown := sorted(named - set(BENCHMARKS)):
        raise UserError(f"unknown benchmark {unknown[0]!r}: known are {', '.join(BENCHMARKS)}")
    if s.folder and not s.folder.is_dir():
        raise UserError(f"--from {s.folder} is not a directory")
    s.names = [name for name in BENCHMARKS if name in (named or DEFAULT)]
    missing = [name for name in s.names if s.folder and not files_of(name, s.folder)]
    if named and missing or missing == s.names:
        raise UserError(f"--from {s.folder} has no {missing[0]}.jsonl, .json or .parquet")
    for name in missing:
        print(f"{name}: not in {s.folder}, skipped")
        s.names.remove(name)
    try:
        s.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory --out {s.out}: {error.strerror}") from None
    return s


def main(argv=None):
    table = [("file", "problems", "licence", "from")]
    try:
        s = parse(argv)
        table += [prepare(name, s.folder, s.out, s.force) for name in s.names]
    except UserError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped. The same command continues with the missing files", file=sys.stderr)
        sys.exit(130)
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for file, count, licence, where in table:
        print(f"{file:<{widths[0]}}  {count:>{widths[1]}}  {licence:<{widths[2]}}  {where}")


if __name__ == "__main__":
    main()
