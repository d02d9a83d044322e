"""`smt bench` and `smt env`: is every route to a result right, how fast is it, and which backend serves what.

Nothing is imported here; `command` runs both verbs.
"""
