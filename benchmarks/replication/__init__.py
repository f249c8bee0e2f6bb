"""Does iGRPO work, and which form of it? Arms x seeds x tasks, measured alike.

python -m benchmarks.replication            every arm that is not recorded yet (three hours)
python -m benchmarks.replication --smoke    the same at a size of ten minutes
python -m benchmarks.replication map        the page and the plot from what is recorded

`arms.py` is the file to read and to change: each arm is a few options of `IGRPOConfig`.
"""
