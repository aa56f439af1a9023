"""The ways in which one process trains the clients it is given: one after the other, stacked, by a captured step.

Every way is a `Trainer`, so that messages, codecs and what clients keep are the same under all of them.
"""
