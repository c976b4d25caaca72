"""``visionzip benchmark …``: what visual tokens cost, and what choosing a few of them gains. A file a command.

What is compared takes turns in the same rounds of one process (:mod:`llava.measure.meters.timing`), so that a noisy
machine disturbs all alike; peak memory is that of a fresh process each (:mod:`llava.measure.meters.peak`). Ratios carry
over to other machines better than times.
"""
