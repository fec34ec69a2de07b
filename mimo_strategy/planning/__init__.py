"""What a layout costs before it runs: memory of every rank, time of a step, and the layouts worth trying.

Arithmetic in plain Python on what modules tell of their layers; ``docs/planning.md`` holds the formulas.
"""
