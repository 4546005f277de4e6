"""The algorithms in one process: a torch sampler, no Ray, no vLLM, no DeepSpeed. `python -m rltk.lab algorithm=ctpo`.

For studies over many seeds and for a debugger: staleness, minibatches and the sampler's noise are dials, and any number
of runs of one shape are trained side by side on one device, their weights stacked.
"""
