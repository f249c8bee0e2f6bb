"""The words of the pages; every number in them was published elsewhere."""

TEMPLATE = "refinements scored"  # how the warning of a template begins

HEAD = """# Replication: where iGRPO is ahead, level and behind

Models of {weights}, trained from scratch on a CPU: they show mechanisms, and say
nothing about how well a large pretrained model revises. `python -m benchmarks.replication map`
writes this page and [every table behind it](replication_tables.md) from the records in
`benchmarks/results/replication/`; `make replication` does the runs that are missing.
"""

FORMS = """## Each form beside GRPO

At as many completions (4 drafts and 4 refinements, or N : G), with the same loss and as many
updates, over all models that the form was run on: its mean differences in points, from the worst
model to the best, and on how many models it is behind GRPO or ahead of it. For both, two 95 %
intervals over seeds leave zero out: Student's and the bootstrap's. *No draft shown* is GRPO with
half of the completions. *All under the question too*: besides the refinements under their prompt,
drafts and refinements are trained as one group under the plain question
(`training_batch(under_question=True)`); `IGRPOTrainer` does not do that yet."""

ADVICE = """## Advice in five lines

1. Watch three numbers on your own model first, in some 40 steps of the paper's form:
   `igrpo/copied`, `igrpo/refinement_zero_std` beside `igrpo/draft_zero_std`, and `igrpo/uplift`.
   {first}
2. Copies above one half, or Stage 2 without variance far more often than Stage 1: don't train on
   refinements of the best draft alone.
3. Train the drafts too (`draft_loss_coef`): they cost no further sampling. Without them half of the
   completions get no gradient, and the model may forget the plain question; then
   `igrpo/draft_reward` falls. {forgotten}
4. Keep GRPO at the same number of completions beside it, with at least three seeds, and believe
   no difference without an interval.
5. Judge by what you deploy, single-shot or draft-then-refine: the two rank the forms differently.
"""

BASIS = """{total} finished runs of {planned} planned: {seeds} seeds of each arm. On the smallest
models each task gets all arms; one that thinks before it answers gets the main ones, and those that
show a draft's thinking. Larger models get the arms of most interest.{larger}

All seeds of a task and size start from the same warmed weights; a seed draws its problems and its
samples. Accuracy is that of sampled answers to 500 held-out problems that no training saw. Training
is short, 80 steps of 16 problems: what is compared is how fast they learn. A model counts for the
verdict, whatever its size, if GRPO gains five points on it: a form to recommend must not be behind
on a larger model either."""

TABLES = """# Replication: every table

What [replication](replication.md) sums up, by task and size of model (width x layers);
`python -m benchmarks.replication map` writes both pages."""

LADDER = """Width and layers of the model, 64x2 to 256x4. A change is the difference of two
differences, paired by seed; of twenty that do not change, one is expected to look as if it did.
On chain it may come from the warm-up, which differs there: the weights of 64x2 are the demo's, half
of whose drafts were the answer with some values replaced. Elsewhere a draft is another answer of
the same teacher's, who does not look at it."""

RUNGS = """Rows of GRPO are its accuracy; the others are the difference to GRPO of the same size,
with Student's interval and the verdict."""

AGAIN = """The best of many forms is flattered by chance. So what looked best on the larger models
was run once more, beside its GRPO, on seeds that had no part in the choice (`--seeds 15` with those
arms): the same weights to begin with, other problems and samples. These runs are in no other table
and in no verdict above. Clear is what is ahead or behind."""

MAP = """Differences are to GRPO of eight completions with the same loss and as many updates, at
equal completions ("half the completions" excepted), paired by seed, with 95 % intervals over seeds
by Student's t and by the paired bootstrap, which is too narrow for five seeds. *Ahead* and
*behind*: both leave zero out. *Level*: both lie within three points of zero. *Open*: anything else.
*No draft shown* draws its refinements from the same seeds as GRPO of four and trains on nothing
else, so the two are the same run; its drafts are thrown away. GRPO never trains on a prompt with a
draft, and may lose by one: so the better use of each is compared too. The best of many forms is
flattered by chance."""

NOTHING_LEARNED = " GRPO itself gained less than five points here, so this decides nothing."

TOO_FEW_SEEDS = " GRPO has too few seeds here yet: this decides nothing."

COSTS = """Where an arm had spent more than its baseline or less, both are read from their curves
at the cost that both had reached. CPU seconds are those of sampling and training on one core of a
shared machine: compare arms, not machines. A draft in the prompt costs time, not sampled tokens;
completions of groups without variance are not trained on, which saves time."""

DIAGNOSTICS = """Means over the first fifth of the steps, and when `EarlyWarning`, which the
trainer uses too, first spoke of copies or of equal groups. (It speaks of the template where the
uplift is a loss of half of the drafts' reward. Since these runs it also speaks of a third of the
drafts' reward lost since the start.)"""

MORE = """At the end of training. Rounds refine the answer of the round before: at test time no
reward chooses. "After a right draft": accuracy of refinements whose draft was right. Entropy in
nats per token, of single-shot answers; in the last column it is read where the arm's accuracy
passed 40 %."""

REAL_MODEL = """## A pretrained model

Not run through this instrument yet: it needs a GPU. What a pilot saw with SmolLM2-135M-Instruct
(2 seeds, one H100) is in [Which draft?](which_draft.md): the paper's form collapsed into copying,
both stages trained with the worst draft were level with GRPO single-shot and 5 points ahead at
draft-then-refine.
"""

PAPER = """## The paper's own tables

Averages over six benchmarks (AIME25, AIME24, MATH500, AMC, GSM8K, Minerva), Pass@1 in %, one run
per cell, training on MATH ([arXiv:2602.09000](https://arxiv.org/abs/2602.09000), Table 1):

| model | base | GRPO | iGRPO | iGRPO less GRPO |
| --- | --- | --- | --- | --- |
| Nemotron-H-8B-Base-8K | 29.65 | 41.08 | 45.04 | +3.96 |
| DeepSeek-R1-Distill-Qwen-7B | 61.93; its six cells average 67.82 | 68.29 | 69.87 | +1.58 |
| OpenMath-Nemotron-7B | 74.83 | 75.02 | 76.07 | +1.05 |
| DeepSeek-R1-Distill-Qwen-14B | 70.47 | 71.29 | 73.02 | +1.73 |
| OpenMath-Nemotron-14B | 75.41 | 76.73 | 78.00 | +1.27 |

Read with these in mind:

- The base average of DeepSeek-R1-Distill-Qwen-7B is printed as 61.93; the six numbers beside it
  average 67.82, so GRPO's gain over the base is about 0.5 points there, and iGRPO's about 2.1.
- The base row of OpenMath-Nemotron-14B repeats that of the 7B model in all cells but GSM8K.
- The run that gives the highest numbers (OpenReasoning-Nemotron-7B on AceReason-Math) has no GRPO
  run beside it.
- The overhead is given as 13 % of GPU hours; the samples per second beside it (0.41 and 0.34)
  make 21 % per sample.
- There are no seeds and no intervals, and no runs with a random or worst draft, with drafts
  trained, or with other splits than N = G. The paper's Table S.4 has 4, 8, 16 and 32 completions:
  67.79, 69.87, 70.17 and 70.33.
"""
