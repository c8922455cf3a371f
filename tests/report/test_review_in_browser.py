"""review.html in a real browser, from opening it to the corrected data being trained on."""

import csv
import os
import shutil

import pytest
from helpers.scripts import SMALL_NET
from helpers.trees import make_folder

import Train_folder
from dividemix import DivideMixError
from dividemix.run.folder import read_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
BROWSER = shutil.which("chromium") or os.environ.get("CHROMIUM")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="needs Debian's chromium, or CHROMIUM=its path")]

ODD = 'c0/"a, b" <img src=x onerror=alert(1)> \N{CAT FACE}.jpg'


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = make_folder(tmp_path_factory.mktemp("own") / "images", 40)
    (tree / "c0/0000.jpg").rename(tree / ODD)
    return tree


def train(tree, folder, *flags):
    size = [*SMALL_NET, "--workers", "0", "--warm_up", "1", "--num_epochs", "2", "--run_dir", str(folder)]
    return Train_folder.main(["--data_path", str(tree), *size, *flags])


@pytest.fixture(scope="module")
def folder(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tree, folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, folder):
    """The page on a phone; nothing may fail in it, ask anything or be loaded."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page, problems, requests = context.new_page(), [], []
    for event in ("pageerror", "dialog", "console"):
        page.on(event, lambda problem: problems.append(str(problem)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((folder / "review.html").as_uri())
    yield page
    assert problems == [] and all(url.startswith(("file:", "data:", "blob:")) for url in requests)
    context.close()


def card(page, path):
    return page.get_by_role("group", name=path)


def saved(page, file):
    """What the button saves. -> path -> (decision, label)"""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save decisions.csv").click()
    download.value.save_as(file)
    with open(file, newline="", encoding="utf-8") as content:
        return {row["path"]: (row["decision"], row["label"]) for row in csv.DictReader(content)}


def shown(page) -> list[str]:
    return page.locator(".card .id").all_text_contents()


def test_from_the_page_to_the_corrected_data(page, tree, folder, tmp_path):
    """The whole way of a person with a folder of photos: decisions by touch and keys arrive in training."""
    first, second = "c1/0001.jpg", "c2/0002.jpg"
    card(page, ODD).get_by_role("button", name="Other class").tap()
    page.get_by_role("combobox", name="Class of").select_option("c3")
    page.get_by_role("button", name="OK").tap()
    card(page, second).get_by_role("button", name="Drop").tap()
    card(page, first).focus()
    page.keyboard.press("o")
    page.keyboard.press("Escape")  # leaves the question without a decision
    assert "undecided" in card(page, first).get_attribute("aria-label")
    page.keyboard.press("k")
    assert page.get_by_role("status").text_content() == "3 of 40 decided, 1 kept, 1 other class, 1 dropped"
    assert card(page, first).get_by_role("button", name="Keep").get_attribute("aria-pressed") == "true"
    file = tmp_path / "decisions.csv"
    assert saved(page, file) == {ODD: ("other", "c3"), second: ("drop", ""), first: ("keep", "c1")}
    train(tree, tmp_path / "corrected", "--corrections", str(file))
    before, after = (read_run(run).labels for run in (folder, tmp_path / "corrected"))
    given, corrected = (
        dict(zip(run["list_path"].tolist(), run["list_given"].tolist(), strict=True)) for run in (before, after)
    )
    expected = {path: 3 if path == ODD.encode() else label for path, label in given.items()}
    assert corrected == {path: label for path, label in expected.items() if path != second.encode()}
    assert sorted([*after["index"], *after["held_out"]]) == [*range(39)]
    assert read_run(tmp_path / "corrected").args["corrections"] == [str(file)]
    file.write_text("path,decision,label\nc1/0001.jpg,drop,\n")  # other decisions are another run
    with pytest.raises(DivideMixError, match="--fresh"):
        train(tree, tmp_path / "corrected", "--corrections", str(file))


def test_progress_is_kept_undone_and_loaded(page, tmp_path):
    """Else an hour of decisions is lost with the tab, or one wrong tap on all images cannot be taken back."""
    page.get_by_role("combobox", name="Given").select_option("c1")
    paths = shown(page)
    assert len(paths) == 10 and all(path.startswith("c1/") for path in paths)
    page.locator("#all").get_by_role("button", name="Drop").tap()
    status = page.get_by_role("status")
    assert status.text_content() == "10 of 40 decided, 10 dropped"
    page.get_by_label("only undecided").check()
    assert shown(page) == []
    page.get_by_role("button", name="Undo").tap()
    assert status.text_content() == "undone, 0 of 40 decided" and shown(page) == paths
    card(page, paths[3]).get_by_role("button", name="Drop").tap()
    assert page.locator("#open").text_content() == "9"
    page.locator("#all").get_by_role("button", name="Keep").tap()  # replaces no decision
    file = tmp_path / "decisions.csv"
    decisions = saved(page, file)
    assert decisions == dict.fromkeys(paths, ("keep", "c1")) | {paths[3]: ("drop", "")}
    page.reload()
    assert status.text_content() == "10 of 40 decided, 9 kept, 1 dropped"
    file.write_text(
        f'\ufeffpath,decision,label\r\n{paths[0]},drop,\r\n"not ""here"".jpg",other,c2\r\n', encoding="utf-8"
    )
    page.get_by_label("Load").set_input_files(file)
    expected = (
        "2 decisions loaded, 10 of 40 decided, 8 kept, 1 other class, 2 dropped, 1 of images that are not on this page"
    )
    playwright.expect(status).to_have_text(expected)  # the page's own policy forbids wait_for_function, which evals
    loaded = {paths[0]: ("drop", ""), 'not "here".jpg': ("other", "c2")}
    assert saved(page, file) == decisions | loaded
    rows = f"Path;Decision;Label\n{paths[1]}; Drop;\n{paths[2]};other;c9\n"  # of a spreadsheet; c9 is no class
    file.write_text(rows, encoding="utf-8-sig")
    page.get_by_label("Load").set_input_files(file)
    playwright.expect(status).to_contain_text("1 decisions loaded")
    assert saved(page, file) == decisions | loaded | {paths[1]: ("drop", "")}
    file.write_text("a,b\n1,2\n")
    page.get_by_label("Load").set_input_files(file)
    playwright.expect(status).to_contain_text("no decisions")


def test_keys_move_and_orders_differ(page):
    """Else nobody without a mouse can decide, and the keyboard's focus is lost or cannot be seen."""
    paths = shown(page)
    card(page, paths[0]).focus()
    for key, at in (("ArrowRight", 1), ("ArrowDown", 3), ("ArrowLeft", 2), ("d", 3), ("ArrowUp", 1), ("u", 1)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.item.id") == paths[at], key
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.get_by_role("status").text_content() == "undone, 0 of 40 decided"
    page.get_by_label("only listed").check()
    assert shown(page) == paths[: page.evaluate("data.end")]
    page.get_by_label("only listed").uncheck()
    orders = {}
    for order in ("borderline first", "by class", "most doubtful first"):
        page.get_by_role("combobox", name="Order").select_option(label=order)
        orders[order] = shown(page)
    assert orders["most doubtful first"] == paths and sorted(orders["borderline first"]) == sorted(paths)
    assert [path[:2] for path in orders["by class"]] == sorted(path[:2] for path in paths)
    end = page.evaluate("data.end")
    assert {*orders["borderline first"][:4]} == {*paths[max(end - 2, 0) : max(end - 2, 0) + 4]}
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_label("only undecided").check()
    card(page, paths[1]).focus()
    for keys, at in ((["k"], 2), (["u"], 2), (["o", "Escape"], 2)):
        for key in keys:
            page.keyboard.press(key)
        assert page.evaluate("document.activeElement.closest('.card')?.item.id") == paths[at], key
    card(page, paths[2]).get_by_role("button", name="Keep").press("Enter")  # its card goes, and the next one comes
    assert page.evaluate("document.activeElement.item.id") == paths[3]
    for key in ["ArrowDown"] * 9 + ["ArrowUp"] * 6:
        page.keyboard.press(key)
        page.wait_for_timeout(30)
    top, bar = "document.activeElement.getBoundingClientRect().top", "$('bar').getBoundingClientRect().bottom"
    assert page.evaluate(f"{top} >= {bar}")
