"""The page in Markdown, with every number and without pictures."""

from __future__ import annotations

from posenc.report.sections import Grid, Heat, Picture, Section


def page(title: str, introduction: str, sections: list[Section]) -> str:
    """The whole file."""
    parts = [f"# {title}", introduction]
    for section in sections:
        parts += [f"## {section.title}", f"```bash\n{section.command}\n```", *section.remarks]
        maps = [block for block in section.blocks if isinstance(block, Picture)]
        for block in section.blocks:
            if isinstance(block, Grid):
                parts += [f"### {block.title}", table(block.columns, block.rows, block.numbers)]
        heats = [block for block in section.blocks if isinstance(block, Heat)]
        for task in dict.fromkeys(heat.table.task for heat in heats):
            same = [heat for heat in heats if heat.table.task == task]
            parts += [f"### {task}: share right by depth and length, ± standard error", _heats(same)]
        if maps:
            rows = [[picture.title, picture.caption] for picture in maps]
            parts += ["### What the longest input's distances become", table(["strategy", "map"], rows, 2)]
    return "\n\n".join(parts) + "\n"


def table(columns: list[str], rows: list[list[str]], numbers: int) -> str:
    """A table whose columns from `numbers` on are right-aligned."""
    rule = ["---:" if at >= numbers else "---" for at in range(len(columns))]
    lines = [columns, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _heats(heats: list[Heat]) -> str:
    lengths = heats[0].table.lengths
    rows = [
        [heat.table.label, f"{depth:g}", *("-" if score is None else score.shown for score in scores)]
        for heat in heats
        for depth, scores in heat.table.rows.items()
    ]
    return table(["strategy", "depth", *map(str, lengths)], rows, 1)
