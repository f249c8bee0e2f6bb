"""Two-stage rollouts over any sampler and any reward, and what is kept of them.

`sampling` says what a sampler is, `two_stage` runs both stages (in step or as a stream), `records`
keeps what happened, `single_flight` serves trainers that ask once per sample.
"""
