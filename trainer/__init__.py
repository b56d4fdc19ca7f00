"""The trainer: sealed windows of ground truth become better generations of the model, proven on later windows.

Read `cycle.py` first: it tells the story, step by step in the order
plan, select, finetune, retention, calibrate, freeze, evaluate, gate, publish.
"""
