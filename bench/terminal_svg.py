"""Draws a terminal's screen of plain text as SVG: the pictures under docs/images.

    tmux new-session -d -s shot -x 100 -y 40 llm-edge-cache top
    tmux capture-pane -t shot -p | python bench/terminal_svg.py --title 'llm-edge-cache top' > docs/images/top.svg

It has a background of its own, so it can be read on a light page and on a dark one, and asks for no font but the
reader's own.
"""

from __future__ import annotations

import argparse
import re
import sys
from html import escape

COLUMN, LINE, SIZE, MARGIN, BAR = 8.4, 18, 14, 14, 32  # of the drawing, in its units
STYLE = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
BACKGROUND, TEXT, TITLE, BARS, LABEL = "#0d1117", "#d6deeb", "#8b949e", "#3fb950", "#79c0ff"
# Blocks of sparks are drawn, not written: a font's own would leave gaps.
SPARKS = "▁▂▃▄▅▆▇█"
# What heads a line, and lines that head columns.
_LABEL = re.compile(r"^(hit ratio|look-ups|entries|memory|window|breaker|asked .*| +pid .*| +count .*)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--title", default="")
    parser.add_argument("--columns", type=int, default=100)
    given = parser.parse_args()
    print(drawing([line.rstrip("\n") for line in sys.stdin], given.title, given.columns))


def drawing(lines: list[str], title: str, columns: int) -> str:
    while lines and not lines[-1].strip():
        lines.pop()
    width, height = columns * COLUMN + 2 * MARGIN, len(lines) * LINE + BAR + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{BACKGROUND}" stroke="#30363d"/>',
        *(f'<circle cx="{MARGIN + 6 + 18 * n}" cy="{BAR / 2 + 4:g}" r="5" fill="#484f58"/>' for n in range(3)),
        f'<g style="{STYLE};font-size:{SIZE}px;white-space:pre" xml:space="preserve">',
        f'<text x="{width / 2:g}" y="{BAR / 2 + 9:g}" text-anchor="middle" fill="{TITLE}">{escape(title)}</text>',
    ]
    for row, line in enumerate(lines):
        parts += drawn(line, BAR + MARGIN + row * LINE)
    return "\n".join([*parts, "</g>", "</svg>"])


def drawn(line: str, top: float) -> list[str]:
    """One line: its runs of text each at its own column, and its sparks as rectangles."""
    label = _LABEL.match(line)
    end = label.end() if label else 0
    parts = []
    for run in re.finditer(rf"[^ {SPARKS}]+(?: [^ {SPARKS}]+)*", line):
        colour = LABEL if run.start() < end else TEXT
        length = (run.end() - run.start()) * COLUMN
        parts.append(
            f'<text x="{MARGIN + run.start() * COLUMN:.1f}" y="{top + SIZE:g}" fill="{colour}" '
            f'textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs">{escape(run.group())}</text>'
        )
    for spark in re.finditer(f"[{SPARKS}]", line):
        tall = (SPARKS.index(spark.group()) + 1) * (LINE - 4) / len(SPARKS)
        parts.append(
            f'<rect x="{MARGIN + spark.start() * COLUMN:.1f}" y="{top + LINE - 1 - tall:.1f}" '
            f'width="{COLUMN - 1:.1f}" height="{tall:.1f}" fill="{BARS}"/>'
        )
    return parts


if __name__ == "__main__":
    main()
