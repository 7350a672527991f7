"""The tasks, one file each.

A task is a pytree of its data with the static field `classes`, `sample(key, batch)`,
which draws a training batch inside a compiled program, and `test()`, the examples a
model is judged on.
"""
