"""Take the README's picture of a report: its headline, its chart of accuracy against steps, and its claims.

    python benchmarks/readme_picture.py REPORT.html OUT.png

Light theme, 1200 pixels wide, only the parts that speak without being clicked. Needs a Chromium on the PATH.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from chromium import Chromium, find_chromium

WIDTH = 1200
LIMIT = 300_000  # bytes
# A still picture has nothing to press or unfold, and shows the top of the story.
STILL = """
.switch, details, .lead, .statistic, figcaption, .tiles dl { display: none !important }
main > section:not(#accuracy, #claims) { display: none }
section { padding-top: 40px }
header { padding-top: 40px }
.claims { border-bottom: 0 }
.claims li { padding: 14px 0 }
"""


def take(browser: Chromium, report: Path, out: Path) -> None:
    """Write the picture of `report` to `out`.

    Raises:
        SystemExit: the charts did not draw, or the picture is too large for a repository.
    """
    with browser.open(report, width=WIDTH, height=900) as page:
        page.evaluate(
            f"document.head.append(Object.assign(document.createElement('style'), {{textContent: `{STILL}`}}))"
        )
        if not page.drawn():
            raise SystemExit(f"The charts of {report} did not draw.")
        bottom = page.evaluate("document.querySelector('#claims').getBoundingClientRect().bottom + scrollY")
        page.screenshot(out, clip=(0, 0, WIDTH, bottom + 32))
    # 256 colours are enough for flat areas and text, and keep the repository small.
    Image.open(out).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
    if out.stat().st_size > LIMIT:
        raise SystemExit(f"{out} has {out.stat().st_size:,} bytes, more than the {LIMIT:,} allowed.")


def main() -> None:
    """Read the two paths and take the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        raise SystemExit("A Chromium is required to take the picture, and none is on the PATH: install one.")
    if not arguments.report.is_file():
        raise SystemExit(f"{arguments.report} is not a file: give the report.html that `steadynorm compare` wrote.")
    with Chromium(executable) as browser:
        take(browser, arguments.report, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
