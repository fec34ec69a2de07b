"""A layout in the terminal: a map of ranks, and tables of lanes, stages, groups and memory."""

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mimo_strategy.layout import LANGUAGE, ModuleLayout, Placement
from mimo_strategy.module_layout import span
from mimo_strategy.pictures.lane_colors import lane_color
from mimo_strategy.pictures.layout_text import expert_factors, fan, heading, title
from mimo_strategy.pictures.palette import INK, Color
from mimo_strategy.planning.groups import feeds, groups, lane_ranks
from mimo_strategy.planning.memory import gibibytes
from mimo_strategy.planning.report import LayoutReport, RankMemory

_FAINT = "dim"
_NOTHING = "\N{MIDDLE DOT}"
_MOST_CELLS = 128
"""Ranks that are drawn one by one; of more, lanes are summed up."""
_MOST_ROWS = 8
"""Rows of a table before those that only repeat are summed up."""
_MOST_RANKS = 16
"""Ranks whose groups are all told."""


def show_layout(console: Console, report: LayoutReport, ranks: list[int]) -> None:
    """Print all of a report.

    Args:
        console: where to.
        report: of the layout.
        ranks: whose groups to tell; if there are none, those of all ranks of a small world, or of a few of a large one.
    """
    if report.layout is not None:
        console.print(_headings(report))
        tables = [_lanes(report), *(_bridge(report, encoder) for encoder in _encoders(report)), *_stages(report)]
        for part in (_map(report, console.width), *tables, _groups(report, ranks or _some_ranks(report))):
            console.print(part)
            console.print()
        if report.unknown:
            console.print(Text(f"No estimate: {report.unknown}", _FAINT))
    console.print(_checks(report))


def _headings(report: LayoutReport) -> RenderableType:
    lines, job = [Text(title(report.layout), "bold")], report.job
    if job.batch_size:
        lines[0].append(
            f"   step batch {job.batch_size} = {report.num_microbatches} microbatch(es) of "
            f"{job.batch_size // report.num_microbatches}"
            + (f", encoders take {job.encoder_batching} at once" if job.encoder_batching > 1 else "")
            + (f", encoders run {job.encoder_ahead} ahead" if job.encoder_ahead else ""),
            "not bold",
        )
    for module in _modules(report):
        lines.append(Text.assemble((f"{module.name:<10}", "bold"), (heading(module), _FAINT)))
    return Group(*lines, "")


def _map(report: LayoutReport, width: int) -> RenderableType:
    """Every module a strip of ranks: the number and hue of a lane, a shade for a shard of it."""
    world_size = report.layout.world_size
    if world_size > _MOST_CELLS:
        return Group(*(_summed_up(report, module) for module in _modules(report)), _legend())
    digits = len(str(world_size - 1))
    label = max(map(len, [*report.layout.modules, "rank"])) + 2
    room = max(1, (width - label) // (digits + 1))
    columns = min(world_size, 1 << (room.bit_length() - 1))
    lines = []
    for start in range(0, world_size, columns):
        ranks = range(start, min(start + columns, world_size))
        lines.append(Text(f"{'rank':<{label}}" + "".join(f"{rank:>{digits}} " for rank in ranks), _FAINT))
        for module in _modules(report):
            line = Text(f"{module.name:<{label}}", "bold")
            for rank in ranks:
                if rank in module.ranks:
                    lane = module.coordinates(rank)["dp"]
                    line.append(f"{lane:>{digits}} ", _style(report, module, rank))
                else:
                    line.append(f"{_NOTHING:>{digits}} ", _FAINT)
            lines.append(line)
        lines.append(Text())
    return Group(*lines[:-1], _legend())


def _summed_up(report: LayoutReport, module: ModuleLayout) -> Text:
    """First and last lanes of each stage; those between repeat them."""
    text = Text(f"{module.name}\n", "bold")
    for stage in range(module.pp):
        text.append(f"  {f'pp {stage}' if module.pp > 1 else 'lanes':<6} ", _FAINT)
        shown = list(_some(module.dp, 6))
        for lane in shown:
            ranks = lane_ranks(module, lane, stage)
            text.append(f" {span(ranks)} ", _style(report, module, ranks[0]))
            if lane + 1 < module.dp and lane + 1 not in shown:
                text.append(f" ... {module.dp - len(shown):,} more lanes of {len(ranks)} rank(s) ... ", _FAINT)
        text.append("\n")
    return text


def _legend() -> Text:
    return Text(f"number and hue: data-parallel lane, shade: shard (tp, cp) of it, {_NOTHING}: not here", _FAINT)


def _lanes(report: LayoutReport) -> RenderableType:
    table = _table("Lanes", "module", "lanes", "ranks each", "samples a microbatch", "a step", "share")
    for module in _modules(report):
        samples = report.samples.get(module.name)
        table.add_row(
            module.name,
            f"{module.dp:,}",
            f"{module.tp * module.cp * module.pp}",
            f"{samples:,}" if samples else "?",
            f"{samples * report.num_microbatches:,}" if samples else "?",
            f"1/{module.dp:,}",
        )
    return table


def _bridge(report: LayoutReport, encoder: ModuleLayout) -> RenderableType:
    language = report.layout.modules[LANGUAGE]
    table = _table(
        f"Bridge {encoder.name} -> {LANGUAGE}: {fan(encoder, language)} lanes; gradients come back the same way",
        f"{encoder.name} lanes",
        "on ranks",
        "feed",
        f"{LANGUAGE} lanes",
        "on ranks",
    )
    pairs = feeds(encoder, language)
    for position in _some(len(pairs), _MOST_ROWS):
        feed = pairs[position]
        table.add_row(
            span(feed.encoder),
            span(_ranks_of(encoder, feed.encoder, encoder.pp - 1)),
            "->",
            span(feed.language),
            span(_ranks_of(language, feed.language, 0)),
        )
    if len(pairs) > _MOST_ROWS:
        table.caption = f"and {len(pairs) - _MOST_ROWS:,} more like these"
    return table


def _ranks_of(module: ModuleLayout, lanes: range, stage: int) -> range:
    return range(lane_ranks(module, lanes[0], stage).start, lane_ranks(module, lanes[-1], stage).stop)


def _stages(report: LayoutReport) -> list[Table]:
    layers = _table("Stages", "module", "pp", "ranks", "layers")
    table = _table("Bytes on each rank", "", "params", "grads", "optimizer", "activations*", "total")
    totals: list[list[RankMemory]] = []
    for module in _modules(report):
        for stage in range(module.pp):
            ranks = module.stage_ranks(stage)
            name = f"{module.name} pp {stage}" if module.pp > 1 else module.name
            held, kinds = [], ""
            if report.estimate is not None:
                kinds = report.layers(module, stage)
                kinds = ", ".join(kind if number == 1 else f"{number} {kind}" for kind, number in kinds.items())
                held = [report.memory(module, rank) for rank in ranks]
                table.add_row(name, *_bytes(held))
            totals.append(held)
            layers.add_row(module.name, f"{stage}", span(ranks), kinds)
    if report.estimate is None:
        return [layers]
    if report.layout.placement is Placement.COLOCATED and len(totals) > 1:
        sums = [sum(memory.total for memory in rank) for rank in zip(*totals, strict=True)]
        table.add_row("together", "", "", "", "", _between(sums))
    table.caption = "* estimated; the others are exact"
    return [layers, table]


def _bytes(held: list[RankMemory]) -> Iterator[str]:
    for kind in ("parameters", "gradients", "optimizer", "activations", "total"):
        yield _between([getattr(memory, kind) for memory in held])


def _between(sizes: list[float]) -> str:
    low, high = gibibytes(min(sizes)), gibibytes(max(sizes))
    return high if low == high else f"{low} - {high}"


def _groups(report: LayoutReport, ranks: list[int]) -> RenderableType:
    table = _table("Groups", "rank", "module", "position", "of experts", "groups")
    for rank in ranks:
        for module in _modules(report):
            if rank not in module.ranks:
                continue
            at = module.coordinates(rank)
            table.add_row(
                f"{rank}",
                Text(module.name, _style(report, module, rank)),
                " ".join(f"{factor} {at[factor]}" for factor in ("tp", "cp", "dp", "pp") if getattr(module, factor) > 1)
                or "alone",
                " ".join(f"{factor} {at[factor]}" for factor in expert_factors(module)),
                "  ".join(f"{factor} {span(others)}" for factor, others in _shown_groups(module, rank)),
            )
    if len(ranks) < report.layout.world_size:
        table.caption = "of others: --rank R"
    return table


def _checks(report: LayoutReport) -> RenderableType:
    if not report.failures:
        overflow = Text(f"\n{report.overflow}", "yellow") if report.overflow else Text()
        return Panel(Text("every check passed").append(overflow), border_style="green")
    lines = Text("\n".join(f"x {failure}" for failure in report.failures))
    if report.suggestion:
        lines.append(f"\n\n{report.suggestion}", "bold")
    return Panel(lines, title=f"{len(report.failures)} check(s) failed", border_style="red")


def _some_ranks(report: LayoutReport) -> list[int]:
    world_size = report.layout.world_size
    if world_size <= _MOST_RANKS:
        return list(range(world_size))
    return sorted({rank for module in _modules(report) for rank in (module.ranks[0], module.ranks[-1])})


def _some(number: int, most: int) -> Iterator[int]:
    """All of ``number`` places, or the first ones and the last."""
    yield from range(number) if number <= most else (*range(most - 1), number - 1)


def _table(name: str, *columns: str) -> Table:
    table = Table(
        title=name, title_justify="left", title_style="bold", caption_justify="left", box=None, pad_edge=False
    )
    for column in columns:
        table.add_column(column, header_style=_FAINT, overflow="fold")
    return table


def _style(report: LayoutReport, module: ModuleLayout, rank: int) -> Style:
    color = lane_color(module, module.coordinates(rank), report.layout.largest_dp)
    return Style(color=INK, bgcolor=_hex(color))


def _hex(color: Color) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in color)


def _shown_groups(module: ModuleLayout, rank: int) -> Iterator[tuple[str, range]]:
    for factor, ranks in groups(module, rank).items():
        if factor not in ("etp", "ep", "edp") or expert_factors(module):
            yield factor, ranks


def _modules(report: LayoutReport) -> list[ModuleLayout]:
    """Encoders first."""
    return sorted(report.layout.modules.values(), key=lambda module: module.name == LANGUAGE)


def _encoders(report: LayoutReport) -> list[ModuleLayout]:
    return [module for module in _modules(report) if module.name != LANGUAGE]
