"""The head of a run's page as a picture, for README: the verdict and what became of the replies; no reply is in it.

python research/screenshot.py runs/demo docs/img/report.png    # needs Chromium
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 960})
        page.goto((arguments.run / "report" / "index.html").absolute().as_uri())
        page.screenshot(path=arguments.picture)
        browser.close()


if __name__ == "__main__":
    main()
