"""The report of a sweep: a table, figures, and one page that holds it all."""

import base64
import html
from pathlib import Path

from lora_jax.files import write_atomically
from lora_jax.sweeps import plots, results, sweep_dirs
from lora_jax.sweeps.plots import Picture
from lora_jax.sweeps.results import Results

FOLDER = "report"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
img { max-width: 100%; } figure { margin: 0; } figcaption, .note { color: #555; font-size: 0.9rem; }
"""


def write(workdir: Path, sweep: Results) -> Path:
    """Writes table, figures and page into the sweep's directory; returns the folder."""
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    pictures = plots.draw_all(sweep)
    files: dict[str, str | bytes] = {f"{picture.name}.png": picture.png for picture in pictures}
    files |= {"results.csv": results.to_csv(sweep), "table.md": results.to_markdown(sweep)}
    # The page is the last, since it stands for the whole.
    files |= {"report.html": make_page(workdir.name, sweep, pictures)}
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        write_atomically(folder / name, data)
    return folder


def summarize(sweep: Results) -> str:
    """Says how many runs there are, and which is the best of them."""
    statuses = [row.result["status"] for row in sweep.rows]
    parts = [
        f"{statuses.count(status)} {status}"
        for status in (sweep_dirs.FINISHED, sweep_dirs.DIVERGED, sweep_dirs.DROPPED)
        if status in statuses
    ]
    if sweep.unfinished:
        parts.append(f"{sweep.unfinished} not finished yet")
    hours = sum(row.result["seconds"] for row in sweep.rows) / 3600
    text = f"{len(sweep.rows) + sweep.unfinished} runs: {', '.join(parts)}; {hours:.2f} hours."
    scored = [row for row in sweep.rows if row.score is not None]
    if scored:
        best = max(scored, key=lambda row: sweep_dirs.rank(row.result))
        values = ", ".join(
            f"{results.format_name(f)} {results.format_value(best.values[f])}" for f in sweep.varied
        )
        text += f" Best validation {sweep.score_name} {best.score:.4f}: {values or 'the only run'}."
    return text


def make_page(title: str, sweep: Results, pictures: list[Picture]) -> str:
    """Writes an HTML page that needs no other file."""
    sections = [_section(picture) for picture in pictures]
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(summarize(sweep))}</p>
<h2>Results</h2>
{_table(sweep)}
<p class="note">Mean ± sample standard deviation over seeds of each run's best validation
{sweep.score_name}.</p>
{"".join(sections)}</body>
</html>
"""


def _table(sweep: Results) -> str:
    header, lines = results.table(sweep)
    rows = [_table_row("th", header), *(_table_row("td", line) for line in lines)]
    return "\n".join(["<table>", *rows, "</table>"])


def _table_row(tag: str, texts: list[str]) -> str:
    cells = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
    return f"<tr>{cells}</tr>"


def _section(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f"<h2>{html.escape(picture.title)}</h2>\n"
        f'<figure><img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>\n"
    )
