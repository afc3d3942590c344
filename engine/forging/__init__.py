"""Stages, assessment and report of pruning and recovery cycles."""
