"""A page in the browser, and what it should never do."""

from contextlib import contextmanager
from types import SimpleNamespace


@contextmanager
def watched(chromium, address, is_fault=lambda message: True, script="", **options):
    """Opens a page and notes its requests, dialogs, errors and new windows, and the messages that are a fault."""
    context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    page = context.new_page()
    page.set_default_timeout(60_000)
    seen = SimpleNamespace(page=page, address=address, requests=[], dialogs=[], faults=[])
    context.add_init_script(f"window.pwned = () => {{ window.hit = true; }}; {script}")
    context.on("request", lambda request: seen.requests.append(request.url))
    context.on("page", lambda other: seen.faults.append(f"opened {other.url}"))
    page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: seen.faults.append(str(error)))
    page.on("console", lambda message: seen.faults.append(message.text) if is_fault(message) else None)
    try:
        page.goto(address)
        yield seen
    finally:
        context.close()


def assert_quiet(seen):
    """Nothing was asked of anybody else, no script of a reply ran, and the page is still the same."""
    assert [url for url in seen.requests if not url.startswith((seen.address, "data:"))] == []
    assert not seen.dialogs
    assert not seen.faults
    assert not seen.page.evaluate("window.hit")
    assert seen.page.url == seen.address
