"""What happens in one step, and in which order: request → plan (may raise, writes nothing) → execution (writes).

planning.py gathers gradients, asks sources.py for the numbers of this step, runs callbacks.py, has clipping.py take
norms, and partitions parameters into batches, each of which one call of a backend updates. No kernel is known here.
"""
