"""
The training problems and the benchmarks of the paper, as JSONL files that bcr.py reads.

    python data/prepare.py                    deepmath, aime25, amc23, minerva, math500, olympiadbench
    python data/prepare.py aime25 math500     only these; also aime24, gsm8k_train, gsm8k_test (gsm8k: both)
    python data/prepare.py --from DIR         raw rows in DIR instead of the Hugging Face Hub:
                                              <name>.jsonl, .json or .parquet, or a folder <name>/*.parquet

A problem a line: {"id", "problem", "answer", "difficulty", "source"}. `difficulty` is DeepMath's own, the
level of a MATH problem, and 0 elsewhere: bcr.py makes its groups of N equally hard by it, so the paper's
3,000 groups of N = 3 need no preparation of their own.

What is checked: the number of problems, that ids differ, that each has a text, and that each gold answer
equals itself under the checker. A benchmark that fails is refused, by the id of its problem, for leaving
one out would give figures that compare with nobody's. Of DeepMath such problems are left out and counted,
and so are those whose text is also in a benchmark that lies beside it.

Files that are there, whole and valid are kept; --force makes them anew. The problems belong to others,
and their licences are named in BENCHMARKS below and with the result: MIT for DeepMath-103K, MATH and
GSM8K, MIT or Apache-2.0 for OlympiadBench, CC BY-NC-SA 4.0 for Minerva (MIT OpenCourseWare); AIME and AMC
are copyrighted by the Mathematical Association of America, which names no licence.
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

from reward import answers_equal  # noqa: E402

MAA = "MAA copyright, no licence named"
# hub: repository, configuration (None: its only one) and split. counts: how many problems it may hold.
# whole: all golds are whole numbers, and are written as such.
BENCHMARKS = {
    "aime25": dict(hub=("math-ai/aime25", None, "test"), counts=(30,), licence=MAA, whole=True),
    "amc23": dict(hub=("math-ai/amc23", None, "test"), counts=(40,), licence=MAA, whole=True),
    "minerva": dict(hub=("math-ai/minervamath", None, "test"), counts=(272,),
                    licence="CC BY-NC-SA 4.0 (MIT OpenCourseWare)"),
    "math500": dict(hub=("HuggingFaceH4/MATH-500", None, "test"), counts=(500,), licence="MIT"),
    # Open-ended, text only, mathematics, English. Its authors took one problem back: the Hub has 674,
    # the copy in Qwen2.5-Math that many papers measured on has 675.
    "olympiadbench": dict(hub=("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"), counts=(674, 675),
                          licence="MIT (GitHub), Apache-2.0 (Hub)"),
    "aime24": dict(hub=("math-ai/aime24", None, "test"), counts=(30,), licence=MAA, whole=True),
    "gsm8k_train": dict(hub=("openai/gsm8k", "main", "train"), counts=(7473,), licence="MIT", whole=True),
    "gsm8k_test": dict(hub=("openai/gsm8k", "main", "test"), counts=(1319,), licence="MIT", whole=True),
    # 103,022 today, 103,110 when it came out. Last, to be kept apart from what is made before it.
    "deepmath": dict(hub=("zwhe99/DeepMath-103K", None, "train"), counts=(103022, 103110), licence="MIT"),
}
DEFAULT = ("aime25", "amc23", "minerva", "math500", "olympiadbench", "deepmath")
# Where the sources keep what we need: the first of these columns that a row has, and that is not empty.
PROBLEM, ANSWER = ("problem", "question"), ("final_answer", "answer", "solution")
DIFFICULTY, ID = ("difficulty", "level"), ("id", "unique_id")
COLUMNS = {*PROBLEM, *ANSWER, *DIFFICULTY, *ID, "context"}
MOST_LEFT_OUT = 0.1  # of DeepMath; more is no bad problem here and there, but a bad file
# JSON written by hand reads the \f of \frac as a form feed and the \t of \triangle as a tab. Copies of
# AIME 2025 have this; here are the same mistakes, in Python.
ESCAPES = {"\f": r"\f", "\b": r"\b", "\a": r"\a", "\v": r"\v", "\triangle": r"\triangle", "\times": r"\times",
           "\theta": r"\theta", "\text{": r"\text{", "\tfrac{": r"\tfrac{"}


class UserError(Exception):
    """A mistake that the user can mend, in one sentence. (As in model.py, which would need torch.)"""


# ----------------------------------------------------------------------------------------------
# Raw rows, from the Hub or from files


def rows_of_hub(name):
    repo, config, split = BENCHMARKS[name]["hub"]
    if not sys.stderr.isatty():
        os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        import datasets
    except ImportError:
        raise UserError("the Hub's files need the package datasets: pip install datasets, or name local files "
                        "with --from DIR") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each of its retries
    print(f"{name}: loading {repo} from the Hugging Face Hub", flush=True)
    # Of DeepMath's 5 GB all but these columns are R1's solutions, which need not be unpacked.
    columns = {"columns": ["question", "final_answer", "difficulty"]} if name == "deepmath" else {}
    try:
        data = datasets.load_dataset(repo, config, split=split, **columns)
    except Exception as error:  # there is no common class for no network, no such dataset, a full disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load {repo} from the Hugging Face Hub ({reason}): try again, for what was downloaded "
                        "is kept, or name local files with --from DIR") from None
    return data.select_columns([column for column in data.column_names if column in COLUMNS]).to_list()


def files_of(name, folder):
    """The files in a folder that hold the rows of a benchmark."""
    single = [path for ending in ("jsonl", "json", "parquet") if (path := folder / f"{name}.{ending}").is_file()]
    return single[:1] or sorted((folder / name).glob("*.parquet"))


def rows_of_file(path):
    """The rows of parquet, of JSON lines or of a JSON list, as dicts."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(f"{path} needs the package datasets, which reads parquet: pip install datasets") from None
        try:
            found = [column for column in parquet.read_schema(path).names if column in COLUMNS]
            return parquet.read_table(path, columns=found).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are among these
            raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    rows, number = [], 1
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for number, line in enumerate(text.split("\n"), start=1):
                rows += [json.loads(line)] if line.strip() else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {max(number, getattr(error, 'lineno', 1))}: not valid JSON") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {number} is not a JSON object")
    return rows


# ----------------------------------------------------------------------------------------------
# A row as a problem


def problem_of(name, number, row):
    """The row with our five fields; problem or answer are "" where it has none. A problem that went
    through this once comes out of it as it is, which is how finished files are checked."""
    def first(columns, default=""):
        for column in columns:
            if row.get(column) not in (None, "", []):
                return column, row[column]
        return None, default

    source = name.split("_")[0]  # gsm8k_train and gsm8k_test are both GSM8K
    key = str(first(ID, number)[1])
    text = str(first(PROBLEM)[1])
    if row.get("context"):  # OlympiadBench: what several problems share; its own prompt puts it first
        text = f"{row['context']}\n{text}"
    level = re.search(r"-?\d+(\.\d+)?", str(first(DIFFICULTY)[1]))  # 5.5, or 3 in "Level 3"
    return {"id": key if key.startswith(f"{source}/") else f"{name.replace('_', '/')}/{key}", "problem": mend(text),
            "answer": gold_of(name, *first(ANSWER)), "difficulty": float(level[0]) if level else 0.0, "source": source}


def gold_of(name, column, value):
    """The gold answer as text, whatever form the source gives it."""
    if isinstance(value, list):  # OlympiadBench: all answers, often in one string
        value = ", ".join(map(str, value))
    text = mend(str(value))
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
    r"""What stands in the last \boxed{...}, "" without one."""
    rest, depth = text.rpartition(r"\boxed{")[2] if r"\boxed{" in text else "", 1
    for end, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if not depth:
            return rest[:end].strip()
    return ""


def mend(text):
    for broken, whole in ESCAPES.items():
        text = text.replace(broken, whole)
    return text.strip()


def bare(text):
    """Letters and digits alone: copies of a problem differ in spaces, dollars and full stops. What
    this mixes up (a + b with a - b) costs DeepMath a few problems."""
    return re.sub(r"[\W_]+", "", text.lower())


# ----------------------------------------------------------------------------------------------
# Checks, and files


def problems_of(name, rows, where, known, most=MOST_LEFT_OUT):
    """The problems that the rows hold and a Counter of what was left out (of DeepMath only). `known`
    are the texts that none may have, `most` the share that may be left out. Raises UserError for
    anything else that is wrong."""
    problems, ids, left_out = [], set(), Counter()
    for number, row in enumerate(tqdm(rows, desc=name, leave=False, disable=not sys.stderr.isatty())):
        problem = problem_of(name, number, row)
        wrong = ("without a text" if not problem["problem"] else
                 "without a gold answer that can be read" if not problem["answer"] else
                 "whose gold does not equal itself" if not answers_equal(problem["answer"], problem["answer"]) else
                 "found in a benchmark" if bare(problem["problem"]) in known else None)
        if wrong and name != "deepmath":
            raise UserError(f"{where} has a problem {wrong}: {problem['id']}, of the columns {', '.join(row)}")
        if problem["id"] in ids:
            raise UserError(f"{where} has two problems with the id {problem['id']}")
        ids.add(problem["id"])
        if not wrong:
            problems.append(problem)
            continue
        left_out[wrong] += 1
        if sum(left_out.values()) > most * len(rows):
            raise UserError(f"{where} has too many problems to leave out, {words(left_out)} in its first {number:,} "
                            f"rows, of the columns {', '.join(row)}")
    return problems, left_out


def words(left_out):
    return ", ".join(f"{count:,} {wrong}" for wrong, count in left_out.items())


def finished(name, path, known):
    """The number of problems in a file that is one of ours, whole and valid; 0 of any other."""
    try:
        rows, counts = rows_of_file(path), BENCHMARKS[name]["counts"]
        least = (1 - MOST_LEFT_OUT) * min(counts) if name == "deepmath" else min(counts)
        valid = least <= len(rows) <= max(counts) and problems_of(name, rows, path, known, most=0)[0] == rows
        return len(rows) if valid else 0
    except UserError:
        return 0


def write(path, problems):
    """A file beside the target, which a rename then replaces: at no moment is there half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for problem in problems:
                file.write(json.dumps(problem) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


# ----------------------------------------------------------------------------------------------


def prepare(name, folder, out, force):
    """Makes one file. Returns its line of the table: file, problems, licence, where from."""
    path, counts, known = out / f"{name}.jsonl", BENCHMARKS[name]["counts"], set()
    if name == "deepmath":
        beside = [n for n in BENCHMARKS if n not in ("deepmath", "gsm8k_train") and (out / f"{n}.jsonl").is_file()]
        known = {bare(str(row.get("problem"))) for n in beside for row in rows_of_file(out / f"{n}.jsonl")}
        print(f"deepmath: will be kept apart from {', '.join(beside) or 'nothing, for no benchmark lies beside it'}")
    if not force and path.is_file():
        if count := finished(name, path, known):
            print(f"{name}: {path} is whole and valid, and kept (--force makes it anew)", flush=True)
            return path.name, f"{count:,}", BENCHMARKS[name]["licence"], "kept"
        print(f"{name}: {path} is not whole, not valid or not apart from the benchmarks, and made anew", flush=True)
    files = files_of(name, folder) if folder else []
    where = str(files[0] if len(files) == 1 else folder / name) if folder else BENCHMARKS[name]["hub"][0]
    rows = [row for file in files for row in rows_of_file(file)] if folder else rows_of_hub(name)
    if len(rows) not in counts:
        raise UserError(f"{where} has {len(rows):,} problems, but {name} has {' or '.join(f'{c:,}' for c in counts)}")
    problems, left_out = problems_of(name, rows, where, known)
    write(path, problems)
    print(f"{name}: {len(problems):,} problems" + (f"; left out: {words(left_out)}" if left_out else ""), flush=True)
    return path.name, f"{len(problems):,}", BENCHMARKS[name]["licence"], where


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="local files instead of the Hub")
    parser.add_argument("--out", type=Path, default=HERE, help="where the files go (default: beside this script)")
    parser.add_argument("--force", action="store_true", help="make files anew that are there and valid")
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
        print(f"{name}: not in {s.folder}, and not made")
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
        print("\nstopped; the same command goes on with the file that is missing", file=sys.stderr)
        sys.exit(130)
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for file, count, licence, where in table:
        print(f"{file:<{widths[0]}}  {count:>{widths[1]}}  {licence:<{widths[2]}}  {where}")


if __name__ == "__main__":
    main()
