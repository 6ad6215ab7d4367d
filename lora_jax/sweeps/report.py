"""The report of a sweep: a table, pictures, and one page that holds it all."""

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


def write(workdir: Path, found: Results) -> Path:
    """Writes table, pictures and page into the sweep's directory; returns the folder."""
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    drawn = plots.all_of(found)
    files = {f"{p.name}.png": p.png for p in drawn}
    files |= {"results.csv": results.as_csv(found), "table.md": results.as_markdown(found)}
    files |= {"report.html": page(workdir.name, found, drawn)}  # last: it stands for the whole
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        write_atomically(folder / name, data)
    return folder


def summary(found: Results) -> str:
    """How many runs there are, and the best of them."""
    statuses = [row.result["status"] for row in found.rows]
    parts = [
        f"{statuses.count(status)} {status}"
        for status in (sweep_dirs.FINISHED, sweep_dirs.DIVERGED, sweep_dirs.DROPPED)
        if status in statuses
    ]
    if found.unfinished:
        parts.append(f"{found.unfinished} not finished yet")
    hours = sum(row.result["seconds"] for row in found.rows) / 3600
    text = f"{len(found.rows) + found.unfinished} runs: {', '.join(parts)}; {hours:.2f} hours."
    done = [row for row in found.rows if row.score is not None]
    if done:
        best = max(done, key=lambda row: found.score.merit(row.score))
        values = ", ".join(
            f"{results.name(f)} {results.number(best.values[f])}" for f in found.swept
        )
        text += f" Best validation {found.score_name} {best.score:.4f}: {values or 'the only run'}."
    return text


def page(title: str, found: Results, drawn: list[Picture]) -> str:
    """One HTML page that needs no other file."""
    sections = [_section(picture) for picture in drawn]
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(summary(found))}</p>
<h2>Results</h2>
{_table(found)}
<p class="note">Mean ± sample standard deviation over seeds of each run's best validation
{found.score_name}.</p>
{"".join(sections)}</body>
</html>
"""


def _table(found: Results) -> str:
    header, lines = results.table(found)
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row)
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in lines)
    return f"<table>\n<tr>{cells('th', header)}</tr>\n{body}\n</table>"


def _section(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f"<h2>{html.escape(picture.title)}</h2>\n"
        f'<figure><img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>\n"
    )
