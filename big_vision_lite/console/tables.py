"""Formats console output: log lines, scores, tables, advice."""

import datetime
import re
from collections.abc import Mapping, Sequence

from rich.cells import cell_len

# The fraction of time waiting for data above which advice is printed.
INPUT_BOUND_ABOVE = 0.2

# A score whose name ends with one of these words is a share in 0..1, shown in percent.
SHARES = ("accuracy", "recall", "precision")
CHOSEN = "_l2_chosen"

# Fields dropped in a narrow terminal, in this order.
DISPENSABLE = (
    "train/gradient_norm",
    "train/learning_rate",
    "mfu",
    "train/accuracy",
    "data_wait",
    "images_per_second",
    "train/loss",
)


def format_line(
    step: int,
    num_steps: int,
    metrics: Mapping[str, float | int],
    columns: int | None = None,
) -> str:
    """Returns "step  200/400  loss 0.1234  lr 1.0e-03  812 img/s ...".

    An objective's own metrics stand after the others. Less important fields are dropped
    if the line exceeds `columns`.
    """
    formats = (
        ("train/loss", lambda x: f"loss {x:.4f}"),
        ("train/accuracy", lambda x: f"acc {x:6.1%}"),
        ("train/learning_rate", lambda x: f"lr {x:.2e}"),
        ("train/gradient_norm", lambda x: f"grad {x:.3g}"),
        ("images_per_second", lambda x: f"{x:,.0f} img/s"),
        ("data_wait", lambda x: f"wait {x:.0%}"),
        ("mfu", lambda x: f"mfu {x:.1%}"),
        ("eta_seconds", lambda x: f"eta {datetime.timedelta(seconds=round(x))}"),
    )
    width = len(str(num_steps))
    parts = {"step": f"step {step:{width}d}/{num_steps}"}
    parts |= {name: text(metrics[name]) for name, text in formats if name in metrics}
    own = [n for n in metrics if n.startswith("train/") and n not in dict(formats)]
    for name in own:
        leaf = name.removeprefix("train/").replace("_", " ")
        parts[name] = f"{leaf} {metrics[name]:.3g}"
    for name in (*reversed(own), *DISPENSABLE):
        if columns is None or len("  ".join(parts.values())) <= columns:
            break
        parts.pop(name, None)
    return "  ".join(parts.values())


def format_scores(scores: Mapping[str, float | int]) -> dict[str, str]:
    """Returns {name: "90.1 ± 0.6 %"}: shares in percent, spreads beside them.

    A score is a share if the last word of its name says so ("accuracy",
    "mean_per_class_recall"); "_top5" and "_l2_chosen" may follow. A control has the
    unit of the scores in its group.
    """
    texts = {}
    shares = {name.rpartition("/")[0] for name in scores if _is_share(name)}
    for name, value in scores.items():
        group, _, leaf = name.rpartition("/")
        spread = scores.get(f"{name}_sd")
        if leaf.endswith("_sd") or (leaf == "unreadable" and not value):
            continue
        if _is_share(name) or (leaf.startswith("control_") and group in shares):
            middle = "" if spread is None else f" ± {100 * spread:.1f}"
            texts[name] = f"{100 * value:.1f}{middle} %"
        elif float(value).is_integer() and abs(value) >= 1:
            texts[name] = f"{value:,.0f}"
        else:
            middle = "" if spread is None else f" ± {spread:.4g}"
            texts[name] = f"{value:.4g}{middle}"
    return texts


def _is_share(name: str) -> bool:
    leaf = re.sub(rf"({CHOSEN}|_top\d+)$", "", name.rpartition("/")[2])
    return leaf.rpartition("_")[2] in SHARES


def score_tables(
    scores: Mapping[str, float | int], columns: int | None = None
) -> list[str]:
    """Returns tables of the last scores: a row per group, transfer beside controls.

    Scores at a chosen penalty have a row of their own, beside controls at the penalties
    chosen for these. Counts and penalties are in metrics.jsonl only. A table wider than
    `columns` is stacked.
    """
    plain: dict[str, dict[str, str]] = {}
    controlled: dict[str, dict[str, str]] = {}
    texts = format_scores(scores)
    groups = {n.rpartition("/")[0] for n in texts if "/control_" in n}
    for name, text in texts.items():
        group, _, leaf = name.rpartition("/")
        if leaf.startswith("l2_chosen") or leaf in ("examples", "unreadable"):
            continue
        rows = controlled if group in groups else plain
        if leaf.endswith(CHOSEN):
            group, leaf = f"{group}, l2 chosen", leaf.removesuffix(CHOSEN)
        rows.setdefault(group, {})[_column(leaf)] = text
    cells = [text for row in controlled.values() for text in row.values()]
    title = "Scores beside their controls"
    if all(text.endswith(" %") for text in cells):
        title += ", in %"
        for row in controlled.values():
            row.update(
                {column: text.removesuffix(" %") for column, text in row.items()}
            )
    named = {"Scores": plain, title: controlled}
    return [format_table(t, rows, columns) for t, rows in named.items() if rows]


def format_table(
    title: str, rows: Mapping[str, Mapping[str, str]], columns: int | None = None
) -> str:
    """Returns the rows {name: {column: text}} as lines of aligned columns.

    No text is shortened or broken: if a line is longer than `columns`, each text gets a
    line below the name of its row.
    """
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    lines = [["", *heads]]
    lines += [
        [name, *(row.get(head, "") for head in heads)] for name, row in rows.items()
    ]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    if columns is None or sum(widths) + 2 * len(heads) <= columns:
        return "\n".join([title, *(_aligned(line, widths) for line in lines)])
    stacked = [title]
    widths = [2, max(map(cell_len, heads)), 0]
    for name, row in rows.items():
        stacked.append(name)
        stacked += [_aligned(["", head, text], widths) for head, text in row.items()]
    return "\n".join(stacked)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell + " " * (width - cell_len(cell))
        for cell, width in zip(cells, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _column(leaf: str) -> str:
    """Returns "raw pixels" for "control_raw_pixels", "top 5" for "accuracy_top5"."""
    top = re.fullmatch(r"accuracy_top(\d+)", leaf)
    return f"top {top[1]}" if top else leaf.removeprefix("control_").replace("_", " ")


def input_bound_message(
    wait: float,
    steps: int,
    stages: Mapping[str, tuple[float, int]],
    threads: int,
    cores: int,
) -> str | None:
    """Returns advice if waiting for data took more than a fifth of the time.

    `wait` is the fraction of time over the last `steps`; `stages` maps a stage to its
    seconds and images, summed over threads; `cores` is the number of CPU cores
    available.
    """
    if wait <= INPUT_BOUND_ABOVE:
        return None
    text = f"Input-bound: {wait:.0%} of the last {steps} steps was waiting for data."
    cost = {name: s / images for name, (s, images) in stages.items() if images}
    if cost:
        slowest = max(cost, key=lambda name: cost[name])
        milliseconds = 1e3 * cost[slowest]
        text += f" Slowest stage: {slowest} ({milliseconds:.1f} ms/img, "
        text += f"{threads} threads)."
    if threads < cores:
        text += (
            f" {cores - threads} of {cores} cores are free: "
            f"--config.data.threads={cores}"
        )
    else:
        text += (
            f" All {cores} cores are taken: store smaller images, choose cheaper ops, "
            "or give the run more cores."
        )
    return text
