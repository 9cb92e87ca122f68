"""Preparation in three phases that share work over processes and machines.

1. `encode`: units of text → tokens in work files, with an index of the documents (`parts`).
2. `plan`: from the indexes alone, what goes into which sample.
3. `write`: samples → shards.

`pool` has the local processes, `workers` the waiting for other machines, `storage` the places that
shards go to.
"""
