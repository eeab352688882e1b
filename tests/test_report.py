"""report.html in a real browser, from a file: sorting, filters, paging, keyboard, and names that try to break it."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from anogan import report, verdicts
from anogan.images import ImageSet
from anogan.scores import GAN, Score
from anogan.scoring import ScoredSplit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package: chromium)")
NAMES = ["</script><script>document.title='broken'</script>", "<img src=x onerror=alert(1)>", "a \"b\" & 'c'"]
NAMES += ["two\nlines", "写真 é ؤ 😀", "{{ title }} %s ${x}", "surrogate \udcff"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def opened(browser: Browser, path: Path, width: int = 1280) -> tuple[Page, list[str]]:
    """The page, from its file, and a list to which whatever it complains about is added."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url[:4] == "http" else None)
    page.goto(path.resolve().as_uri())
    return page, complaints


def names_of(page: Page) -> list[str]:
    return page.locator("#gallery .name").all_text_contents()


def written(
    tmp_path: Path, names: list[str], strip: bytes | None = None, classes: tuple[str, ...] = ("good", "very  bad")
) -> tuple[Path, np.ndarray]:
    """A report of made-up pictures, of each class in turn, of which every tenth is flagged; and their scores (N,)."""
    count = len(names)
    score = np.random.default_rng(0).permutation(count) / count
    split = ScoredSplit(
        gan=None,
        images=ImageSet("mine", [], np.arange(count), np.full(count, -1), np.array(names), None),
        latents={"z": np.zeros((count, 1))},
        class_name=np.array(classes)[np.arange(count) % len(classes)],
        is_anomaly=np.zeros(count, bool),
        scores={"anomaly_score": score, "residual": -score},
        declared={
            name: Score(name, f"{name}, as it is", GAN, None, "tab:blue") for name in ("anomaly_score", "residual")
        },
        batch_size=1,
        stride=None,
    )
    flagged = score >= 0.9
    p_value, flags = {"images": 1 - score}, {"images": flagged}
    verdict = verdicts.Verdict("anomaly_score", 0.1, None, 0.9, p_value, flags, level=0.1, brightest=0.2, normals=9)
    if strip is None:
        Image.new("RGB", (128, 32), "navy").save(tmp_path / "strip.webp")
        strip = (tmp_path / "strip.webp").read_bytes()
    Image.new("RGB", (40, 30), "green").save(tmp_path / "figure.png")
    page = report.Page("Pictures of <mine>", ["7 are flagged."], [tmp_path / "figure.png"], "images", split, verdict)
    report.write(tmp_path / "report.html", page, (strip for _ in range(count)))
    return tmp_path / "report.html", score


def test_hostile_names_show_as_text(browser: Browser, tmp_path: Path) -> None:
    path, score = written(tmp_path, NAMES)
    page, complaints = opened(browser, path)
    expected = [NAMES[i].replace("\udcff", "\ufffd") for i in np.argsort(-score)]
    assert [name.replace("\udcff", "\ufffd") for name in names_of(page)] == expected
    assert page.title() == "Pictures of <mine>" and page.locator("h1").text_content() == "Pictures of <mine>"
    assert page.locator("#gallery img").count() == len(NAMES) and page.locator("script").count() == 2
    assert complaints == []
    page.close()


def test_hostile_classes_can_be_chosen(browser: Browser, tmp_path: Path) -> None:
    """Each name chooses the pictures of its class, also one of bytes that are no UTF-8."""
    classes = (*NAMES, "", "carriage\rreturn")
    pictures = [f"{i}.png" for i in range(3 * len(classes))]
    path, score = written(tmp_path, pictures, classes=classes)
    page, complaints = opened(browser, path)
    options = page.locator("#class option")
    assert options.count() == len(classes)  # "all", and every class but the one without a name
    for number, name in enumerate(sorted(set(classes) - {""})):
        page.select_option("#class", index=1 + number)
        expected = [i for i in np.argsort(-score) if classes[i % len(classes)] == name]
        assert names_of(page) == [pictures[i] for i in expected], name
    assert complaints == []
    page.close()


def test_sorting_filters_and_pages(browser: Browser, tmp_path: Path) -> None:
    names = [f"part {i:03d}.png" for i in range(130)]
    path, score = written(tmp_path, names)
    page, complaints = opened(browser, path)
    down = [names[i] for i in np.argsort(-score)]
    assert names_of(page) == down[:48]
    assert page.locator("#page").text_content() == "page 1 of 3" and page.locator("#previous").is_disabled()
    page.click("#next")
    assert names_of(page) == down[48:96]
    page.keyboard.press("ArrowRight")
    assert names_of(page) == down[96:] and page.locator("#next").is_disabled()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Control+ArrowLeft")  # the browser's own
    page.keyboard.press("ArrowLeft")
    assert names_of(page) == down[48:96]
    assert page.locator("#count").text_content() == "130 of 130 images, here 49 to 96"

    page.select_option("#sort", "low")
    assert names_of(page) == down[::-1][:48]
    page.select_option("#score", "residual")  # the other way round
    assert names_of(page) == down[:48]
    page.select_option("#sort", "name")
    assert names_of(page) == names[:48]

    page.select_option("#score", "anomaly_score")
    page.check("#flagged")
    assert names_of(page) == [name for name, value in zip(names, score, strict=True) if value >= 0.9]
    assert page.locator("#count").text_content() == "13 of 130 images"
    assert page.locator("#gallery li.flagged").count() == 13
    page.uncheck("#flagged")
    page.select_option("#class", label="very bad")
    assert names_of(page) == names[1::2][:48]
    page.fill("#search", "PART 01")
    assert names_of(page) == [f"part {i:03d}.png" for i in (11, 13, 15, 17, 19)]
    page.fill("#search", "nothing like it")
    assert names_of(page) == [] and page.locator("#page").text_content() == "page 1 of 1"
    page.fill("#search", "")
    page.keyboard.press("ArrowRight")  # in a field the arrow moves the cursor, not the page
    assert page.locator("#page").text_content() == "page 1 of 2"

    # every control can be reached and used without a mouse
    page.select_option("#class", "")
    page.focus("#sort")
    reached = set()
    for _ in range(8):
        reached.add(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"sort", "score", "flagged", "class", "search", "next"} <= reached
    page.focus("#next")
    page.keyboard.press("Enter")
    assert page.locator("#page").text_content() == "page 2 of 3"
    assert complaints == []
    page.close()


def test_on_a_phone_and_printed(browser: Browser, tmp_path: Path) -> None:
    path, _ = written(tmp_path, [*NAMES, "x" * 200])
    page, complaints = opened(browser, path, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing to scroll sideways
    page.emulate_media(media="print")
    assert not page.locator("form").is_visible() and not page.locator("#pages").is_visible()
    assert page.locator("#gallery").is_visible() and page.locator("#count").is_visible()
    assert complaints == []
    page.close()


def test_ten_thousand_images(browser: Browser, tmp_path: Path) -> None:
    """The file is bounded, and the page holds no more than one page of pictures."""
    strip = np.random.default_rng(0).bytes(
        6000
    )  # as large as a strip of detailed 128x128 images; no browser decodes it
    path, score = written(tmp_path, [f"{i}.png" for i in range(10_000)], strip)
    shown = report.PICTURE_BYTES // 6000
    assert path.stat().st_size < 60_000_000
    page, _ = opened(browser, path)
    assert f"the {10_000 - shown:d} least anomalous images are without" in page.locator(".none").text_content()
    assert page.locator("#gallery li").count() == page.locator("#gallery img").count() == 48
    page.select_option("#sort", "low")
    assert names_of(page)[0] == f"{score.argmin()}.png" and page.locator("#gallery img").count() == 0
    assert page.locator("#gallery li").count() == 48
    page.close()


def test_the_report_of_a_run(browser: Browser, digits_workdir: Path, tmp_path: Path) -> None:
    """Written by evaluate.py: every test image with its score as in scores.csv, pictures that a browser can show."""
    run_dir = digits_workdir / "outputs/digits-0"
    page, complaints = opened(browser, run_dir / "report.html")
    with (run_dir / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    ranked = sorted(rows, key=lambda row: -float(row["anomaly_score"]))
    assert names_of(page) == [row["source"] for row in ranked[:48]]
    assert page.locator("#count").text_content() == f"{len(rows)} of {len(rows)} images, here 1 to 48"
    flagged = [row["source"] for row in ranked if row["flagged"] == "1"]
    page.check("#flagged")
    assert names_of(page) == flagged[:48]
    sizes = page.eval_on_selector_all("#gallery img", "all => all.map(each => [each.naturalWidth, each.naturalHeight])")
    assert sizes == [[128, 32]] * len(flagged[:48])
    assert page.locator("tr.verdict").count() == 1
    figures = page.eval_on_selector_all("img.figure", "all => all.map(each => each.naturalWidth)")
    assert len(figures) == 3 and min(figures) > 300
    assert complaints == []
    page.close()
