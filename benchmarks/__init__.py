"""How fast clove-hub is: measured figures with their spread, against CLoVE's released code where a clone is at hand.

`python -m benchmarks.all --data PHOTOS [--reference CLONE]` runs pipeline, step and end_to_end one after the other;
each can be run alone. Everything that is timed is the product's own code.
"""
