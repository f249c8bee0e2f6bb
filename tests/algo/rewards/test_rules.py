"""The table of rules: every case, with its rule and without."""

import re

import pytest

from igrpo_algo.rewards.remarks import STATED
from igrpo_algo.rewards.rules import WRITTEN, Rule, apply_rules

RULES = [
    pytest.param(table, rule, id=f"{name}-{number}")
    for name, table in (("stated", STATED), ("written", WRITTEN))
    for number, rule in enumerate(table)
]


@pytest.mark.parametrize(("table", "rule"), RULES)
def test_each_rule_does_what_its_cases_say(table: tuple[Rule, ...], rule: Rule) -> None:
    assert {answer: apply_rules(table, answer) for answer in rule.cases} == rule.cases


@pytest.mark.parametrize(("table", "rule"), RULES)
def test_no_case_comes_out_right_without_its_rule(table: tuple[Rule, ...], rule: Rule) -> None:
    others = [other for other in table if other is not rule]
    changed = {answer: wanted for answer, wanted in rule.cases.items() if answer != wanted}
    assert changed
    assert [a for a, wanted in changed.items() if apply_rules(others, a) == wanted] == []


def test_rules_are_applied_until_nothing_changes() -> None:
    halve = Rule(re.compile("aa"), "a", {})
    assert apply_rules([halve], "aaaaaaa") == "a"
