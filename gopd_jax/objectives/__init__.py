"""The mathematics of on-policy distillation as tables of pure functions.

A library to be read and used alone: it imports nothing of this package but `spec` and `types`.
"""
