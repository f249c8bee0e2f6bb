"""The map: paired differences, equal costs, verdicts, and the page that is made of them."""

import json
import math
from pathlib import Path

import pytest
from made_records import by_arm, record

from benchmarks.replication import again, basis, compare, ladder, overview, page, prose, tables
from benchmarks.replication.arms import LADDER, MAIN, MORE, SEEDS, THINKING
from benchmarks.replication.compare import Verdict, judge, refined, single_shot
from igrpo_algo.cli.intervals import Interval
from igrpo_algo.early_warning import EarlyWarning

GRPO = [(0.60, 0.50), (0.64, 0.52), (0.62, 0.54)]
AHEAD = [(0.60, 0.60), (0.65, 0.63), (0.62, 0.64)]


def test_differences_are_paired_by_seed() -> None:
    arms = by_arm(grpo=GRPO, worst=AHEAD)
    gap = compare.difference(arms, "worst", "grpo", refined)
    assert gap.mean == pytest.approx((0.10 + 0.11 + 0.10) / 3)
    # std of .10, .11, .10 is .01 / sqrt 3; t of 2 degrees of freedom is 4.3027.
    assert gap.high - gap.mean == pytest.approx(4.3027 * 0.01 / 3, rel=1e-4)


def test_the_bootstrap_resamples_the_pairs() -> None:
    arms = by_arm(grpo=GRPO, worst=AHEAD)
    gap = compare.resampled(arms, "worst", "grpo", refined)
    # Of the 27 resamples one each is all .10's pair or all .11: the percentiles reach both ends.
    assert gap == pytest.approx((0.31 / 3, 0.10, 0.11))
    once = compare.resampled(by_arm(grpo=GRPO[:1], worst=AHEAD), "worst", "grpo", refined)
    assert once.mean == pytest.approx(0.10)
    assert math.isnan(once.low)


def test_a_verdict_needs_both_intervals() -> None:
    """Five gaps of one sign: the bootstrap leaves zero out, Student's interval does not."""
    worst = [(0.5, 0.5 + gap) for gap in (0.01, 0.01, 0.01, 0.01, 0.2)]
    arms = by_arm(grpo=[(0.5, 0.5)] * 5, worst=worst)
    versus = (arms, "worst", "grpo", refined)
    assert compare.resampled(*versus).excludes_zero
    assert not compare.difference(*versus).excludes_zero
    assert compare.verdict_on(*versus) is Verdict.OPEN
    narrow, wide = Interval(0.0, -0.01, 0.01), Interval(0.0, -0.05, 0.05)
    assert judge(narrow, wide) is judge(wide, narrow) is Verdict.OPEN


def test_seeds_without_a_partner_or_an_end_are_left_out() -> None:
    arms = by_arm(grpo=GRPO, worst=AHEAD)
    arms["worst"][1] = {"status": "died", "error": "MemoryError", "curve": [], "steps": []}
    arms["grpo"][7] = record(0.9, 0.9)
    gap = compare.difference(arms, "worst", "grpo", refined)
    assert gap.mean == pytest.approx(0.10)
    assert compare.pairs(*(compare.finished(arms, arm) for arm in ("worst", "grpo"))) == [0, 2]
    assert math.isnan(compare.difference(arms, "best", "grpo", refined).mean)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.2, Verdict.AHEAD),
        (-0.2, -0.001, Verdict.BEHIND),
        (-0.03, 0.03, Verdict.LEVEL),
        (-0.01, 0.031, Verdict.OPEN),
        (-0.031, 0.01, Verdict.OPEN),
        (math.nan, math.nan, Verdict.OPEN),
    ],
)
def test_verdicts(low: float, high: float, verdict: Verdict) -> None:
    assert judge(Interval((low + high) / 2, low, high)) is verdict


def test_a_curve_is_read_between_its_points() -> None:
    points = [(0.0, 0.2), (10.0, 0.4), (10.0, 0.9), (20.0, 1.0)]
    assert compare.interpolate(points, 5) == pytest.approx(0.3)
    assert compare.interpolate(points, 15) == pytest.approx(0.95)
    assert compare.interpolate(points, 20) == pytest.approx(1.0)
    assert math.isnan(compare.interpolate(points, 20.1))


def test_at_equal_cost_the_dearer_arm_is_read_earlier() -> None:
    arms = by_arm(grpo=[(0.6, 0.5)] * 2, worst=[(0.6, 0.5)] * 2)
    for each in arms["worst"].values():  # twice as dear: at step 5 it has spent what GRPO has at 10
        for point in (*each["curve"], each["final"]):
            point["cpu_seconds"] *= 2
    gap = compare.difference_at_equal_cost(arms, "worst", "grpo", "cpu_seconds")
    assert gap.mean == pytest.approx(0.4 - 0.6)
    same = compare.difference_at_equal_cost(arms, "worst", "grpo", "completions")
    assert same.mean == pytest.approx(0.0)


def test_entropy_is_read_where_an_accuracy_is_first_reached() -> None:
    made = record(0.6, 0.5)
    assert compare.entropy_at(made, 0.3) == pytest.approx(1.0 - 0.125)
    made["curve"].insert(1, {"sampled": 0.1, "entropy": 9.0})  # a dip is passed over
    assert compare.entropy_at(made, 0.3) == pytest.approx(1.0 - 0.125)
    assert math.isnan(compare.entropy_at(made, 0.7))


@pytest.mark.parametrize(
    ("second", "holds"),
    [
        (by_arm(grpo=GRPO, worst=GRPO), True),
        (by_arm(grpo=GRPO, worst=[(0.5, 0.6)] * 3), False),  # behind single-shot
        (by_arm(grpo=GRPO, worst=[(0.60, 0.6), (0.7, 0.6), (0.6, 0.6)]), False),  # open
        (by_arm(grpo=GRPO, worst=AHEAD[:2]), False),  # two seeds say nothing
        (by_arm(grpo=GRPO), False),
    ],
)
def test_never_behind_and_somewhere_ahead(second, holds: bool) -> None:
    first = by_arm(grpo=GRPO, worst=AHEAD)
    assert (
        compare.never_behind({"chain-64x2": first, "signs-64x2": second}, "worst", "grpo") is holds
    )


def test_level_everywhere_is_not_ahead() -> None:
    assert not compare.never_behind({"chain-64x2": by_arm(grpo=GRPO, worst=GRPO)}, "worst", "grpo")


def write(folder: Path, place: str, arms) -> None:
    for arm, records in arms.items():
        for seed, each in records.items():
            path = folder / place / f"{arm}-{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"arm": arm, "seed": seed, **each}))


def test_the_pages_from_records(tmp_path: Path) -> None:
    arms = by_arm(grpo=GRPO, grpo_half=GRPO, worst=AHEAD, best=[(0.3, 0.3)] * 4)
    arms["best"][3] |= {"status": "diverged", "error": "a reason", "curve": []}
    arms["worst"][0]["warnings"] = [{"step": 4, "text": "..."}]
    write(tmp_path, "chain-64x2", arms)
    page.write_pages(tmp_path, tmp_path, tmp_path)
    assert (tmp_path / page.PLOT).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / page.LADDER_PLOT).exists()

    first = (tmp_path / page.PAGE).read_text()
    assert "Models of 91,008 weights, trained from scratch" in first
    assert "Never behind GRPO on these tasks (1, with 1 models), and ahead somewhere: *w" in first
    forms = [line for line in first.splitlines() if line.startswith(("| worst", "| best draft (t"))]
    assert forms == [
        "| worst draft | 1 | +0.3 | 0 | 0 | +10.3 | 0 | 1 |",
        "| best draft (the paper) | 1 | -32.0 | 1 | 0 | -22.0 | 1 | 0 |",
    ]
    per_task = [MAIN | MORE, MAIN | MORE, MAIN | MORE, MAIN | THINKING]
    assert f"12 finished runs of {SEEDS * sum(map(len, per_task))} planned" in first
    assert "- chain-64x2, best, seed 3: diverged (a reason)" in first
    assert "Made on: x86_64 (1 thread), torch 2.13, Made: 13 runs." in first
    assert "Here that form was never warned of." in first
    everything = "chain, signs, packing, thinking"
    assert f"Not measured: 128x3 on {everything}; 256x4 on {everything}." in first

    text = (tmp_path / page.TABLES).read_text()
    count = len(per_task[0])
    assert f"| chain-64x2 | 20.0 % | {count} | 12 | 1 | 0 | {SEEDS * count - 13} |" in text
    assert f"| signs-64x2 |  | {count} | 0 | 0 | 0 | {SEEDS * count} |" in text
    row = next(line for line in text.splitlines() if line.startswith("| worst draft | 3 | 62.3 %"))
    assert row.endswith("| 62.3 % | +10.3 [+8.9, +11.8] | [+10.0, +11.0] | **ahead** |")
    assert "| step 4, 1 of 3 runs |" in text
    assert "| **behind** |" in next(x for x in text.splitlines() if x.startswith("| best draft"))
    assert "Up a ladder" not in first + text


def test_forms_stand_in_the_order_of_models_and_then_of_their_worst_difference() -> None:
    behind = [(one - 0.05, two) for one, two in GRPO]
    small = by_arm(grpo=GRPO, worst=behind, best=AHEAD, random=[(0.1, 0.1)] * 3)
    maps = {"chain-64x2": small, "signs-64x2": by_arm(grpo=GRPO, worst=AHEAD, random=AHEAD)}
    assert [row[:5] for row in overview.forms(maps)[1:]] == [
        ["worst draft", "2", "-5.0 to +0.3", "1", "0"],
        ["random draft", "2", "-52.0 to +0.3", "1", "0"],
        ["best draft (the paper)", "1", "+0.3", "0", "0"],
    ]


def rung(gaps: list[float], **arms: list[tuple[float, float]]):
    """GRPO, and the paper's form so far from it, single-shot and draft-then-refine."""
    best = [(one + gap, two - gap) for (one, two), gap in zip(GRPO, gaps, strict=True)]
    return by_arm(grpo=GRPO, best=best, **arms)


def test_sizes_stand_side_by_side(tmp_path: Path) -> None:
    small = rung([-0.10, -0.11, -0.12], worst=AHEAD, none=GRPO)
    large = rung([-0.05, -0.07, -0.06], worst=AHEAD[:2])
    maps = {"chain-128x3": large, "chain-64x2": small, "signs-64x2": small}
    told = "\n".join(ladder.tables(maps))
    head, _, *rows = [line.split(" | ") for line in told.splitlines() if line.startswith("|")]
    sizes = [f"{name}, {size}" for name in tables.MEASURES for size in ("64x2", "128x3")]
    assert [cell.strip(" |") for cell in head] == ["arm", *sizes]
    assert [row[0] for row in rows] == ["| GRPO, 8", "| best draft (the paper)", "| worst draft"]
    assert rows[0][1:3] == ["62.0 %", "62.0 %"]
    assert [cell[:5] for cell in rows[1][1:]] == ["-11.0", "-6.0 ", "+11.0", "+6.0 "]
    assert rows[2][2] == "fewer than 3 seeds"
    text = page.build_page(maps)
    assert f"](../images/{page.LADDER_PLOT})" in text
    assert "Not measured: 128x3 on signs, packing, thinking; 256x4 on chain" in text
    missing = str(len(LADDER) * SEEDS - 8)
    row = ["chain-128x3", "20.0 %", str(len(LADDER)), "8", "0", "0", missing]
    assert row in basis.counts(maps)


def test_what_changes_with_the_size_is_told_from_the_numbers(tmp_path: Path) -> None:
    maps = {
        "chain-64x2": rung([-0.10, -0.11, -0.12]),
        "chain-128x3": rung([-0.05, -0.07, -0.06]),
        "signs-64x2": rung([-0.10, -0.11, -0.12]),
    }
    changes = ladder.changes(ladder.rungs_of(maps))
    # 5, 4 and 6 points: std 1, over sqrt 3, times t of 2 degrees of freedom.
    row = "| best draft (the paper) | chain, 64x2 to 128x3 | single-shot | +5.0 [+2.5, +7.5] |"
    assert row in changes
    assert changes.startswith("From the smallest size to the largest, 2 of 2 differences changed")
    page.draw_ladder(ladder.rungs_of(maps), tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    maps["chain-128x3"] = maps["chain-64x2"]
    assert "none of 2 differences changed" in ladder.changes(ladder.rungs_of(maps))


def test_a_change_is_paired_by_seed() -> None:
    small, large = rung([-0.10, -0.11, -0.12]), rung([-0.05, -0.07, -0.06])
    del small["best"][0]
    gap = compare.change(small, large, "best", "grpo", single_shot)
    assert gap.mean == pytest.approx((0.04 + 0.06) / 2)
    assert math.isnan(compare.change({}, large, "best", "grpo", single_shot).mean)
    flat = by_arm(grpo=[(0.21, 0.21)] * 3)  # GRPO learns nothing: no rung to compare on
    assert ladder.rungs_of({"chain-64x2": small, "chain-128x3": flat}) == {}


def test_every_size_counts_for_the_verdict() -> None:
    """Behind on a larger model, or ahead where it was run: a form run on fewer is told apart."""
    small = by_arm(grpo=GRPO, worst=AHEAD, random=AHEAD, best_6_2=AHEAD)
    large = by_arm(grpo=GRPO, worst=[(0.1, 0.1)] * 3, random=GRPO)
    maps = {"chain-64x2": small, "chain-128x3": large}
    assert overview.takeaway(maps) == (
        "**Never behind GRPO on these tasks (1, with 2 models), and ahead somewhere: "
        "*random draft*.**"
    )
    del large["random"]
    text = overview.takeaway(maps)
    assert text.startswith("**No form of iGRPO was shown to be never behind GRPO on these tasks")
    assert "The only form with 3 seeds on all of them is *worst draft*: behind at" in text
    assert text.endswith(
        "Of the 2 other forms, *random draft*, *best draft, 6 : 2* was never behind on those it "
        "was run on."
    )
    large["worst"], small["random"], small["best-6-2"] = small["worst"], {}, large["worst"]
    maps["signs-64x2"] = by_arm(grpo=GRPO, worst=AHEAD[:2])  # no form to be judged there yet
    text = overview.takeaway(maps)
    assert text.endswith("(1, with 2 models), and ahead somewhere: *worst draft*.**")


def test_forms_are_compared_at_their_better_use() -> None:
    """GRPO is better single-shot, 62.0 %, a form at draft-then-refine, 59.3 % in the mean."""
    worst = [(0.3, 0.57), (0.3, 0.62), (0.3, 0.59)]
    arms = by_arm(grpo=GRPO, worst=worst, best=[(0.3, 0.3)] * 3, best_twice=[(0.9, 0.9)] * 3)
    text = tables.used_best(arms)
    assert "GRPO has 62.0 %; of 2 forms with one update, *worst draft* does best: -2.7 [" in text
    assert text.endswith("] points, behind.")
    assert tables.used_best(by_arm(grpo=GRPO)) == ""


def test_thinking_shown_is_compared_with_thinking_stripped() -> None:
    arms = by_arm(grpo=GRPO, best=GRPO, thinking_kept=AHEAD)
    text = tables.section("thinking-64x2", arms)
    shown = "Thinking shown less thinking stripped: *best draft (the paper)*, single-shot +0.3 ["
    assert shown in text
    assert "draft-then-refine +10.3 [+8.9, +11.8]." in text
    assert "Thinking shown" not in tables.section("thinking-64x2", by_arm(grpo=GRPO, best=GRPO))


def test_costs_of_too_few_seeds_are_not_compared() -> None:
    rows = tables.costs(by_arm(grpo=GRPO, worst=AHEAD[:2], best=AHEAD))
    few = next(row for row in rows if row[0] == "worst draft")
    assert few[-3:] == [tables.FEW] * 3
    assert tables.FEW not in next(row for row in rows if row[0].startswith("best"))


def test_it_is_told_where_the_plain_question_is_forgotten() -> None:
    arms = by_arm(grpo=GRPO, best=GRPO)
    told = tables.forgotten({"chain-64x2": arms})
    assert told == "It fell by five points or more in 0 of 3 runs of the paper's form."
    for seed, last in enumerate((0.24, 0.26, 0.34)):
        arms["best"][seed]["steps"] += [{**arms["best"][seed]["steps"][0], "reward": last}]
    told = tables.forgotten({"signs-64x2": by_arm(best=GRPO), "chain-64x2": arms})
    assert told.endswith("in 1 of 6 runs of the paper's form (chain-64x2).")


def test_the_templates_warning_is_told_by_the_uplift() -> None:
    watch, batch = EarlyWarning(2), {"uplift": -0.5, "draft_reward": 0.5, "copied": 0.0}
    (template,) = [text for _ in range(2) for text in watch.see(batch)]
    runs = [record(0.5, 0.5, warnings=[{"step": 2, "text": template}])]
    assert tables.first_warning(runs) == "none"
    runs[0]["warnings"].append({"step": 7, "text": "55% of the refinements"})
    assert tables.first_warning(runs * 2) == "step 7, 2 of 2 runs"
    said = tables.first_warnings({"chain-64x2": {"best": dict(enumerate(runs))}})
    assert said == "Here the first warnings of that form came at step 7, in 1 of 1 runs."


def test_no_preset_is_named_where_none_holds() -> None:
    maps = {"chain-64x2": by_arm(grpo=GRPO, worst=[(0.5, 0.6)] * 3, best=[(0.3, 0.3)] * 3)}
    text = overview.takeaway(maps)
    assert "No form of iGRPO was shown to be never behind GRPO" in text
    assert "is *worst draft*: behind at chain-64x2 single-shot -12.0 [" in text
    assert "; ahead at chain-64x2 draft-then-refine +8.0 [" in text
    assert text.endswith("level or open at 0 of 2 (in points).")
    assert "Of the 2 forms with 3 seeds on all of them, the closest" in text
    maps["chain-64x2"] |= by_arm(best=[(0.3, 0.3)] * 2)
    assert "The only form with 3 seeds on all of them is *worst draft*" in overview.takeaway(maps)
    few = {"chain-64x2": by_arm(grpo=GRPO, worst=GRPO[:2])}
    assert overview.takeaway(few).startswith("**No form has 3 seeds on every task and size")
    assert overview.takeaway({}) == "**Nothing has been measured yet.**"


def test_a_task_on_which_grpo_learns_nothing_decides_nothing() -> None:
    flat = by_arm(grpo=[(0.24, 0.24)] * 3, worst=[(0.1, 0.1)] * 3)
    assert compare.gain(flat) == pytest.approx(0.04)
    maps = {"chain-64x2": by_arm(grpo=GRPO, worst=AHEAD), "signs-64x2": flat}
    assert list(compare.telling(maps)) == ["chain-64x2"]
    assert "ahead somewhere: *worst draft*" in overview.takeaway(maps)
    assert prose.NOTHING_LEARNED in tables.section("signs-64x2", flat)
    assert prose.NOTHING_LEARNED not in tables.section("chain-64x2", maps["chain-64x2"])
    assert math.isnan(compare.gain({}))
    early = by_arm(grpo=GRPO[:2])
    assert prose.TOO_FEW_SEEDS in tables.section("signs-64x2", early)
    assert compare.telling({"signs-64x2": early}) == {}


@pytest.mark.parametrize("base", [0.0, 1.0])
def test_a_task_that_teaches_nothing_is_marked(base: float) -> None:
    arms = by_arm(grpo=GRPO)
    for each in arms["grpo"].values():
        each["curve"][0]["sampled"] = base
    row = next(row for row in basis.counts({"signs-64x2": arms}) if row[0] == "signs-64x2")
    assert row[1].endswith("(nothing can be learned from this)")


def test_numbers_of_the_paper_are_its_own() -> None:
    """Table 1: the one average that is said to differ from its cells, and all differences."""
    cells = {"base": [38.60, 54.40, 92.80, 90.00, 92.00, 39.10]}
    assert sum(cells["base"]) / 6 == pytest.approx(67.82, abs=0.005)
    assert "its six cells average 67.82" in prose.PAPER
    for line in prose.PAPER.splitlines():
        if line.startswith("| ") and "+" in line:
            *_, grpo, ours, gap, _ = (cell.strip() for cell in line.split("|"))
            assert float(ours) - float(grpo) == pytest.approx(float(gap), abs=0.0051)


def test_the_pages_are_what_the_records_give_and_the_readme_says_the_same() -> None:
    maps = compare.read_records(page.ROOT / "benchmarks/results/replication")
    assert (page.FOLDER / page.PAGE).read_text() == page.build_page(maps)
    assert (page.FOLDER / page.TABLES).read_text() == page.build_tables(maps)
    readme = (page.ROOT / "README.md").read_text()
    none = overview.takeaway(again.planned_seeds(maps)).startswith("**No form")
    assert ("**No form is recommended as a preset**" in readme) is none
    _, _, held, _ = again.section(maps)
    assert "Of 5 differences that were clear, 2 came out so again" in held
    said = " ".join(readme.split())
    assert "two of its five clear differences came out so again" in said
    row = (
        "all under the question too, worst draft, 6 : 2 | 7 | -2.6 to +1.0 | 1 | 1 | -0.4 to +6.2 |"
    )
    assert f"{row} 0 | 2 |" in page.build_page(maps)
    closest = (
        "6 drafts to 2 refinements: behind on one, by 2.6 points, and ahead at draft-then-refine"
    )
    assert f"{closest} on two" in said


def test_which_draft_tables_what_the_question_adds_as_recorded() -> None:
    maps = compare.read_records(page.ROOT / "benchmarks/results/replication")
    text = (page.ROOT / "docs/method/which_draft.md").read_text()
    for drawn, trained, arm in (
        ("4 : 4", "each under its own prompt", "both-worst"),
        ("4 : 4", "all under the question too", "question-worst"),
        ("6 : 2", "each under its own prompt", "both-worst-6-2"),
        ("6 : 2", "all under the question too", "question-worst-6-2"),
    ):
        cells = []
        for task in ("chain", "signs", "packing", "thinking"):
            arms = maps[f"{task}-64x2"]
            single, both = (
                100 * compare.difference(arms, arm, "grpo", value).mean
                for value in (compare.single_shot, compare.refined)
            )
            cells.append(f"{single:+.1f} / {both:+.1f}")
        assert f"| {drawn} | {trained} | {' | '.join(cells)} |" in text


def test_fresh_seeds_stand_beside_the_planned_ones_and_change_nothing_else() -> None:
    """Five planned seeds say ahead at draft-then-refine; three fresh ones say behind."""
    arms = by_arm(
        grpo=[(0.6, 0.50 + seed / 100) for seed in range(SEEDS + 3)],
        worst=[(0.6, 0.60 + seed / 100) for seed in range(SEEDS)] + [(0.6, 0.4)] * 3,
        random=AHEAD,  # no fresh seed: not tried again
    )
    planned = again.planned_seeds({"signs-64x2": arms})
    before, after = page.build_page(planned), page.build_page({"signs-64x2": arms})
    assert "Tried again" not in before
    section = after[after.index("## Tried again") : after.index("## What it rests on")]
    assert after.replace(section, "") == before
    assert "| signs-64x2 | worst draft | draft-then-refine | +10.0 [" in section
    fresh = [line for line in section.splitlines() if "| draft-then-refine |" in line]
    assert len(fresh) == 1
    assert fresh[0].endswith("| **behind** | 3 |")
    assert "Of 1 differences that were clear, 0 came out so again" in section
