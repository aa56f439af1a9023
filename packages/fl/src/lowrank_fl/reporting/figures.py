"""Figures for a page, as SVG that takes the page's colours."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from lowrank_fl.reporting.groups import Group
from lowrank_fl.reporting.interval import interval_of
from lowrank_fl.reporting.show import by_setting
from lowrank_fl.reporting.text import three_digits

# Placeholders that the page's stylesheet gives their colours, light or dark.
_INK = "#010203"
_SERIES = tuple(f"#0a0b{number:02x}" for number in range(7))
DASHES = ("", "6 3", "2 3", "8 3 2 3")
_SIZE = (6.4, 3.9)


@dataclass(frozen=True)
class Key:
    """A line of a legend, which stands in the page as text."""

    label: str
    series: int

    @property
    def colour(self) -> int:
        return self.series % len(_SERIES)

    @property
    def dash(self) -> str:
        return DASHES[self.series // len(_SERIES) % len(DASHES)]


@dataclass(frozen=True)
class Drawing:
    """A figure of the page."""

    title: str
    caption: str
    alternative: str
    """The figure in words, for who cannot see it."""
    svg: str
    keys: tuple[Key, ...]


def draw_all(groups: Sequence[Group], rates: Sequence[float]) -> list[Drawing]:
    """The figures that these runs have the data for, setting by setting."""
    drawings: list[Drawing | None] = []
    for setting, members in by_setting(groups).items():
        drawings += [
            accuracy_against_bytes(setting, members),
            gamma_sweep(setting, members),
            personalisation(setting, members),
            seconds_a_round(setting, members, rates),
        ]
    return [drawing for drawing in drawings if drawing is not None]


def accuracy_against_bytes(setting: str, groups: Sequence[Group]) -> Drawing | None:
    """Accuracy over gigabytes as in the paper's Figure 3: seeds as their mean, with a 95 % band."""
    groups = [group for group in groups if group.total_bytes()]
    if not groups:
        return None
    title = f"{setting}: accuracy against traffic"
    axes, finish = _axes(title, "MB sent, up and down, all clients", "accuracy, %")
    for number, group in enumerate(groups):
        rounds = list(zip(*([row.accuracy for row in run.rows] for run in group.runs), strict=False))
        sent = [sum(values) / len(values) / 1e6 for values in zip(*group.bytes_so_far(), strict=False)]
        found = [interval_of([100 * value for value in values]) for values in rounds]
        style = {"color": _colour(number), "marker": "o" if len(sent) <= 30 else None, "markersize": 3.5}
        axes.plot(sent, [each.mean for each in found], linewidth=1.8, dashes=_dashes(number), **style)
        if len(group.runs) > 1:
            low, high = [max(0, each.low) for each in found], [min(100, each.high) for each in found]
            axes.fill_between(sent, low, high, color=_colour(number), alpha=0.18, linewidth=0)
    _megabyte_axis(axes)
    ends = "; ".join(
        f"{group.name} ends at {100 * group.accuracy().mean:.2f} % after {three_digits(group.total_bytes() / 1e6)} MB"
        for group in groups
    )
    return Drawing(
        title,
        "The mean over seeds; a band is its 95 % confidence interval, a dot a round.",
        f"Accuracy against the megabytes sent, logarithmic. {ends}.",
        finish(),
        _keys([group.name for group in groups]),
    )


def gamma_sweep(setting: str, groups: Sequence[Group]) -> Drawing | None:
    """Final accuracy over γ as in the paper's Figure 4, the original as a line; None without a sweep over γ."""
    lines: dict[str, list[Group]] = {}
    for group in groups:
        if group.essence.get("model.gamma") is not None:
            rest = {key: value for key, value in group.essence.items() if key != "model.gamma"}
            lines.setdefault(str(sorted(rest.items())) + str(group.finished), []).append(group)
    swept = [sorted(line, key=lambda group: group.essence["model.gamma"]) for line in lines.values() if len(line) > 1]
    if not swept:
        return None
    title = f"{setting}: accuracy over γ"
    axes, finish = _axes(title, "γ", "accuracy after the last round, %")
    names: list[str] = []
    told: list[str] = []
    for number, line in enumerate(swept):
        found = [group.accuracy().scaled(100) for group in line]
        gammas = [group.essence["model.gamma"] for group in line]
        axes.errorbar(
            gammas,
            [each.mean for each in found],
            yerr=[each.half or 0 for each in found],
            color=_colour(number),
            marker="o",
            markersize=5,
            capsize=4,
            linewidth=1.6,
        )
        names.append(_without_gamma(line[0].label))
        told += [f"{each.mean:.2f} % at {gamma:g}" for gamma, each in zip(gammas, found, strict=True)]
    originals = [group for group in groups if group.runs[0].config.method == "original"]
    for number, group in enumerate(originals[:1], len(swept)):
        found = group.accuracy().scaled(100)
        axes.axhline(found.mean, color=_colour(number), linewidth=1.6, linestyle="--")
        if found.half is not None:
            axes.axhspan(found.low, found.high, color=_colour(number), alpha=0.15, linewidth=0)
        names.append(group.name)
        told.append(f"the original {found.mean:.2f} %")
    return Drawing(
        title,
        "The mean over seeds with its 95 % confidence interval"
        + ("; the dashed line is the original network." if originals else "."),
        f"Final accuracy: {', '.join(told)}.",
        finish(),
        _keys(names),
    )


def personalisation(setting: str, groups: Sequence[Group]) -> Drawing | None:
    """Mean and worst tenth of the clients on their own data, as in the paper's Figure 5; None where servers tested."""
    known = [(group, worst) for group in groups if (worst := group.worst_accuracy()) is not None]
    if not known:
        return None
    title = f"{setting}: clients on their own data"
    axes, finish = _axes(title, "accuracy on the clients' own data, %", None, height=1.1 + 0.62 * len(known))
    told: list[str] = []
    for place, (group, worst) in enumerate(known):
        for number, found in enumerate((group.accuracy().scaled(100), worst.scaled(100))):
            _bar(axes, place + (0.2, -0.2)[1 - number], found.mean, found.half, number, f"{found.mean:.1f}")
        told.append(f"{group.name} {100 * group.accuracy().mean:.1f} % and {100 * worst.mean:.1f} %")
    axes.set_xlim(0, 108)
    _name_bars(axes, [group.name for group, _ in known])
    return Drawing(
        title,
        "Bars are means over seeds, whiskers their 95 % confidence intervals.",
        f"Mean over clients, and over the worst tenth of them: {'; '.join(told)}.",
        finish(),
        _keys(["mean over clients", "worst tenth of the clients"]),
    )


def seconds_a_round(setting: str, groups: Sequence[Group], rates: Sequence[float]) -> Drawing | None:
    """Seconds of a round over links of these speeds, as in the paper's Table 7."""
    if not rates:
        return None
    height = 1.0 + (0.22 + 0.22 * len(rates)) * len(groups)
    title = f"{setting}: seconds a round"
    axes, finish = _axes(title, "seconds a round", None, height=height)
    told: list[str] = []
    step = 0.8 / len(rates)
    for place, group in enumerate(groups):
        for number, rate in enumerate(rates):
            seconds = group.seconds_at(rate).mean
            offset = (number - (len(rates) - 1) / 2) * step
            _bar(axes, place + offset, seconds, None, number, three_digits(seconds), height=0.9 * step)
        told.append(
            f"{group.name} " + ", ".join(f"{three_digits(group.seconds_at(rate).mean)} s at {rate:g}" for rate in rates)
        )
    axes.set_xlim(0, 1.15 * max(group.seconds_at(rate).mean for group in groups for rate in rates))
    _name_bars(axes, [group.name for group in groups])
    return Drawing(
        title,
        "One client's share of the measured computing, and its bytes down and up over the link.",
        f"Seconds a round by megabits a second: {'; '.join(told)}.",
        finish(),
        _keys([f"{rate:g} Mbps" for rate in rates]),
    )


def _axes(title: str, x: str, y: str | None, height: float = _SIZE[1]) -> tuple[Any, Any]:
    """Axes, and the function that turns them into SVG."""
    # matplotlib takes a second to import; a Figure of its own leaves pyplot's windows alone.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.add_subplot()
    axes.set_xlabel(x, fontsize=12)
    if y is not None:
        axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11, colors=_INK)
    axes.grid(alpha=0.2, color=_INK)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for part in (*axes.spines.values(), axes.xaxis.label, axes.yaxis.label):
        getattr(part, "set_edgecolor", part.set_color)(_INK)

    def finish() -> str:
        text = StringIO()
        # Text as text, and the same bytes from the same runs. The title keeps one figure's ids from another's.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _for_page(text.getvalue())

    return axes, finish


def _for_page(svg: str) -> str:
    """The element alone, with the page's colours for the placeholders, and a size that the page decides."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Groups are numbered alike in every figure, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for number, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--series-{number})")
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib gives every SVG a viewBox"
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return f'<svg {box[0]} aria-hidden="true" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'


def _bar(
    axes: Any, place: float, value: float, half: float | None, number: int, text: str, height: float = 0.36
) -> None:
    error = {"xerr": half, "error_kw": {"ecolor": _INK, "capsize": 3, "elinewidth": 1.2}} if half else {}
    axes.barh(place, value, height=height, color=_colour(number), **error)
    axes.annotate(
        text,
        (value + (half or 0), place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
        color=_INK,
    )


def _name_bars(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [label.replace(", ", ",\n") for label in labels])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _megabyte_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xscale("log")
    left, right = axes.get_xlim()
    # A short axis may hold none of 1, 2 and 5.
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if math.log10(right / left) < 3 else (1.0,))
        if right / left > 8
        else MaxNLocator(6, steps=[1, 2, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _colour(number: int) -> str:
    return _SERIES[number % len(_SERIES)]


def _dashes(number: int) -> Any:
    dash = DASHES[number // len(_SERIES) % len(DASHES)]
    return [float(part) for part in dash.split()] if dash else (None, None)


def _keys(labels: Sequence[str]) -> tuple[Key, ...]:
    return tuple(Key(label, number) for number, label in enumerate(labels))


def _without_gamma(label: str) -> str:
    return ", ".join(part for part in label.split(", ") if not part.startswith("gamma "))
