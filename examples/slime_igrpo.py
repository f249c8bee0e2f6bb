r"""iGRPO in slime 0.3.1: the functions that its options name.

Launch, with this folder on PYTHONPATH of slime's workers and slime's own settings for your model:

    python train.py --custom-generate-function-path slime_igrpo.generate \
        --n-samples-per-prompt 8 --advantage-estimator grpo --input-key messages ...

Give chat messages and leave --apply-chat-template off. slime's own loss is the paper's; for another
surrogate add --loss-type custom_loss --custom-loss-function-path slime_igrpo.loss. The metadata of
each sample get a dict `igrpo` with its draft and the rewards of all drafts. Sampling grows by
N / G. tests/hosts/slime runs both functions inside slime's rollout and loss; the whole launch needs
SGLang and Megatron on GPUs and has not been run.
"""

from igrpo_algo.trainers.slime import make_generate, make_loss
from igrpo_kernels import Sapo

generate = make_generate(num_drafts=8)
loss = make_loss(Sapo())
