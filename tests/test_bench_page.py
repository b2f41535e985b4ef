"""Results as a page, plots and Markdown: whole, self-contained, readable at any width, true to the figures."""

from __future__ import annotations

import io
import random
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
from browser import BROWSER, assert_readable, look
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import kernel_table, markdown, page, plots, shown, tables
from benchmarks.results import (
    BackendResult,
    Energy,
    Fixed,
    KernelResult,
    Machine,
    Parity,
    Peak,
    Result,
    Score,
    Speed,
    Work,
    load,
    save,
)
from cli import cli
from console.output import Screen
from core.errors import UserError
from core.paths import project_root

SHIPPED = project_root() / "benchmarks" / "results"
WORK = Work(
    "tiny", 1, "kjv", "a" * 64, "b" * 64, "c" * 64, 2048, 256, 2048, 8, {"DEPTH": 4}, 1_835_144, 32, 32768, 10.0
)
PEAK = Peak(2e11, "measured: products", 1.6e10, "measured: copies")


def backend(name: str, step: float, seed: int = 1) -> BackendResult:
    rng = random.Random(seed)
    times = [step * rng.uniform(0.98, 1.02) for _ in range(5)]
    curve = [(0.1 * t, t, 2048 * t, 7.0 - 0.05 * t * rng.uniform(0.9, 1.1)) for t in range(1, 60)]
    scores = [Score(42 + i, 2.2 + 0.01 * i, "", 99, 204800, 10.0, 1.1, 15.0, 32768, curve) for i in range(3)]
    waits = [[2.0 + 0.1 * i for i in range(5)], [0.2] * 2, [1.5] * 2]
    return BackendResult(
        name, "measured", device="cpu", dtype="float32", flops_per_token=9e6, peak=PEAK,
        parity=[Parity("logits", "float32", "reference", 1, "logits", 3e-7, 2e-5, True)],
        speed=Speed(times, [0, 1, 2, 3, 4], 28, 2048, [3e4] * 5, *waits, [4e8] * 2), fixed=Fixed(32, 5.0, curve),
        scores=scores, energy=Energy(0.0011, 60.0, "RAPL: package-0"),
    )  # fmt: skip


def kernels(name: str) -> list[KernelResult]:
    rng, found = random.Random(2), []
    for part, flops, moved in (
        ("attention", 1e9, 4e6),
        ("mlp", 3e9, 2e7),
        ("head", 2e10, 4e7),
        ("optimizer", 2e9, 6e7),
    ):
        for way, ours, rate in (("recipe", True, 0.6), ("PyTorch SDPA", False, 0.3), ("plain", False, 0.2)):
            seconds = [flops / (min(2e11, 1.6e10 * flops / moved) * rate) * rng.uniform(0.95, 1.05) for _ in range(7)]
            found.append(KernelResult(part, way, name, "both", "float32", "B 8, T 256", seconds, flops, moved, 1e-6,
                                      1e-4, True, ours=ours, inputs=4))  # fmt: skip
    refused = replace(found[0], way="fa3", seconds=[], error=None, passed=False, ours=False, note="it needs sm_90")
    return [*found, refused]


def a_result(label: str = "AMD EPYC, 2 cores, 24 GiB", speed: float = 1.0, work: Work = WORK) -> Result:
    machine = Machine(label, "linux", "6.1", "x86_64", label, ["avx2"], 2, 2, 2**34, [], False, False,
                      {"python": "3.11.9", "torch": "2.13.0"}, "0" * 16)  # fmt: skip
    backends = [
        backend("cpu", 0.06 / speed), backend("mlx", 0.15 / speed, 3),
        BackendResult("rtx", "crashed", reason="killed by SIGKILL in the middle of repeat 2"),
        BackendResult("cuda", "different", departs=["the sliding window is dropped"]),
    ]  # fmt: skip
    return Result(
        work, work.id(), machine, "2026-11-28", True, 96.0, backends, kernels("cpu"), {"cpu/float32": PEAK},
        ["another program used 40 % of a core"],
    )  # fmt: skip


def three() -> list[Result]:
    return [a_result(), a_result("Apple M4 Max, 16 cores, 64 GiB", 9.0), a_result("NVIDIA H100 80GB HBM3", 80.0)]


# --- whole and true ------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Tags in balance, and nothing that is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self._looked_at(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._looked_at(attrs)

    def _looked_at(self, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        self.ids += [v for k, v in attrs if k == "id" and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Checker:
    checker = Checker()
    checker.feed(text.removeprefix("<!doctype html>"))
    return checker


@pytest.mark.parametrize("results", [[a_result()], three()], ids=["one", "three"])
def test_the_page_is_whole_and_self_contained(results: list[Result]) -> None:
    text = page.html(results)
    found = parsed(text)
    assert found.open == [] and found.outside == []
    assert len(found.ids) == len(set(found.ids))  # the plots' clip paths must not be each other's
    assert "<script" not in text and not re.search(r"url\((?!#)", text)
    for svg in re.findall(
        r"<svg.*?</svg>", text, re.DOTALL
    ):  # in the dark, a colour that is no variable stays as it is
        assert not re.search(r"(?:fill|stroke): #", svg)
    for words in (
        "killed by SIGKILL",
        "the sliding window is dropped",
        "another program used",
        "fa3",
        "RAPL: package-0",
    ):
        assert words in found.text
    for result in results:
        assert result.machine.label in found.text


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
def test_nothing_that_a_file_says_becomes_markup(text: str) -> None:
    """Plots are left out here: they take seconds."""
    strange = BackendResult(text, "crashed", reason=text)
    one = replace(a_result(text), backends=[strange], kernels=[], notes=[text])
    found = parsed(page.html([one]))
    assert found.open == [] and found.outside == []
    assert text.split() == [] or text.split()[0] in found.text
    for line in markdown.table([one]).splitlines():
        assert "<script" not in line and not line.startswith("#" * 4)


def test_tables_have_as_many_cells_as_heads() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", markdown.table(three()), re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_figures_are_medians_with_their_range() -> None:
    (cpu, _) = shown.series([a_result()])
    times = cpu.backend.speed.tokens_per_second()  # type: ignore[union-attr]
    text = shown.SPEED[0].text(cpu)
    assert text.startswith(f"{sorted(times)[2] / 1e3:.3g}k (") and f"{max(times) / 1e3:.3g}k)" in text
    assert shown.spread([], str) == "-" and shown.spread([2.0, 2.0], str) == "2.0"


def test_an_experiment_of_a_night_does_not_compile_what_the_first_process_has() -> None:
    (cpu, _) = shown.series([a_result()])
    assert cpu.backend.speed is not None
    compiled = replace(cpu.backend.speed, compile_seconds=[34.0, 0.2])
    one = replace(cpu, backend=replace(cpu.backend, speed=compiled))
    (axes,) = plots.waits([one]).axes  # type: ignore[union-attr]
    assert sum(bar.get_width() for bar in axes.patches) < 5.0


def test_experiments_a_night_and_energy_stand_beside_speed() -> None:
    heads, lines = shown.grid(shown.series([a_result()]), shown.NIGHT)
    night = dict(zip(heads, lines[0], strict=True))
    assert night["runs in 8 h"] == f"{8 * 3600 / 305:.0f}" and night["energy per 1000 tokens"] == "1.1 J"


def test_results_of_different_work_are_never_in_one_table() -> None:
    other = replace(WORK, context=512)
    text = markdown.table([a_result(), a_result("another PC", work=other)])
    assert text.count("### Profile tiny") == 2 and "A: " not in text
    assert page.html([a_result(), a_result("another PC", work=other)]).count("<section>") == 2


def test_one_backend_only_and_none_at_all() -> None:
    alone = replace(a_result(), backends=[backend("cpu", 0.06)], kernels=[], kernel_peaks={})
    assert "Side by side" not in page.html([alone]) and "Training speed" in page.html([alone])
    nothing = replace(alone, backends=[BackendResult("cuda", "unavailable", reason="no NVIDIA GPU was found")])
    text = page.html([nothing])
    assert "Nothing was measured." in text and "<figure>" not in text and "no NVIDIA GPU was found" in text


def test_upstreams_attention_is_named_wherever_its_figures_are() -> None:
    said = "flex over 128, flash over 256, in the place of what upstream downloads (fa3: <not> installed)"
    peer = replace(backend("upstream", 0.2), attention=said)
    for attention in (said, ""):
        result = replace(a_result(), backends=[backend("cpu", 0.06), replace(peer, attention=attention)])
        with redirect_stdout(io.StringIO()) as printed:
            tables.show(Screen(False), [result])
        texts = (page.html([result]), markdown.table([result]), " ".join(printed.getvalue().split()))
        assert ["in the place of what upstream downloads" in text for text in texts] == [bool(attention)] * 3
        assert "<not>" not in texts[0] + texts[1]


# --- kernels -------------------------------------------------------------------------------------


def test_a_peer_stands_to_ours_round_by_round() -> None:
    found = kernels("cpu")
    peer = kernel_table.ratio(found[1], found)
    assert peer is not None and 1.8 < peer.low <= peer.median <= peer.high < 2.2 and not peer.noise
    assert kernel_table.ratio(found[0], found) is None and kernel_table.ratio(found[-1], found) is None
    drifting = replace(found[1], seconds=[s * (1.001, 0.999)[i % 2] for i, s in enumerate(found[0].seconds)])
    equal = kernel_table.ratio(drifting, found)
    assert equal is not None and equal.noise  # the machine's drift hits both, and cancels


def test_the_roof_is_the_lower_of_products_and_memory() -> None:
    (attention, *_), heavy = kernels("cpu"), replace(kernels("cpu")[0], flops=1.6e11, bytes=1e6)
    light = replace(attention, flops=1e6, bytes=1e6)
    assert kernel_table.roof(heavy, PEAK) == 2e11 and kernel_table.roof(light, PEAK) == 1.6e10


# --- files ---------------------------------------------------------------------------------------


def test_files_are_written_together(tmp_path: Path) -> None:
    written = page.write([a_result()], tmp_path / "out")
    names = {"throughput", "loss", "memory", "val_bpb", "night", "roofline-cpu-float32"}
    assert {p.name for p in written} == {"index.html", "results.md", *(f"{name}.png" for name in names)}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in written}
    for png in (tmp_path / "out").glob("*.png"):
        pixels = matplotlib.image.imread(io.BytesIO(png.read_bytes()))
        assert pixels.shape[1] == round(plots.WIDTH * plots.PNG_DPI)
        dark = (pixels[..., :3].mean(axis=-1) < 0.6).mean()
        assert 0.005 < dark < 0.5, png.name  # drawn on, and mostly ground


def test_no_space_for_the_page_leaves_the_old_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk needs root on Linux")
    try:
        (disk / "index.html").write_text("the old one")
        with pytest.raises(UserError, match=r"has .* left, a page may need 16"):
            page.write([a_result()], disk)
        assert (disk / "index.html").read_text() == "the old one" and len(list(disk.iterdir())) == 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_in_the_way_and_no_results_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        page.write([a_result()], tmp_path / "file")
    with pytest.raises(UserError, match="no result to show"):
        page.write([], tmp_path / "out")


# --- in a browser --------------------------------------------------------------------------------


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is checked as text only")
@pytest.mark.parametrize(("width", "results"), [(375, [a_result()]), (375, three()), (1280, three())],
                         ids=["phone", "phone, three machines", "desktop, three machines"])  # fmt: skip
def test_the_page_in_a_browser(width: int, results: list[Result], tmp_path: Path) -> None:
    assert_readable(look(page.html(results), width, tmp_path), figures=len(page.pictures(results)))


# --- bench page ----------------------------------------------------------------------------------


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "page", *argv])
    return int(ended.value.code or 0)


def test_many_files_make_one_page_and_a_damaged_one_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, result in enumerate(three()[:2]):
        save(result, tmp_path / f"{i}.json")
    (tmp_path / "damaged.json").write_text("{")
    files = [str(tmp_path / name) for name in ("0.json", "1.json", "damaged.json")]
    assert run(*files, "--out", str(tmp_path / "out")) == 1
    told = capsys.readouterr()
    assert "2 results on" in told.out and "left out: " in told.err and "damaged.json" in told.err
    text = (tmp_path / "out" / "index.html").read_text()
    assert "A: AMD EPYC" in text and "B: Apple M4 Max" in text
    assert run(files[2], "--out", str(tmp_path / "other")) == 1
    assert "none of 1 file can be read" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(("platform", "told"), [("win32", "2 results on"), ("linux", "")])
def test_a_pattern_is_resolved_where_no_shell_does_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], platform: str, told: str
) -> None:
    """PowerShell hands `*.json` and `~` on as they were typed."""
    for i, result in enumerate(three()[:2]):
        save(result, tmp_path / f"{i}.json")
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert run("~/*.json", "--out", "~/out") == (0 if told else 1)
    said = capsys.readouterr()
    assert told in said.out and ("*.json" in said.err) == (not told)
    assert (tmp_path / "out" / "index.html").exists() == bool(told)
    assert run("~/none*.json", "--out", "~/out") == 1
    assert "none*.json" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows takes any name's folder to be beside one's own")
def test_a_user_that_nobody_knows_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("~no-such-user/a.json") == 2
    assert "~no-such-user stands for no known user's folder" in capsys.readouterr().err


def test_results_that_are_shipped_can_be_read_and_name_no_folder() -> None:
    assert (SHIPPED / "README.md").is_file()
    for file in SHIPPED.glob("*"):
        if file.name != "README.md":
            assert load(file).measured(), file.name
            assert not re.search(r"/(?:home|Users|root|tmp|work)/", file.read_text()), file.name
