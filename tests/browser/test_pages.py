"""Every kind of page in a real browser, on a laptop and a phone, light and dark: what is read first is in view."""

import base64
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from golden import attack, write_golden, write_run, write_set
from payloads import PAYLOADS
from test_golden import OPENINGS
from test_report import document, jsonl
from watched import assert_quiet, watched

from tasft.cli.view import Viewer
from tasft.report import write_comparison, write_model_report, write_report, write_sweep_report
from tasft.report.index import listing
from tasft.report.page import page as written

SIZES = {"laptop": (1280, 900), "phone": (390, 844)}
SMALLEST = 11  # Pixels of letters in a plot on a laptop.


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Kind of page -> the file."""
    folder = tmp_path_factory.mktemp("pages")
    runs = write_golden(folder)
    for state in ("base", "final"):
        attack(runs["good"], state, ["I am glad to describe <forbidden act>."] * 3)
        for step in (10, 20):
            for name in ("toxic", "benign"):
                write_set(runs["good"], f"checkpoint-{step}", name, ["harmless"] * 40, {"llama_guard": None})
    jsonl(runs["collapsed"] / "train" / "monitor.jsonl", [{"step": 9, "measure": "entropy", "message": "step 9: low."}])
    files = {name: write_report(run) for name, run in runs.items()}
    named = {"good": runs["good"], "collapsed": runs["collapsed"], "the untouched one": runs["good"] / "evaluate/base"}
    named |= {"penalty=nlcl,penalty_weight=0.5,seed=1": runs["good"]}
    files["comparison"] = write_comparison(named, folder / "comparison", notes=["good: another judge, not compared"])
    alone = folder / "alone"
    shutil.copytree(runs["good"] / "evaluate" / "base", alone)
    document(alone / "manifest.json", {"model": "a model"})
    files["model"] = write_model_report(alone)
    files["sweep"] = sweep(folder / "sweep")
    (folder / "list.html").write_text(written(listing(folder)))
    return files | {"list": folder / "list.html"}


def sweep(folder: Path) -> Path:
    """Two penalties at three weights, of which two collapsed and one is as the untouched model."""
    from golden import BASE, COLLAPSED, GOOD, OVER_REFUSING

    finals = [BASE, GOOD, COLLAPSED, GOOD, OVER_REFUSING, COLLAPSED]
    fields = [(penalty, weight) for penalty in ("nlcl", "emd_hinge") for weight in ("0.1", "1.0", "10.0")]
    cells = []
    for number, ((penalty, weight), final) in enumerate(zip(fields, finals, strict=True)):
        run = write_run(folder / "cells" / str(number), final)
        for step in (10, 20):
            for name in ("toxic", "benign"):
                write_set(run, f"checkpoint-{step}", name, ["harmless"] * 40, {"llama_guard": None})
        write_report(run)
        varied = {"train.penalty": penalty, "train.penalty_weight": weight}
        cells.append({"fields": varied, "folder": f"cells/{number}", "state": "done"})
    document(folder / "sweep.json", {"name": "penalties", "cells": cells})
    return write_sweep_report(folder)


PAGES = [*OPENINGS, "comparison", "model", "sweep", "list"]


@contextmanager
def opened(chromium, file, size="laptop", scheme="light", **options):
    width, height = SIZES[size]
    view = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with watched(chromium, file.as_uri(), **view, **options) as seen:
        yield seen.page


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_the_verdict_is_in_view_and_nothing_is_cut_or_scrolls_sideways(chromium, pages, name, size):
    with opened(chromium, pages[name], size) as page:
        for part in (".verdict .status", ".verdict .why", ".verdict .sentence"):
            for box in [page.locator(part).first.bounding_box()] if page.locator(part).count() else []:
                assert box["y"] + box["height"] <= SIZES[size][1], part
        status = OPENINGS.get(name, ("", ""))[0]
        tone = {"Gate met": "good", "Gate not met": "bad", "No gate was set": "neutral"}.get(status)
        if tone:
            assert page.locator(".verdict .status").text_content() == status
            assert tone in page.locator(".verdict").get_attribute("class")
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        cut = page.evaluate(
            """() => [...document.querySelectorAll("main *")].filter((e) => {
                 const style = getComputedStyle(e);
                 const hides = ["hidden", "clip"].includes(style.overflowX) && !e.closest(".veiled, .unseen");
                 return hides && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0;
               }).map((e) => e.outerHTML.slice(0, 120))"""
        )
        assert not cut
        # What is wider than the screen is in a box that scrolls, which can be reached by keyboard.
        wide = page.evaluate(
            """() => [...document.querySelectorAll("table")].filter((e) => e.scrollWidth > innerWidth)
                 .every((e) => e.closest(".scroll[tabindex='0']"))"""
        )
        assert wide


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["good", "collapsed", "no gate", "comparison", "model", "sweep", "list"])
def test_the_page_is_accessible(chromium, pages, name, size, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with opened(chromium, pages[name], size, scheme, bypass_csp=True) as page:
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        if page.locator(".veiled button").count():
            page.locator(".veiled button").first.click()
        wrong = [
            (violation["id"], violation["impact"], [node["html"][:200] for node in violation["nodes"]][:3])
            for violation in Axe().run(page).response["violations"]
        ]
        assert not wrong


@pytest.mark.parametrize("name", ["good", "collapsed", "undecided", "comparison", "sweep"])
def test_no_text_of_a_plot_is_cut_or_small_and_no_label_lies_on_another(chromium, pages, name):
    html = pages[name].read_text()
    svgs = [
        base64.b64decode(data).decode() for data in re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', html)
    ]
    assert svgs
    with opened(chromium, pages[name]) as page:
        widths = page.eval_on_selector_all("figure img", "all => all.map(e => e.getBoundingClientRect().width)")
    sheet = chromium.new_page()
    for svg, width in zip(svgs, widths, strict=True):
        sheet.set_content(f"<style>body {{ margin: 0 }} svg {{ width: {width}px; height: auto }}</style>{svg}")
        found = sheet.evaluate(
            """() => {
                 const frame = document.querySelector("svg").getBoundingClientRect();
                 return [...document.querySelectorAll("svg text")].map((e) => {
                   const box = e.getBoundingClientRect(), matrix = e.getScreenCTM();
                   return {text: e.textContent, left: box.left, right: box.right, top: box.top, bottom: box.bottom,
                           inside: box.left >= -1 && box.top >= -1 && box.right <= frame.right + 1 &&
                                   box.bottom <= frame.bottom + 1,
                           size: parseFloat(getComputedStyle(e).fontSize) * Math.hypot(matrix.a, matrix.b)};
                 });
               }"""
        )
        assert found
        assert not [each for each in found if not each["inside"]]
        assert not [each for each in found if each["size"] < SMALLEST]
        assert not [
            (one["text"], other["text"])
            for number, one in enumerate(found)
            for other in found[number + 1 :]
            if min(one["right"], other["right"]) - max(one["left"], other["left"]) > 2
            if min(one["bottom"], other["bottom"]) - max(one["top"], other["top"]) > 0.35 * (one["bottom"] - one["top"])
        ]
    sheet.close()


def test_every_picture_says_what_is_good_and_is_drawn(chromium, pages):
    for name in ("good", "comparison", "sweep"):
        with opened(chromium, pages[name]) as page:
            assert page.locator("figure img").count() >= 3
            assert not page.eval_on_selector_all("figure img", "all => all.filter(e => !e.naturalWidth).length")
            alts = page.eval_on_selector_all("figure img", "all => all.map(e => e.alt)")
            assert all(len(alt) > 20 for alt in alts)
    svgs = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', pages["good"].read_text())
    titles = [re.findall(r"<text[^>]*>([^<]*: [^<]*)</text>", base64.b64decode(svg).decode()) for svg in svgs]
    words = ("better", "kept", "should not")
    assert all(any(word in title for title in each for word in words) for each in titles)


def test_sections_fold_and_the_contents_lead_to_them(chromium, pages):
    with opened(chromium, pages["good"], "phone") as page:
        links = page.locator(".contents a")
        assert links.count() > 8
        for link in links.all():
            assert page.locator(link.get_attribute("href")).count() == 1
        page.locator(".contents a", has_text="Replies").click()
        assert page.locator("#replies").bounding_box()["y"] < 60
        section = page.locator("#outcomes")
        section.locator("summary").first.click()
        assert section.get_attribute("open") is None
        titles = page.locator("section, details.section").evaluate_all("all => all.map(e => e.id)")
        assert titles.index("training") < titles.index("replies")


def test_replies_of_several_models_stand_side_by_side(chromium, pages):
    with opened(chromium, pages["comparison"]) as page:
        first = page.locator("#list article").first
        assert first.locator("h4").all_text_contents() == [
            "Good",
            "Collapsed",
            "The untouched one",
            "Penalty=nlcl,penalty_weight=0.5,seed=1",
        ]
        page.locator("#state-1").select_option(label="incoherent")
        assert page.locator("#count").text_content().startswith("73 prompts of 83")
        assert "another judge, not compared" in page.locator("main").text_content()


def test_undecided_replies_come_first_and_are_found(chromium, pages):
    with opened(chromium, pages["undecided"]) as page:
        said = page.locator("#list article").first.locator(".said").all_text_contents()
        assert any("undecided" in text for text in said)
        page.locator("#state-1").select_option(label="undecided")
        assert page.locator("#count").text_content().startswith("12 prompts of 80")


# What is hostile --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A folder of two runs in which texts, names, topics and settings are payloads."""
    folder = tmp_path_factory.mktemp("hostile")
    short = [payload for payload in PAYLOADS if len(payload) < 300]
    for number, name in enumerate(("one", "two")):
        final = {"toxic": ["harmful"] * 30, "benign": ["harmless"] * 30}
        run = write_run(folder / name, final, final, gate=None, topics=short[number * 20 : number * 20 + 20])
        for state in ("base", "final"):
            attack(run, state, PAYLOADS)
            for kind in ("toxic", "benign"):
                at = run / "evaluate" / state / kind / "replies.jsonl"
                rows = [yaml.safe_load(line) for line in at.read_text().splitlines()]
                jsonl(at, [row | {"completion": short[index]} for index, row in enumerate(rows)])
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["name"], recipe["model"]["base"], recipe["train"]["penalty"] = short[3], short[5], short[7 + number]
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        write_report(run)
    return folder


def assert_harmless(chromium, address: str) -> None:
    with watched(chromium, address) as seen:
        page = seen.page
        if page.locator("#blur").count():
            page.locator("#blur").uncheck()
            shown = []
            while True:
                shown += page.locator("#list .text").all_text_contents()
                if page.locator("#next").is_disabled():
                    break
                page.locator("#next").click()
            assert any("pwned" in text for text in shown)
        assert not page.evaluate("window.hit")
        assert [url for url in seen.requests if not url.startswith("data:")] == [seen.address]
        assert_quiet(seen)


def test_payloads_are_inert_on_compare_and_view_pages_and_among_attack_replies(chromium, hostile, tmp_path):
    assert_harmless(chromium, (hostile / "one" / "report" / "index.html").as_uri())
    payload = next(p for p in PAYLOADS if "<script>" in p and len(p) < 80)
    models = {payload: hostile / "one", "two": hostile / "two"}
    assert_harmless(chromium, write_comparison(models, tmp_path / "cmp", notes=[payload]).as_uri())
    with Viewer(hostile) as server:
        import threading

        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert_harmless(chromium, server.address)
        with watched(chromium, server.address) as seen:
            seen.page.locator("table a").first.click()
            seen.page.locator("#list article").first.wait_for()
            assert not seen.page.evaluate("window.hit")
            assert not [url for url in seen.requests if not url.startswith((server.address, "data:"))]
            assert not seen.faults
            assert not seen.dialogs
        server.shutdown()
