"""Formats console output: log lines, scores, tables, advice."""

import datetime
from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

# The fraction of time waiting for data above which advice is printed.
INPUT_BOUND_ABOVE = 0.2


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

    Less important fields are dropped if the line exceeds `columns`.
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
    for name in DISPENSABLE:
        if columns is None or len("  ".join(parts.values())) <= columns:
            break
        parts.pop(name, None)
    return "  ".join(parts.values())


def format_scores(scores: Mapping[str, float | int]) -> dict[str, str]:
    """Returns {name: "90.1 ± 0.6 %"}: accuracies in percent, spreads beside them."""
    texts = {}
    for name, value in scores.items():
        leaf = name.rpartition("/")[2]
        spread = scores.get(f"{name}_sd")
        if leaf.endswith("_sd") or (leaf == "unreadable" and not value):
            continue
        if leaf.startswith(("accuracy", "control_")):
            middle = "" if spread is None else f" ± {100 * spread:.1f}"
            texts[name] = f"{100 * value:.1f}{middle} %"
        elif float(value).is_integer() and abs(value) >= 1:
            texts[name] = f"{value:,.0f}"
        else:
            middle = "" if spread is None else f" ± {spread:.4g}"
            texts[name] = f"{value:.4g}{middle}"
    return texts


def score_tables(scores: Mapping[str, float | int]) -> list[Table]:
    """Builds tables of the last scores: a row per group, transfer beside controls.

    Counts and chosen penalties are in metrics.jsonl only.
    """
    plain: dict[str, dict[str, str]] = {}
    controlled: dict[str, dict[str, str]] = {}
    texts = format_scores(scores)
    groups = {n.rpartition("/")[0] for n in texts if "/control_" in n}
    for name, text in texts.items():
        group, _, leaf = name.rpartition("/")
        if leaf.startswith("l2_chosen") or leaf in ("examples", "unreadable"):
            continue
        if leaf.startswith("control_") and leaf.endswith("_l2_chosen"):
            continue
        rows = controlled if group in groups else plain
        rows.setdefault(group, {})[_column(leaf)] = text
    for row in controlled.values():  # the unit is in the title: it must fit 80 columns
        row.update({column: text.removesuffix(" %") for column, text in row.items()})
    named = {"Scores": plain, "Scores beside their controls, in %": controlled}
    return [_table(title, rows) for title, rows in named.items() if rows]


def _table(title: str, rows: Mapping[str, Mapping[str, str]]) -> Table:
    columns = list(dict.fromkeys(leaf for row in rows.values() for leaf in row))
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("", *columns):
        table.add_column(column, no_wrap=True)
    for group, row in rows.items():
        table.add_row(Text(group), *(row.get(column, "") for column in columns))
    return table


def _column(leaf: str) -> str:
    """Returns "raw pixels" for "control_raw_pixels", "top 5" for "accuracy_top5"."""
    named = {"accuracy_top5": "top 5", "accuracy_l2_chosen": "l2 chosen"}
    return named.get(leaf, leaf.removeprefix("control_").replace("_", " "))


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
