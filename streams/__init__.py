"""The stream stage: predictions and outcomes become ground truth, and its quality is watched live.

Read `join.py` (what is true of one prediction), `state.py` (where that is remembered), `loop.py` (how it is committed),
`app.py` (the worker around it); `monitor.py` stands beside them.
"""
