"""Verbs around a run: start, plan, resume and read one."""
