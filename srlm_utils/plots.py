"""The kit's figures. Each takes tidy rows and returns (figure, rows drawn), `overlay` the figure; `save` keeps both.

One colour and one marker a model, everywhere (Okabe and Ito's palette, safe for colour-blind readers).
Rates are shown in %, with 95 % intervals and n.
"""

from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import to_rgb
from PIL import Image

from srlm_utils import rendered
from srlm_utils.lineage import is_of_run
from srlm_utils.metrics import MIN_PAIRS
from srlm_utils.verdicts import judge_label

_COLORS = ["#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"]  # M1, M2, M3, ...
_MARKERS = ["o", "s", "^", "D", "v", "P"]

# why a prompt or a pair was dropped (`self_instruct.check_prompt`, `pairs.build_pairs`, `pairs.build_positives`)
_DROPS = {
    "not_needed": "more than wanted",
    "unfinished": "cut off",
    "too_short": "too short",
    "too_long": "too long",
    "not_text": "no plain text",
    "keyword": "asks for pictures, files, links",
    "duplicate": "there already",
    "similar": "too like another",
    "few_scored": "too few answers with a score",
    "tie": "all scores alike",
    "small_margin": "scores too near",
    "none_ended": "no answer that ended wins",
    "same_text": "both answers the same",
    "empty_chosen": "the better answer is empty",
    "same_length": "answers of one length",
    "other_form": "no pair of one form",
    "rewards_disagree": "implicit reward disagrees",
    "low_score": "no score is high enough",
}


def color(model: str) -> str:
    """The colour of a model; grey for M0, orange for the SFT baseline."""
    return {"M0": "#999999", "SFT": "#E69F00"}.get(model) or _COLORS[(int(model[1:]) - 1) % len(_COLORS)]


def marker(model: str) -> str:
    return {"M0": "X", "SFT": "p"}.get(model) or _MARKERS[(int(model[1:]) - 1) % len(_MARKERS)]


def use_style() -> None:
    """Set the look of all figures."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 150,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "figure.facecolor": "white",
        }
    )


def save(fig, data: pd.DataFrame, folder: Path, name: str) -> None:
    """`name`.png, in a palette (`rendered.palette`), and the `name`.csv it was drawn from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    fig.savefig(path)
    with Image.open(path) as image:
        small = rendered.palette(image)
    small.save(path, optimize=True, dpi=(plt.rcParams["savefig.dpi"],) * 2)
    data.to_csv(folder / f"{name}.csv", index=False)


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Figures and bounds as floats: where nothing has an interval, as over one prompt, the bounds are objects."""
    return table.astype({name: float for name in ("value", "low", "high") if name in table})


def agreement(metrics: pd.DataFrame):
    """Pairwise accuracy on held-out rankings: one row of panels per set, one column per judge mode.

    Beside chance, beside "longer wins" and, in points, beside M0 on the same pairs. Models with fewer
    than `MIN_PAIRS` scored pairs (a judge that can hardly be parsed) are named, not drawn.
    """
    metrics = _numbers(metrics)
    acc = metrics[metrics.metric == "pairwise_accuracy"]
    sets, modes = sorted(acc.set.unique()), sorted(acc.judge_mode.unique())
    # not every model is measured in every mode; "longer wins" is written behind the last
    widths = [0.75 * acc[acc.judge_mode == mode].model.nunique() + 1.1 for mode in modes] or [2.0]
    fig, axes = plt.subplots(
        max(len(sets), 1),
        max(len(modes), 1),
        figsize=(1.0 + sum(widths), 0.5 + 3.3 * max(len(sets), 1)),
        gridspec_kw={"width_ratios": widths},
        sharey=True,
        squeeze=False,
    )
    for (i, set_name), (j, mode) in product(enumerate(sets), enumerate(modes)):
        _agreement_panel(axes[i][j], metrics[(metrics.set == set_name) & (metrics.judge_mode == mode)])
        axes[i][j].set_title(f"{set_name}, {mode}")
        axes[i][0].set_ylabel("pairs ordered as ranked,\n% of untied")
    fig.suptitle("Reward agreement with held-out rankings (95 % intervals over prompts)", fontsize=11)
    return fig, acc


def _agreement_panel(ax, metrics: pd.DataFrame) -> None:
    rows = metrics[metrics.metric == "pairwise_accuracy"].reset_index(drop=True)
    ties = metrics[metrics.metric == "tie_rate"].set_index("model").value
    gains = metrics[(metrics.metric == "agreement_gain") & (metrics.opponent == "M0")].set_index("model")
    # replies without a score count half, so a gain over an M0 that writes none is one over chance
    silent = (rows.n[rows.model == "M0"] < MIN_PAIRS).any()
    labels = []
    for x, row in rows.iterrows():
        if row.n < MIN_PAIRS:
            labels.append(f"{row.model}\n{row.n} pair{'s' * (row.n != 1)}\ntoo few")
            continue
        _interval(ax, row, x, upright=True, scale=100, **_look(row.model))
        labels.append(f"{row.model}\n{row.n} pairs\nties {100 * ties[row.model]:.0f} %")
        if row.model in gains.index:
            g = gains.loc[row.model]
            labels[-1] += (
                f"\nvs {'chance' if silent else 'M0'} {100 * g.value:+.0f}\n[{100 * g.low:+.0f}, {100 * g.high:+.0f}]"
            )
    # on the most pairs that any model could be measured on
    longer = metrics[metrics.metric == "longer_baseline"].sort_values("n").value.iloc[-1]
    lines = sorted([(50.0, "--", "chance"), (100 * longer, ":", "longer wins")])
    apart = 0 if lines[1][0] - lines[0][0] > 6 else 3
    for (level, style, label), shift in zip(lines, (-apart, apart), strict=True):
        ax.axhline(level, color="#555555", lw=1, ls=style)
        ax.text(len(rows) - 0.35, level + shift, label, va="center", fontsize=8, color="#555555")
    ax.set_xticks(range(len(rows)), labels, fontsize=8)
    ax.set_xlim(-0.6, len(rows) - 0.4)
    ax.set_ylim(0, 100)


def calibration(table: pd.DataFrame, model: str):
    """Mean place of replies by their score (`evaluate.calibration`); one panel per set, one line per judge mode."""
    table = _numbers(table)
    sets, modes = sorted(table.set.unique()), sorted(table.judge_mode.unique())
    fig, axes = _grid(len(sets), len(sets), 3.4, 3.4, (1, 0), sharey=True)
    for ax, name in zip(axes, sets, strict=True):
        for i, mode in enumerate(modes):
            rows = table[(table.set == name) & (table.judge_mode == mode)]
            x = rows.score + 0.2 * (i - (len(modes) - 1) / 2)
            spread = [(rows.value - rows.low).fillna(0), (rows.high - rows.value).fillna(0)]
            style = {"color": color(model), "ls": ("-", "--", ":")[i], "mfc": (color(model), "white", "#cccccc")[i]}
            ax.errorbar(x, rows.value, yerr=spread, fmt=marker(model), capsize=3, label=mode, **style)
        n = table[table.set == name].pivot(index="judge_mode", columns="score", values="n").reindex(modes).fillna(0)
        ax.set_xticks(
            range(6), ["\n".join([str(s), *(f"{k:.0f}" for k in n.get(s, [0] * len(modes)))]) for s in range(6)]
        )
        ax.axhline(0.5, color="#555555", lw=1, ls=":")
        ax.set_title(name)
        ax.set_xlim(-0.4, 5.4)
        ax.set_ylim(1.05, -0.05)
    axes[0].set_ylabel("mean place in the ranking\n(0 best, 1 worst of its prompt)")
    fig.supxlabel(f"score, rounded; below it n replies ({', '.join(modes)})", fontsize=9)
    if len(modes) > 1:
        fig.legend(*axes[0].get_legend_handles_labels(), title="judge mode", fontsize=8, loc="outside right center")
    fig.suptitle(f"Does a higher score of {model} mean a better rank? (95 % intervals over prompts)", fontsize=11)
    return fig, table


def win_rates(metrics: pd.DataFrame):
    """Win, tie and loss of each model against those before it; one panel per judge."""
    metrics = _numbers(metrics)
    h2h = metrics[metrics.metric.isin(["win", "tie", "loss", "win_rate"])]
    judges, pairs = _judges(h2h), _duels(h2h)
    fig, axes = _panels(len(judges), 5.6, 1.4 + 0.34 * len(pairs))
    for ax, (judge, mode) in zip(axes, judges, strict=False):
        table = h2h[(h2h.judge == judge) & (h2h.judge_mode == mode)].set_index(["model", "opponent", "metric"])
        for y, (m, o) in enumerate(pairs):
            if (m, o, "win") not in table.index:
                continue
            left, n = 0.0, int(table.loc[(m, o, "win"), "n"])
            for part, shade, ink in (
                ("win", color(m), _ink(color(m))),
                ("tie", "#d9d9d9", _ink("#d9d9d9")),
                ("loss", color(o), _ink(color(o))),
            ):
                width = 100 * table.loc[(m, o, part), "value"]
                hatch = "//" if part == "loss" else None
                ax.barh(y, width, left=left, color=shade, height=0.72, hatch=hatch, edgecolor="white", lw=0.6)
                if width >= 9:
                    box = {"facecolor": shade, "edgecolor": "none", "pad": 1}
                    ax.text(
                        left + width / 2, y, f"{width:.0f}", ha="center", va="center", fontsize=8, color=ink, bbox=box
                    )
                left += width
            rate = table.loc[(m, o, "win_rate")]
            ax.plot([100 * rate.low, 100 * rate.high], [y - 0.42] * 2, color="black", lw=1.4, clip_on=False)
            ax.plot(100 * rate.value, y - 0.42, "k|", markersize=6, clip_on=False)
            ax.text(101, y, f"n={n}", fontsize=7, va="center")
        ax.axvline(50, color="black", lw=0.8, ls="--")
        ax.set_xlim(0, 100)
        ax.grid(False)
        ax.set_title(f"judge: {judge_label(judge, mode)}", fontsize=9)
        ax.set_xlabel(
            "% of prompts: win | tie | loss (hatched); black: win rate\nwith half ties, 95 % interval", fontsize=8
        )
        ax.set_yticks(range(len(pairs)), [f"{m} vs {o}" for m, o in pairs], fontsize=9)
    fig.suptitle("Head-to-head on test prompts", fontsize=11)
    return fig, h2h


def overlay(rows: pd.DataFrame, runs: list[str], label: str, factor: float):
    """One metric of several runs: one panel per set, judge and judge mode, runs side by side at each model or duel.

    `rows` have `run` and the columns of metrics.csv. A run has a colour and a marker; intervals where there are any.
    """
    rows = _numbers(rows)
    who = rows.judge.where(rows.set == "test_prompts", "itself")  # on ranked sets each model is the judge
    keys = rows.assign(who=who).groupby(["judge_mode", "set", "who"])
    fig, axes = _grid(len(keys), 3, 3.8, 3.2, (1, 0.3), sharey=True)
    for ax, ((mode, set_name, judge), part) in zip(axes, keys, strict=True):
        names = part.model.where(part.opponent == "", part.model + "\nvs " + part.opponent)
        places = {name: x for x, name in enumerate(dict.fromkeys(names))}
        for i, run in enumerate(runs):
            mine = part[part.run == run]
            x = [places[n] + 0.5 * ((i + 0.5) / len(runs) - 0.5) for n in names[mine.index]]
            spread = [(mine.value - mine.low).fillna(0) * factor, (mine.high - mine.value).fillna(0) * factor]
            style = {
                "color": _COLORS[i % len(_COLORS)],
                "fmt": _MARKERS[i % len(_MARKERS)],
                "capsize": 3,
                "markersize": 6,
            }
            ax.errorbar(x, mine.value * factor, yerr=spread, label=run, **style)
        ax.set_xticks(range(len(places)), list(places), fontsize=8)
        ax.set_xlim(-0.6, len(places) - 0.4)
        ax.set_title(", ".join(filter(None, (set_name, judge and f"judge: {judge}", mode))), fontsize=9)
        if label.startswith("win rate"):
            ax.axhline(50, color="#555555", lw=1, ls="--")
    for ax in axes[::3]:
        ax.set_ylabel(label)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return fig


def answers(metrics: pd.DataFrame):
    """Length, own endings, repetition and lists of the test answers by model."""
    panels = [
        ("answer_chars", "mean length, characters", 1),
        ("ended_rate", "ended by themselves, %", 100),
        ("repeated_4grams", "repeated 4-grams, %", 100),
        ("list_rate", "with a list, %", 100),
    ]
    data = metrics[metrics.metric.isin([p[0] for p in panels])]
    panels = [p for p in panels if p[0] in {*data.metric}] or panels[:1]  # runs of before have no list_rate
    fig, axes = _grid(len(panels), len(panels), 2.8, 3.1)
    for ax, (name, label, scale) in zip(axes, panels, strict=True):
        rows = data[data.metric == name].reset_index(drop=True)
        for x, r in rows.iterrows():
            _interval(ax, r, x, upright=True, scale=scale, **_look(r.model))
        n = _models_with_n(ax, rows)
        ax.set_ylim(bottom=0)
        ax.set_title(f"{label}  ({n})" if n else label, fontsize=9)
    fig.suptitle("Test answers, judged by nobody (95 % intervals over prompts)", fontsize=11)
    return fig, data


def mean_scores(metrics: pd.DataFrame):
    """Mean score of the test answers by each scoring judge."""
    data = metrics[(metrics.metric == "mean_score") & metrics.value.notna()]
    judges = sorted(data.judge.unique(), key=is_of_run)  # those from outside first
    fig, axes = _panels(len(judges), 4.4, 3.1)
    for ax, judge in zip(axes, judges, strict=False):
        rows = data[data.judge == judge].reset_index(drop=True)
        for x, r in rows.iterrows():
            _interval(ax, r, x, upright=True, **_look(r.model))
        n = _models_with_n(ax, rows)
        ax.set_title(f"judge: {judge_label(judge)}{n and ', '}{n}", fontsize=9)
        ax.set_ylim(0, 5)
        ax.set_ylabel("mean score, 0 to 5")
    fig.suptitle("Score of the test answers (95 % intervals over prompts)", fontsize=11)
    return fig, data


def score_histogram(scores: pd.DataFrame, title: str = "What each model thought of its own candidates"):
    """Scores of the candidates, one panel per model that wrote them; `scores` has columns model and score."""
    models = [m for m in scores.model.unique() if is_of_run(m)]
    fig, axes = _panels(len(models), 4.2, 2.9)
    for ax, m in zip(axes, models, strict=False):
        values = scores[scores.model == m].score.dropna()
        ax.hist(values, bins=[i / 4 for i in range(21)], color=color(m), edgecolor="white")
        ax.set_title(f"{m}: mean {values.mean():.2f}, std {values.std():.2f}, n={len(values)}", fontsize=9)
        ax.set_xlabel("score, 0 to 5")
    axes[0].set_ylabel("candidates")
    fig.suptitle(title, fontsize=11)
    return fig, scores


def funnel(steps: pd.DataFrame):
    """From attempts to pairs: what is left and what was dropped, one panel per round.

    `steps` has columns model, stage, n, and drop ("" for what is kept, else the reason).
    """
    models = list(dict.fromkeys(steps.model))
    labels = {
        m: [f"  – {_DROPS.get(r.drop, r.drop)}" if r.drop else r.stage for r in steps[steps.model == m].itertuples()]
        for m in models
    }
    height = 1 + 0.27 * max((len(v) for v in labels.values()), default=1)
    fig, axes = _grid(max(len(models), 1), max(len(models), 1), 5.0, height)
    for ax, m in zip(axes, models, strict=False):
        rows = steps[steps.model == m].reset_index(drop=True)
        shades = [color(m) if not d else "#c9c9c9" for d in rows["drop"]]
        ax.barh(range(len(rows)), rows.n, color=shades)
        for y, n in enumerate(rows.n):
            ax.text(n, y, f" {n}", va="center", fontsize=8)
        ax.set_yticks(range(len(rows)), labels[m], fontsize=8)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xlim(0, 1.12 * max(rows.n.max(), 1))
        ax.set_title(f"round of {m}", fontsize=10)
    fig.suptitle("From written prompts to pairs, every drop counted", fontsize=11)
    return fig, steps


def training(logs: pd.DataFrame):
    """Losses by optimizer step: points, and the mean of a twentieth of the steps up to there, three at least.

    `logs` has columns model and step and what the trainer logged: the parts of the supervised loss and the share
    of ranked replies it orders right, or for DPO loss, rewards/accuracies, rewards/margins and, where it has them,
    rewards/chosen with rewards/rejected: a margin also grows where both fall.
    """
    titles = {
        "text_loss": "loss of answers and justifications",
        "score_loss": "loss of score digits",
        "rank_accuracy": "training replies ordered right, %",
        "loss": "loss",
        "rewards/accuracies": "pairs ordered right, %",
        "rewards/margins": "reward margin",
        "rewards/chosen": "reward of chosen, and (dashed) rejected",
    }
    # what a model that has learned nothing has
    nothing = {"rewards/accuracies": 0.5, "rewards/margins": 0.0, "rewards/chosen": 0.0}
    panels = [c for c in titles if c in logs and logs[c].notna().any()]
    if "text_loss" in panels:  # its sum with the others says nothing that the parts do not
        panels.remove("loss")
    fig, axes = _grid(len(panels), 2 if len(panels) == 4 else 3, 4.2, 3)
    for ax, column in zip(axes, panels, strict=True):
        scale = 100 if titles[column].endswith("%") else 1
        for m in dict.fromkeys(logs.model):
            rows = logs[(logs.model == m) & logs[column].notna()]
            if column == "rewards/accuracies":  # at first model and reference are one: no pair can be right
                rows = rows[rows["rewards/margins"].abs() > 1e-6]
            if len(rows):
                values = rows[column] * scale
                window = max(3, len(rows) // 20)
                smooth = values.rolling(window, min_periods=1).mean()
                ax.plot(rows.step, values, color=color(m), marker=marker(m), markersize=2, lw=0, alpha=0.35)
                ax.plot(rows.step, smooth, color=color(m), lw=1.6, label=m)
                if column == "rewards/chosen" and "rewards/rejected" in rows:
                    other = rows["rewards/rejected"].rolling(window, min_periods=1).mean()
                    ax.plot(rows.step, other, color=color(m), lw=1.6, ls="--")
        if column in nothing:
            ax.axhline(nothing[column] * scale, color="#555555", lw=1, ls=":")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("optimizer step")
        ax.set_title(titles[column], fontsize=10)
        ax.legend(fontsize=8)
    fig.suptitle(
        "Training (points: one batch; lines: mean of the last 5 % of steps, 3 at least; dotted: an untrained model)",
        fontsize=11,
    )
    return fig, logs


def selection(table: pd.DataFrame, model: str, judge: str):
    """Win rate of each checkpoint against the one compared before it; the kept one is filled.

    `table` is `checkpoints.Selection.table`, `judge` a win judge as parameters name it.
    """
    fig, ax = plt.subplots(figsize=(max(5.0, 1.6 + 0.45 * len(table)), 3.2))
    ax.plot(table.step, 100 * table.win_rate, color=color(model), lw=1, alpha=0.5)
    for row in table.to_dict("records"):
        style = _look(model) | {"mfc": color(model) if row["kept"] else "white"}
        _interval(ax, row | {"value": row["win_rate"]}, row["step"], upright=True, scale=100, **style)
    kept = table[table.kept].iloc[0]
    ax.annotate("kept", (kept.step, 100 * kept.win_rate), (6, 6), textcoords="offset points", fontsize=8)
    ax.axhline(50, color="#555555", lw=1, ls="--")
    ax.set_ylim(-3, 103)
    ax.set_xticks(table.step if len(table) <= 12 else table.step[:: -(-len(table) // 12)])
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("wins against the checkpoint\nbefore, % (half ties)")
    name, _, mode = judge.rpartition(":")
    asked = f"{kept.n} validation prompts, 95 % intervals"
    fig.suptitle(f"Which step of {model} is kept? {asked}\njudge: {judge_label(name, mode)}", fontsize=9)
    return fig, table


def length_control(metrics: pd.DataFrame):
    """Win rates as judged, without the effect of length, among answers of similar length; one panel per judge."""
    kinds = {
        "win_rate": ("as judged", "o"),
        "win_rate_length_controlled": ("length-controlled", "D"),
        "win_rate_similar_length": ("similar lengths only", "s"),
    }
    data = metrics[metrics.metric.isin(kinds) & metrics.value.notna()]
    judges, pairs = _judges(data), _duels(data)
    fig, axes = _panels(len(judges), 4.8, 1.5 + 0.42 * len(pairs))
    for ax, (judge, mode) in zip(axes, judges, strict=False):
        table = data[(data.judge == judge) & (data.judge_mode == mode)].set_index(["model", "opponent", "metric"])
        for y, (m, o) in enumerate(pairs):
            for i, (kind, (_, shape)) in enumerate(kinds.items()):
                if (m, o, kind) in table.index:
                    row = table.loc[(m, o, kind)]
                    _interval(
                        ax,
                        row,
                        y + 0.24 - 0.24 * i,
                        scale=100,
                        fmt=shape,
                        color=color(m),
                        mfc=color(m) if i == 0 else "white",
                    )
                    ax.text(103, y + 0.24 - 0.24 * i, f"n={row.n:.0f}", fontsize=6.5, va="center", clip_on=False)
        ax.axvline(50, color="black", lw=0.8, ls="--")
        ax.set_xlim(-2, 102)
        ax.set_ylim(-0.6, len(pairs) - 0.4)
        ax.set_yticks(range(len(pairs)), [f"{m} vs {o}" for m, o in pairs], fontsize=9)
        ax.set_title(f"judge: {judge_label(judge, mode)}", fontsize=9)
        ax.set_xlabel("win rate, half ties, % (95 % interval)", fontsize=9)
    handles = [
        plt.Line2D([], [], color="#333333", ls="", marker=s, mfc="#333333" if i == 0 else "white", label=name)
        for i, (name, s) in enumerate(kinds.values())
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    fig.suptitle("Is it length? Win rates with and without its effect", fontsize=11)
    return fig, data


def ratings(table: pd.DataFrame):
    """Bradley-Terry ratings on the Elo scale, one panel per judge.

    `table` has judge, judge_mode, model, value, low, high, n.
    """
    judges = _judges(table)
    fig, axes = _panels(len(judges), 4.4, 3.1)
    for ax, (judge, mode) in zip(axes, judges, strict=False):
        rows = table[(table.judge == judge) & (table.judge_mode == mode)].reset_index(drop=True)
        for y, row in rows.iterrows():
            _interval(ax, row, y, **_look(row.model))
        ax.axvline(0, color="#555555", lw=1, ls="--")
        ax.set_yticks(range(len(rows)), [f"{r.model}\n{r.n:.0f} comparisons" for r in rows.itertuples()], fontsize=8)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_title(f"judge: {judge_label(judge, mode)}", fontsize=9)
        ax.set_xlabel("rating, Elo points (M0 is 0)", fontsize=9)
    fig.suptitle("Ratings from all comparisons (95 % intervals over prompts)", fontsize=11)
    return fig, table


def categories(table: pd.DataFrame):
    """Win rate of one model against another by kind of prompt and by length of the prompt's answers.

    `table` has judge, judge_mode, model, opponent, by ("category" or "length"), group, value, low, high, n.
    """
    judges = _judges(table)
    groups = list(dict.fromkeys(table.group))[::-1]
    n_lengths = table[table.by == "length"].group.nunique()
    fig, axes = _panels(len(judges), 4.6, 1.3 + 0.26 * len(groups))
    for ax, (judge, mode) in zip(axes, judges, strict=False):
        rows = table[(table.judge == judge) & (table.judge_mode == mode)].set_index("group")
        for y, group in enumerate(groups):
            if group in rows.index:
                row = rows.loc[group]
                _interval(ax, row, y, scale=100, fmt=marker(row.model), color=color(row.model))
                ax.text(103, y, f"n={row.n:.0f}", fontsize=7, va="center", clip_on=False)
        ax.axvline(50, color="black", lw=0.8, ls="--")
        if n_lengths:
            ax.axhline(n_lengths - 0.5, color="#999999", lw=0.8)
        ax.set_xlim(-2, 102)
        ax.set_yticks(range(len(groups)), groups, fontsize=8)
        ax.set_title(f"judge: {judge_label(judge, mode)}", fontsize=9)
        ax.set_xlabel("win rate, half ties, % (95 % interval)", fontsize=9)
    first = table.iloc[0]
    fig.suptitle(f"{first.model} against {first.opponent} by kind of prompt and by length of answers", fontsize=11)
    return fig, table


def answer_lengths(lengths: pd.DataFrame):
    """Distribution of the test answers' lengths: quartiles, whiskers to the 5th and 95th per cent, the mean as a mark.

    `lengths` has model and chars.
    """
    models = list(dict.fromkeys(lengths.model))
    fig, ax = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(models)))
    values = [lengths[lengths.model == m].chars for m in models]
    boxes = ax.boxplot(
        values,
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        widths=0.55,
        medianprops={"color": "black"},
    )
    for y, (m, box, v) in enumerate(zip(models, boxes["boxes"], values, strict=True), 1):
        box.set(facecolor=color(m), alpha=0.55)
        ax.plot(v.mean(), y, marker=marker(m), color=color(m), mec="black", markersize=7)
    ax.set_yticks(range(1, len(models) + 1), [f"{m}  n={len(v)}" for m, v in zip(models, values, strict=True)])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("characters: box quartiles, line median, mark mean, whiskers 5 to 95 %")
    fig.suptitle("How long are the test answers?", fontsize=11)
    return fig, lengths


def judge_agreement(table: pd.DataFrame):
    """Cohen's kappa of every two win judges; `table` has first, second (labels), value, low, high, n."""
    fig, ax = plt.subplots(figsize=(7.2, 1.1 + 0.5 * len(table)))
    for y, row in table.reset_index(drop=True).iterrows():
        _interval(ax, row, y, fmt="o", color="#333333")
    ax.axvline(0, color="#555555", lw=1, ls="--")
    ax.set_yticks(
        range(len(table)),
        [f"{r['first']}\nand {r['second']}\n{r['n']:.0f} verdicts" for r in table.to_dict("records")],
        fontsize=8,
    )
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlim(-0.5, 1)
    ax.set_xlabel("Cohen's kappa (win, tie, loss): 0 chance, 1 the same")
    fig.suptitle("Do the judges agree? (95 % intervals over prompts)", fontsize=11)
    return fig, table


def variants(table: pd.DataFrame, title: str):
    """Figures of a sweep's variants with their intervals, a panel each, three in a row; single seeds as grey dots.

    `table` has panel, name (of a row), model, seed ("" over all), n_seeds, value, low, high, n and unit.
    """
    panels, names = list(dict.fromkeys(table.panel)), list(dict.fromkeys(table.name))
    fig, axes = _grid(len(panels), 3, 3.4, 0.8 + 0.42 * len(names), (0.8, 0.6), sharey=True)
    for ax, panel in zip(axes, panels, strict=True):
        rows = table[table.panel == panel]
        scale, label, same = {
            "share": (100, "win rate, half ties, %", 50),
            "share difference": (100, "difference, points", 0),
            "times": (1, "times the opponent's", 1),
        }[rows.unit.iloc[0]]
        for row in rows.to_dict("records"):
            y = names.index(row["name"])
            if row["seed"]:
                ax.plot(scale * row["value"], y + 0.22, ".", color="#999999")
            else:
                _interval(ax, row, y, scale=scale, fmt=marker(row["model"]), color=color(row["model"]))
                n = f"n={row['n']} in\n{row['n_seeds']} seed{'s' * (row['n_seeds'] > 1)}"
                ax.text(1.01, y, n, transform=ax.get_yaxis_transform(), fontsize=7, va="center")
        ax.axvline(same, color="black", lw=0.8, ls="--")
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_ylim(len(names) - 0.5, -0.5)
        if same == 50:
            ax.set_xlim(-2, 102)
        ax.set_title(panel, fontsize=9)
        ax.set_xlabel(label, fontsize=8)
    fig.suptitle(f"{title}\n95 % intervals over prompts and seeds;\nwith one seed over prompts only", fontsize=9)
    return fig, table


def _judges(table: pd.DataFrame) -> list[tuple[str, str]]:
    return list(table[["judge", "judge_mode"]].drop_duplicates().itertuples(index=False))


def _duels(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(model, opponent), the first of the table last: drawn from below, it stands on top."""
    return list(table[["model", "opponent"]].drop_duplicates().itertuples(index=False))[::-1]


def _panels(n: int, width: float, height: float):
    """A row of `n` panels with one y axis, at least one of them."""
    return _grid(max(n, 1), max(n, 1), width, height, (0.8, 0), sharey=True)


def _grid(n: int, most: int, width: float, height: float, more: tuple[float, float] = (0, 0), *, sharey: bool = False):
    """`n` panels, `most` of them in a row; `more` inches beside and above them. The figure and its panels."""
    across = min(n, most)
    down = -(-n // across)
    size = (max(width * across + more[0], 5), height * down + more[1])  # a title needs 5
    fig, axes = plt.subplots(down, across, figsize=size, sharey=sharey, squeeze=False)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return fig, axes.flat[:n]


def _ink(shade: str) -> str:
    """Black or white, whichever can be read on a colour: by its relative luminance (WCAG 2)."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(shade)]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    return "black" if luminance > 0.179 else "white"  # there both have the same contrast


def _models_with_n(ax, rows: pd.DataFrame) -> str:
    """Models below the axis; n for the title if all have the same, otherwise each has its own below it, and ""."""
    one = rows.n.nunique() <= 1
    ax.set_xticks(range(len(rows)), rows.model if one else [f"{r.model}\nn={r.n}" for r in rows.itertuples()])
    ax.set_xlim(-0.6, len(rows) - 0.4)
    return f"n={rows.n.iloc[0] if len(rows) else 0}" if one else ""


def _look(model: str) -> dict:
    return {"fmt": marker(model), "color": color(model), "markersize": 7}


def _interval(ax, row, place: float, *, upright: bool = False, scale: float = 1, **style) -> None:
    """One figure at `place` as a point with its interval, if it has one."""
    value = scale * row["value"]
    low, high = (value if pd.isna(row[k]) else scale * row[k] for k in ("low", "high"))
    spread = [[max(value - low, 0)], [max(high - value, 0)]]
    if upright:
        ax.errorbar(place, value, yerr=spread, capsize=3, **style)
    else:
        ax.errorbar(value, place, xerr=spread, capsize=3, **style)
