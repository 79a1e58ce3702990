"""The page as a file: complete, small, true to its numbers, safe with hostile text, whatever is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_run
import pytest
from parsed import Page

from klimb.report import write_report
from klimb.report.charts import span, span_above
from klimb.report.load import load
from klimb.report.page import HERE

MEGABYTE = 1_000_000
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "--></style><svg onload=document.title='owned'>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[2J\u202eowned\u2066",
    "]]>&lt;b&gt;<b>bold</b>",
]


def chromium(path: Path, *flags: str) -> str:
    """The DOM after the page has run, from a headless browser."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here: that nothing runs is checked by parsing only")
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    command = [found, *quiet, profile, *flags, "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def hostile_pipeline(root: Path) -> Path:
    """Model text, names and events that want out of their place."""
    fake_run.pipeline(root)
    told = json.loads((root / "summary.json").read_text())
    told["name"] = HOSTILE[0]
    result = told["stages"]["grpo"]
    old, evil = result["method"], "GRPO " + HOSTILE[0]
    result["method"] = told["rows"][2]["method"] = evil
    assert old == "GRPO β=0.15"
    result["algorithm"] = HOSTILE[2]
    fake_run.as_json(root / "grpo" / "result.json", result)
    fake_run.as_json(root / "summary.json", told)
    asked = [
        {"prompt": text, "replies": [{"method": evil, "completion": text, "bill": [[text, 1.0, text]]}]}
        for text in HOSTILE
    ]
    (root / "replies.json").write_text(json.dumps(asked))
    fake_run.lines(root / "grpo" / "events.jsonl", [{"step": 1, "kind": text, "message": text} for text in HOSTILE])
    (root / "grpo" / "config.yaml").write_text(f"prompt: {HOSTILE[0]}\n")
    return root


def test_one_small_file_without_any_address(pipeline: Path, page: str) -> None:
    assert len(page.encode()) < MEGABYTE
    for element in Page(page).elements:
        for key in ("src", "href", "srcset", "action", "data", "poster", "background", "formaction"):
            assert key not in element.attributes, f"<{element.name} {key}=…> points somewhere"
        assert not [key for key in element.attributes if key.startswith("on")]
        assert "style" not in element.attributes  # the policy forbids it, so it would do nothing
    assert "@import" not in page
    assert "url(" not in page
    assert [path.name for path in pipeline.iterdir() if path.name.startswith(".")] == []


def test_policy_allows_exactly_our_style_and_script(page: str) -> None:
    parsed = Page(page)
    policy = parsed.named("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for name, directive in (("style", "style-src"), ("script", "script-src")):
        blocks = [block for block in parsed.named(name) if block.attributes.get("type") != "application/json"]
        digests = [base64.b64encode(hashlib.sha256(block.text.encode()).digest()).decode() for block in blocks]
        assert len(digests) == 1
        assert f"{directive} 'sha256-{digests[0]}';" in policy


def test_table_says_what_the_summary_says(pipeline: Path, page: str) -> None:
    rows = json.loads((pipeline / "summary.json").read_text())["rows"]
    table = Page(page).named("table", **{"class": "results"})[0]
    lines = table.children[1].children
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        assert row["method"] in line.children[0].text
        cells = {cell.attributes.get("data-name"): cell for cell in line.children}
        for name in ("proxy", "gold", "KL", "time"):
            value = row[{"KL": "kl", "time": "seconds"}.get(name, name)]
            assert float(cells[name].children[0].attributes["value"]) == value
        interval = [float(data.attributes["value"]) for data in cells["gold"].children[1].children]
        assert interval == [row["gold_low"], row["gold_high"]]
        assert f"{row['gold']:.2f}".replace("-", "−") in cells["gold"].text


def test_the_whole_story_is_there(page: str) -> None:
    parsed = Page(page)
    answer = next(e for e in parsed.elements if e.attributes.get("class", "").startswith("answer")).text
    assert "Better. GRPO β=0.15: gold 1.62 [1.55, 1.69] against 0.97 [0.90, 1.04] after SFT, at KL 1.3." in answer
    assert "the reward model was climbed, not the task" in answer
    assert "simulated" in answer
    titles = [element.text for element in parsed.named("b")]
    wanted = ["Reward (proxy)", "Gold", "KL to the reference", "Entropy", "Length", "Clip fraction"]
    for title in [
        *wanted,
        "Explained variance",
        "Gradient norm",
        "Groups without variance",
        "Accuracy",
        "Loss",
    ]:
        assert title in titles
    assert "exact over the whole vocabulary" in page
    assert "hf_abcdef" not in page
    assert "grovelling" in page
    assert len(parsed.named("svg", **{"class": "chart wide"})) == 1
    assert len(parsed.named("svg", **{"class": "chart narrow"})) == 1


def test_picture_puts_marks_where_the_rows_are(page: str) -> None:
    """Marks of rows, read back from the SVG, lie as far apart as their √KL says."""
    marks = {}
    for title in Page(page).named("title"):
        if found := re.match(r"(.+?): gold (\S+) .* at KL (\S+)$", title.text):
            marks[found[1]] = float(found[3])
    assert marks["GRPO β=0"] == 32.0
    centres = {}
    for path, method in re.findall(r'<path d="M([^"]+)z" class="mark c\d"><title>([^:]+): gold', page):
        points = [tuple(map(float, point.split())) for point in path.split("L")]
        centres.setdefault(method, sum(x for x, _ in points) / len(points))
    # Triangles and the like are centred too: their corners are regular around the point.
    unit = (centres["GRPO β=0"] - centres["SFT"]) / 32**0.5
    assert (centres["DPO β=0.1"] - centres["SFT"]) / unit == pytest.approx(2.63**0.5, abs=2e-3)  # rounded to 0.1 px


def test_one_policy_that_fell_very_far_does_not_press_the_others_into_a_line(tmp_path: Path) -> None:
    fake_run.pipeline(tmp_path)
    told = json.loads((tmp_path / "summary.json").read_text())
    free = next(row for row in told["rows"] if row["method"] == "GRPO β=0")
    free |= {"gold": -48.39, "gold_low": -48.63, "gold_high": -48.14}
    fake_run.as_json(tmp_path / "summary.json", told)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "GRPO β=0 −48.39 ▼" in page  # its mark lies on the lower edge and says how far down it is
    assert page.count("◀ off the scale") == 1
    golds = [row["gold"] for row in told["rows"] if row["gold"] is not None and row["method"] != "GRPO β=0"]
    low, high = span_above([*golds, -48.39], fake_run.SFT_GOLD)
    assert low < fake_run.SFT_GOLD < max(golds) < high
    assert (high - fake_run.SFT_GOLD) / (high - low) == pytest.approx(0.2, abs=0.05)
    assert span_above(golds, fake_run.SFT_GOLD) == span(golds)  # nothing is cut where nothing fell


def test_same_colour_for_a_method_everywhere(page: str) -> None:
    seen: dict[str, set[str]] = {}
    for element in Page(page).elements:
        if element.attributes.get("class") == "method":
            marks = [e for e in element.children[0].children if e.attributes["class"].startswith("mark")]
            seen.setdefault(element.text.strip(), set()).add(marks[0].attributes["class"])
    assert all(len(classes) == 1 for classes in seen.values())
    assert len({next(iter(classes)) for classes in seen.values()}) == len(seen)


def _colours(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", css))


def _luminance(colour: str) -> float:
    """WCAG 2.1 relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_and_line_colour_has_contrast(dark: bool) -> None:
    css = (HERE / "style.css").read_text()
    light, dark_css = css.split("@media screen and (prefers-color-scheme: dark)")[:2]
    colours = _colours(dark_css.split("* {")[0] if dark else light)
    methods = [f"c{index}" for index in range(10)]
    for name in ["text", "faint", "good", "bad", "open", *methods]:
        for ground in ("card", "page"):
            pair = sorted([_luminance(colours[name]), _luminance(colours[ground])])
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, ground)
    assert (max(_luminance(colours["note"]), _luminance(colours["text"])) + 0.05) / (
        min(_luminance(colours["note"]), _luminance(colours["text"])) + 0.05
    ) >= 4.5


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = write_report(hostile_pipeline(tmp_path)).read_text(encoding="utf-8")
    parsed = Page(page)
    scripts = parsed.named("script")
    assert len(scripts) == 2
    assert scripts[0].attributes == {"type": "application/json", "id": "series"}
    json.loads(scripts[0].text)
    assert len(parsed.named("style")) == 1
    assert not parsed.named("img")
    assert not [element for element in parsed.elements if any(key.startswith("on") for key in element.attributes)]
    said = [e.text for e in parsed.elements if e.attributes.get("class") == "said"]
    for text in HOSTILE[:4]:
        assert text in said
    assert "␛[2J⟨U+202E⟩owned⟨U+2066⟩" in said
    assert "\x1b" not in page
    assert "\u202e" not in page


@pytest.mark.slow
def test_hostile_text_does_nothing_in_a_browser(tmp_path: Path) -> None:
    dom = chromium(write_report(hostile_pipeline(tmp_path)))
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    assert title[1].startswith("&lt;/script&gt;")  # still the name that it was given, as text
    assert dom.count("<script") == 2
    assert 'class="plot drawn"' in dom  # our own script did run


@pytest.mark.slow
def test_every_panel_is_drawn_in_a_browser(pipeline: Path, page: str, tmp_path: Path) -> None:
    copy = tmp_path / "report.html"
    copy.write_text(page, encoding="utf-8")
    dom = chromium(copy)
    panels = len(re.findall(r'class="plot"', page))
    assert panels >= 15
    assert dom.count('class="plot drawn"') == panels
    assert dom.count("<canvas") == panels


def test_several_seeds(tmp_path: Path) -> None:
    page = write_report(fake_run.seeds(tmp_path, 5)).read_text(encoding="utf-8")
    assert len(page.encode()) < MEGABYTE
    assert "seeds 0, 1, 2, 3, 4" in " ".join(Page(page).named("p", **{"class": "meta"})[0].text.split())
    assert "GRPO β=0.15 5 of 5" in page
    assert "5 × " in page
    (tmp_path / "summary.json").unlink()
    assert "not summarised yet" in write_report(tmp_path).read_text(encoding="utf-8")


def test_stages_that_have_seeds_of_their_own(tmp_path: Path) -> None:
    fake_run.pipeline(tmp_path)
    for name in ("result", "manifest"):
        file = tmp_path / "reward" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 7}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    seeds = dict(re.findall(r'<tr><td>(\w+)</td><td class="num">(\w*)</td>', page))
    assert (seeds["sft"], seeds["reward"]) == ("0", "7")


def test_a_single_run_and_one_that_is_still_going(tmp_path: Path) -> None:
    fake_run.pipeline(tmp_path)
    page = write_report(tmp_path / "grpo").read_text(encoding="utf-8")
    assert "no baseline here" in page
    assert "not shown</td>" not in page
    assert "proxy 0." in page  # from where to where the batches went
    (tmp_path / "grpo" / "result.json").unlink()
    metrics = tmp_path / "grpo" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    page = write_report(tmp_path / "grpo").read_text(encoding="utf-8")
    assert "No result yet: grpo (step 79)" in page
    assert "line 80" in page


@pytest.mark.parametrize(
    "broken",
    [
        "summary.json", "replies.json", "config.yaml", "sft", "reward", "best-of-n", "dpo",
        "grpo/metrics.jsonl",
        "grpo/result.json", "grpo-free/events.jsonl", "ppo/manifest.json", "grpo/config.yaml",
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "empty", "garbage", "wrong"])
def test_whatever_is_missing_or_broken_shortens_the_report(tmp_path: Path, broken: str, how: str) -> None:
    path = fake_run.pipeline(tmp_path) / broken
    if path.is_dir():
        shutil.rmtree(path)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "garbage": b'{"step": 1, \xff\x00',
                "wrong": b'[{"rows": 3, "step": [1]}, null, 7]',
            }[how]
        )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "PPO β=0.15" in page
    assert "</html>" in page


def test_a_step_written_twice_counts_as_written_last(tmp_path: Path) -> None:
    """A run killed between its metrics and its checkpoint repeats steps when it is resumed."""
    steps = [
        {"step": 1, "kl": 1.0},
        {"step": 2, "kl": 7.0},
        {"step": 2, "kl": 2.0},
        {"step": 3, "kl": math.nan},
    ]
    fake_run.lines(tmp_path / "metrics.jsonl", steps)
    assert load(tmp_path).runs[0].metrics == [{"step": 1, "kl": 1}, {"step": 2, "kl": 2}, {"step": 3}]


def test_rows_of_the_wrong_shape(tmp_path: Path) -> None:
    rows = [{"method": "SFT", "gold": "high"}, {"method": None, "gold": float("nan"), "kl": -0.2}, 7, {}]
    fake_run.as_json(tmp_path / "summary.json", {"rows": rows, "stages": {"a": 3, "rl": {"stage": "rl", "curve": 5}}})
    assert "</html>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_an_empty_directory_and_none_at_all(tmp_path: Path) -> None:
    assert "Nothing has been written here yet" in write_report(tmp_path).read_text(encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="no directory to report on"):
        write_report(tmp_path / "nowhere")


def test_no_gold(tmp_path: Path) -> None:
    fake_run.pipeline(tmp_path)
    told = json.loads((tmp_path / "summary.json").read_text())
    for row in told["rows"]:
        row["gold"] = row["gold_low"] = row["gold_high"] = None
    fake_run.as_json(tmp_path / "summary.json", told)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "no gold was given" in page
    assert "better</td>" not in page


def test_replies_from_samples_where_nobody_wrote_them(tmp_path: Path) -> None:
    fake_run.pipeline(tmp_path)
    (tmp_path / "replies.json").unlink()
    for run, method in (("grpo", "leashed says"), ("grpo-free", "free says")):
        for step in (1, 80):
            rows = [
                {"prompt_id": "p1", "prompt": "tea ?", "sample": sample, "gold": None,
                 "completion": f"{method} {step}/{sample}", "score": 0.5}
                for sample in (1, 0)
            ]  # fmt: skip
            fake_run.samples(tmp_path / run / "samples" / f"step-{step:06d}.parquet", rows)
    (tmp_path / "ppo" / "samples").mkdir()
    (tmp_path / "ppo" / "samples" / "step-000001.parquet").write_bytes(b"PAR1 cut short")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    said = [e.text for e in Page(page).elements if e.attributes.get("class") == "said"]
    assert said == ["tea ?", "leashed says 80/0", "free says 80/0"]
    assert "ppo/samples/step-000001.parquet cannot be read" in page


@pytest.mark.slow
def test_large_inputs_stay_below_a_megabyte(tmp_path: Path) -> None:
    fake_run.seeds(tmp_path, 10)
    reply = {"method": "SFT", "completion": "词" * 20_000, "bill": []}
    (tmp_path / "replies.json").write_text(json.dumps([{"prompt": "p", "replies": [reply] * 9}] * 9))
    fake_run.lines(
        tmp_path / "seed-0" / "grpo" / "events.jsonl",
        [{"step": i, "kind": "drop", "message": "x" * 9000} for i in range(2000)],
    )
    (tmp_path / "config.yaml").write_text("a: b\n" * 100_000)
    assert write_report(tmp_path).stat().st_size < MEGABYTE


def test_writing_a_report_needs_no_torch(pipeline: Path) -> None:
    code = "import sys, pathlib; from klimb.report import write_report; write_report(pathlib.Path(sys.argv[1]))"
    code += "; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code, str(pipeline)], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
