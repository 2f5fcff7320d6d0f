"""What a run shows: tables, a picture, one group of samples in full, and warnings."""

import numpy as np

from data.files import write_text
from data.problems import batch_prompt


def table(stages, changes, within):
    """The results as text, a line for each benchmark and N. stages: {"before": results, "after":
    results}; changes: `paired_change` of each benchmark and N, or {} for a single stage, which
    shows the problems per second instead."""
    first = next(iter(stages.values()))
    cases = [(name, n) for name in first for n in first[name]]
    blocks = [block("benchmark", [["", *(name for name, _ in cases)]]),
              block("N", [["", *(n for _, n in cases)]])]
    shown = [("accuracy %", "accuracy", "{:.1%}"),
             (f"in {within} tokens %", "accuracy_within", "{:.1%}"),
             ("tokens / problem", "tokens_per_problem", "{:.1f}"),
             ("waits / problem", "waits_per_problem", "{:.2f}"),
             ("problems / s", "problems_per_second", "{:.1f}")]
    for title, key, form in shown:
        if key == "accuracy_within" and not within or key == "problems_per_second" and changes:
            continue
        columns = []
        for stage, results in stages.items():
            values = [results[name][n][key] for name, n in cases]
            cells = ["" if value is None else form.format(value).rstrip("%") for value in values]
            columns.append([stage, *cells])
        if changes and key in ("accuracy", "tokens_per_problem"):
            columns.append(["change", *(change_text(changes[name][n], key) for name, n in cases)])
        blocks.append(block(title, columns))
    lines = [" | ".join(parts) for parts in zip(*blocks)]
    head = lines[:2] if len(stages) > 1 else lines[:1]
    return "\n".join([*head, "-" * len(lines[0]), *lines[2:]])


def change_text(change, key):
    if key == "tokens_per_problem":
        return f"{change['tokens']:+.1%}"
    low, high = change["accuracy_ci95"]
    return f"{100 * change['accuracy']:+.1f} ±{50 * (high - low):.1f}"


def block(title, columns):
    """Columns of text side by side, with a title above them: a list of lines of equal length."""
    lines = [""] * len(columns[0])
    for column in columns:
        width = max(map(len, column))
        lines = [f"{line} {cell.rjust(width)}" for line, cell in zip(lines, column)]
    width = max(len(title), len(lines[0]) - 1)
    return [title.center(width), *(line[1:].rjust(width) for line in lines)]


def dial(name, by_n, target):
    """A sentence that names the N with the most problems per second among those with an accuracy of
    at least `target` or, if the speed is not known for all of them, the one with the fewest tokens
    per problem. by_n: {n: results}."""
    enough = {n: results for n, results in by_n.items() if results["accuracy"] >= target}
    if not enough:
        return f"{name}: no N of {', '.join(by_n)} reaches {target:.1%}"
    speeds = {n: results["problems_per_second"] for n, results in enough.items()}
    if None in speeds.values():
        best = min(enough, key=lambda n: enough[n]["tokens_per_problem"])
        merit = "the fewest tokens"
    else:
        best = max(speeds, key=speeds.get)
        merit = f"the most problems per second ({speeds[best]:.1f})"
    low, high = enough[best]["accuracy_ci95"]
    return (f"{name}: at least {target:.1%} right with {merit}: N = {best}, "
            f"{enough[best]['accuracy']:.1%} right (95% interval {low:.1%} to {high:.1%}), "
            f"{enough[best]['tokens_per_problem']:.1f} tokens a problem")


def budget_report(s, results):
    """How much of what the model uses without a limit the budget of each N allows, as text.
    results: those of the evaluation before training, {name: {n: results}}."""
    lines = []
    for n, budget in zip(s.n, s.budget):
        measured = min(s.eval_n, key=lambda m: abs(m - n))  # n itself, if it was evaluated
        used = np.mean([by_n[str(measured)]["tokens_per_problem"] for by_n in results.values()])
        share = budget / n / used
        lines.append(f"at N = {measured} this model uses {used:.0f} tokens per problem without a "
                     f"limit; the budget at N = {n} allows {budget / n:.0f} ({share:.0%})")
        if share < 0.25:
            lines.append("warning: hardly anything can finish within such a budget: raise --budget")
        if share > 1:
            lines.append("warning: such a budget puts no pressure on the length: lower --budget, "
                         "unless this run is a control")
    return "\n".join(lines)


def plot(path, stages, within, metrics=()):
    """results.png: for each benchmark, tokens and accuracy over N (the task-scaling law) and
    accuracy over the position in the prompt; below them the training, from its metrics."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(stages.values())))
    rows = len(names) + bool(metrics)
    figure, axes = pyplot.subplots(rows, 3, figsize=(14, 3.8 * rows), squeeze=False)
    for row, name in zip(axes, names):
        for (stage, results), colour in zip(stages.items(), ("tab:gray", "tab:blue")):
            ns = [int(n) for n in results[name]]
            found = list(results[name].values())
            tokens = [r["tokens_per_problem"] for r in found]
            accuracy = [r["accuracy"] for r in found]
            low, high = np.transpose([r["accuracy_ci95"] for r in found])
            row[0].plot(ns, tokens, "o-", color=colour, label=stage)
            row[1].plot(ns, accuracy, "o-", color=colour, label=stage)
            row[1].fill_between(ns, low, high, color=colour, alpha=0.2)
            if within:
                cut = [r["accuracy_within"] for r in found]
                row[1].plot(ns, cut, "o--", color=colour, label=f"{stage}, {within} tokens")
            for n, r in zip(ns, found):
                row[2].plot(range(1, n + 1), r["accuracy_by_position"], ".-", color=colour,
                            alpha=0.2 + 0.8 * (n / max(ns)), label=f"{stage}, N = {n}")
        row[0].set(title=f"{name}: tokens per problem", xlabel="N problems in the prompt")
        row[1].set(title=f"{name}: accuracy", xlabel="N problems in the prompt")
        row[2].set(title=f"{name}: accuracy by position", xlabel="position in the prompt")
    steps = [m["step"] for m in metrics]
    shown = ["tokens_per_problem"], ["accuracy", "truncated"], ["entropy"]
    for axis, keys in zip(axes[-1] if metrics else (), shown):
        for key in keys:
            axis.plot(steps, [m[key] for m in metrics], label=key.replace("_", " "))
        axis.set(title="training", xlabel="step")
    for axis in axes.flat:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_group(out, step, rollout, advantages):
    """Writes one group in full, to be read: the first that is learned from."""
    _, G, N = rollout.correct.shape
    p = next((row // G for row, values in enumerate(advantages) if values.any()), 0)
    golds = ", ".join(problem["answer"] for problem in rollout.groups[p])
    mean = rollout.rewards[p].mean()
    lines = [
        f"step {step}: one group of {G} samples, N = {N}", "",
        batch_prompt(rollout.groups[p]), "",
        f"Answers: {golds}. Mean reward (the baseline): {mean:.3f}", ""]
    for g in range(G):
        row = p * G + g
        tokens = f"{len(rollout.completions[row].tokens)} tokens"
        if rollout.completions[row].truncated:
            tokens += ", truncated"
        right = " ".join("right" if mark else "wrong" for mark in rollout.correct[p, g])
        reward = f"{rollout.rewards[p, g]:.3f}"
        low = f"{advantages[row].min():+.3f}"
        high = f"{advantages[row].max():+.3f}"
        advantage = low if low == high else f"{low} to {high}"
        lines += [
            f"---- sample {g + 1}: {tokens}; {right}; reward {reward}; advantage {advantage}",
            rollout.texts[row], ""]
    (out / "samples").mkdir(exist_ok=True)
    write_text(out / f"samples/step-{step:06d}.txt", "\n".join(lines))


def training_warnings(metrics):
    """The ways in which a run silently learns nothing, {name: sentence}, as of the last step."""
    found = {}
    three = metrics[-3:]
    if metrics and metrics[-1]["truncated"] > 0.95 and metrics[-1]["accuracy"] < 0.1:
        found["truncated"] = (
            "nearly all completions are truncated by the budget, and nearly nothing is right: "
            "raise --budget or lower --n")
    if len(three) == 3 and all(m["zero_variance"] > 0.9 for m in three):
        found["equal"] = (
            "in over 90% of the groups all samples have the same reward, so every advantage is 0: "
            "use problems that are neither too easy nor too hard, raise --samples, or, if nothing "
            "is right, see in samples/ whether completions follow the format")
    if metrics and (metrics[-1]["entropy"] or 1) < (metrics[0]["entropy"] or 0) / 10:
        found["collapse"] = (
            "the entropy is less than a tenth of the first step's: lower --lr, or use an earlier "
            "checkpoint")
    return found
