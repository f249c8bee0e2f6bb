"""What to watch in a two-stage run.

Pure functions of rewards (NaN where unscored) or of texts. Those of rewards return detached tensors
on the rewards' device and never wait for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels.checks import (
    check_callable,
    check_count,
    check_list,
    check_number,
    check_rank,
    check_shape,
    describe,
)

from .advantages.moments import GroupedRewards, to_scores
from .thinking import strip_thinking


def zero_variance_rate(rewards: Tensor, groups: int | Tensor | None = None) -> Tensor:
    """Share of groups whose rewards are all equal, which therefore have no gradient.

    share = #{groups with std(r) = 0} / #groups

    A group with one scored reward counts among them; a group with none is left out of both counts.
    NaN where no reward is scored.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        groups: For [B] only: G, or the group id of each reward, shape [B].

    Returns:
        Share, a scalar in float32 or float64, detached.

    Raises:
        TypeError: `rewards` is not a tensor of real numbers, or `groups` neither an int nor an
            integer tensor.
        ValueError: `rewards` and `groups` do not fit each other.

    Examples:
        >>> zero_variance_rate(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, float("nan")]]))
        tensor(0.6667)
    """
    grouped = GroupedRewards.of(rewards, groups)
    equal = grouped.max(grouped.rewards) == -grouped.max(-grouped.rewards)
    # Each scored reward weighs one over its group's count, so that each group weighs one.
    weight = grouped.restore(1 / grouped.count)
    return grouped.restore(equal / grouped.count).sum() / weight.sum()


def draft_success_rate(draft_rewards: Tensor, *, threshold: float = 1.0) -> Tensor:
    """Share of prompts with a successful draft, from which Stage 2 can start.

    share = #{p : max_n r_pn >= threshold} / #prompts

    Prompts without a scored draft are left out of both counts. NaN where none is left. With binary
    rewards this estimates 1 - (1 - V)^N of iGRPO's Proposition 3.1, arXiv:2602.09000.

    Args:
        draft_rewards: Reward of each draft, NaN where unscored. Shape [P, N].
        threshold: Least reward of a success.

    Returns:
        Share, a scalar in float32 or float64, detached.

    Raises:
        TypeError: `draft_rewards` is not a tensor of real numbers, or `threshold` not a number.
        ValueError: `draft_rewards` are not [P, N], or `threshold` is not finite.

    Examples:
        >>> draft_success_rate(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        tensor(0.5000)
    """
    check_number("threshold", threshold)
    scores = _rows("draft_rewards", draft_rewards, "[P, N]")
    succeeded = (scores >= threshold).any(-1).to(scores.dtype)
    return succeeded.where(~scores.isnan().all(-1), torch.nan).nanmean()


def stage_uplift(draft_rewards: Tensor, refinement_rewards: Tensor) -> Tensor:
    """How much better refinements score than drafts, on the same prompts.

    uplift = mean_p ( mean_g r_pg - mean_n r_pn )

    Each prompt has the same weight, however many of its samples were scored; prompts that lack a
    scored sample in either stage are left out. NaN where none is left.

    Args:
        draft_rewards: Stage 1, NaN where unscored. Shape [P, N].
        refinement_rewards: Stage 2, NaN where unscored. Shape [P, G].

    Returns:
        Mean Stage-2 reward minus mean Stage-1 reward, a scalar in float32 or float64, detached.

    Raises:
        TypeError: An argument is not a tensor of real numbers.
        ValueError: An argument does not have two axes, or the numbers of prompts differ.

    Examples:
        >>> stage_uplift(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]]))
        tensor(0.2500)
    """
    drafts = _rows("draft_rewards", draft_rewards, "[P, N]")
    refinements = _rows("refinement_rewards", refinement_rewards, "[P, G]")
    if len(drafts) != len(refinements):
        raise ValueError(
            f"refinement_rewards must have shape [P, G] with P = {len(drafts)}, "
            f"got {list(refinements.shape)}"
        )
    return (refinements.nanmean(-1) - drafts.nanmean(-1)).nanmean()


def accuracy_after_draft(
    refinement_rewards: Tensor, draft_rewards: Tensor, *, threshold: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Share of right refinements after a right draft, and after a wrong one.

    accuracy = #{(p, g) : r_pg >= threshold} / #{(p, g)}
    over prompts with d_p >= threshold, and over those with d_p < threshold

    1 and 0 mean that refinements are right exactly where their draft was: all rewards of a group
    are then equal, and nothing is learned. Prompts whose draft is NaN (none was shown) and
    unscored refinements are left out. NaN where none is left.

    Args:
        refinement_rewards: Stage 2, NaN where unscored. Shape [P, G].
        draft_rewards: Reward of the draft that each prompt was shown, NaN where none was. [P].
        threshold: Least reward of a right completion.

    Returns:
        Two shares, scalars in float32 or float64, detached.

    Raises:
        TypeError: An argument is not a tensor of real numbers, or `threshold` not a number.
        ValueError: `refinement_rewards` are not [P, G], `draft_rewards` not [P] of the same P, or
            `threshold` is not finite.

    Examples:
        >>> refinements = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> accuracy_after_draft(refinements, torch.tensor([1.0, 0.0]))
        (tensor(0.5000), tensor(0.))
    """
    check_number("threshold", threshold)
    scores = _rows("refinement_rewards", refinement_rewards, "[P, G]")
    drafts = to_scores("draft_rewards", draft_rewards)
    check_shape("draft_rewards", drafts, scores.shape[:1], "[P]")
    right = (scores >= threshold).to(scores.dtype).where(~scores.isnan(), torch.nan)
    after_right, after_wrong = (
        right.where(kind[:, None], torch.nan).nanmean()
        for kind in (drafts >= threshold, drafts < threshold)
    )
    return after_right, after_wrong


def pass_at_k(rewards: Tensor, k: int, *, threshold: float = 1.0) -> Tensor:
    """Estimate, without bias, the probability that at least one of k samples succeeds, per prompt.

    pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{j < k} (n - c - j) / (n - j)

    n counts the prompt's scored samples and c those among them that reach the threshold. NaN for
    prompts with n < k. Chen et al. 2021, arXiv:2107.03374, equation 1.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, N].
        k: Number of tries, from 1 to N.
        threshold: Least reward of a success.

    Returns:
        pass@k of each prompt, shape [P], float32 or float64, detached. `.nanmean()` is the score.

    Raises:
        TypeError: `rewards` is not a tensor of real numbers, `k` not an int, or `threshold` not a
            number.
        ValueError: `rewards` are not [P, N], `k` is not in 1..N, or `threshold` is not finite.

    Examples:
        >>> pass_at_k(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]), 2)
        tensor([0.5000, 1.0000])
    """
    check_number("threshold", threshold)
    scores = _rows("rewards", rewards, "[P, N]")
    if check_count("k", k) > scores.shape[1]:
        raise ValueError(f"k must be at most N = {scores.shape[1]}, got {k}")
    tries = torch.arange(k, device=scores.device)
    scored = (~scores.isnan()).sum(-1, keepdim=True)
    failed = (scores < threshold).sum(-1, keepdim=True)
    # Fewer than k failures: one ratio is 0, for no k samples can all have failed. Fewer than k
    # samples: that 0, or 0 itself, meets a denominator of 0, and the product is NaN.
    ratios = (failed - tries).to(scores.dtype) / (scored - tries)
    return 1 - ratios.prod(-1)


def copy_rate(
    drafts: Sequence[str | None],
    refinements: Sequence[Sequence[str]],
    *,
    strip: Callable[[str], str] | None = strip_thinking,
) -> float:
    """Share of refinements that only repeat the draft they were shown.

    share = #{(p, j) : strip(o_pj) = d_p} / #refinements

    The texts are compared: the draft as it stands in the prompt, without its thinking and control
    tokens, and what `strip` keeps of the refinement; space at the ends does not count. Token ids
    would miss a copy that stops or thinks in another way. Prompts that show no draft are left out.
    NaN where no refinement is left.

    Args:
        drafts: `DraftChoice.draft` of each prompt; None or empty where it shows none. P texts.
        refinements: The texts of each prompt's refinements. P lists of any number.
        strip: What was done to the drafts, as in `TextSplice`; None keeps all of a refinement.

    Returns:
        Share, from 0 to 1.

    Raises:
        TypeError: They are not lists, `refinements` of lists of text.
        ValueError: The two do not have one entry per prompt.

    Examples:
        >>> copy_rate(["It is 5.", None], [["<think>2 + 3</think>It is 5.", "6"], ["7"]])
        0.5
    """
    _check_one_per_prompt(drafts, refinements)
    copies = [
        repeats_draft(draft, refinement, strip=strip)
        for draft, group in zip(drafts, refinements, strict=True)
        if draft not in (None, "")
        for refinement in group
    ]
    return sum(copies) / len(copies) if copies else float("nan")


def repeats_draft(
    draft: str, refinement: str, *, strip: Callable[[str], str] | None = strip_thinking
) -> bool:
    """Whether a refinement only repeats its draft; `copy_rate` says how they are compared.

    Examples:
        >>> repeats_draft("It is 5.", "<think>2 + 3</think> It is 5.")
        True
    """
    for name, text in (("draft", draft), ("refinement", refinement)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string, got {describe(text)}")
    kept = refinement if strip is None else check_callable("strip", strip)(refinement)
    if not isinstance(kept, str):
        raise TypeError(f"strip must return a string, got {describe(kept)}")
    return kept.strip() == draft.strip()


def _rows(name: str, values: Tensor, legend: str) -> Tensor:
    return check_rank(name, to_scores(name, values), 2, legend)


def _check_one_per_prompt(drafts: Sequence[Any], refinements: Sequence[Any]) -> None:
    if len(check_list("drafts", drafts)) != len(check_list("refinements", refinements)):
        raise ValueError(
            f"refinements must have P = {len(drafts)} entries, one per draft, "
            f"got {len(refinements)}"
        )
    for index, group in enumerate(refinements):
        check_list(f"refinements[{index}]", group)
