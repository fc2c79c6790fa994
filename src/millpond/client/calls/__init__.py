"""Calls, one file per noun: functions that make a `Call` for each route of the API.

Made into methods by `groups` and `handles`. Invariant: a function takes everything that its route takes.
"""
